"""K-means with reproducible codebooks: the same seed and data give the same result.

Sums are in fixed point (int64), so they do not depend on the order of additions, on threads or on
the atomics of a device. k-means++ runs on the CPU, on a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from scipy.spatial import cKDTree

from ..progress import Progress
from .arguments import check_positive
from .knn import kth_distances, nearest

SAMPLE_PER_CODE = 128  # latents per code that are sampled from a stream and kept in memory
SEEDING_PER_CODE = 8  # latents per code that k-means++ uses
SEEDING_ROUNDS = 1024  # draws of k-means++; larger codebooks draw several codes at a time
ASSIGN_CHUNK = 1 << 18  # latents assigned at a time
# A k-d tree is faster than all distances from this many codes, up to this many dimensions.
TREE_CODES = 512
TREE_DIMENSIONS = 8


@dataclass(frozen=True)
class KMeans:
    """The result of `kmeans`.

    Attributes:
        centroids: (K, D) float32, all different.
        counts: (K,) int64, latents per centroid in the last pass.
        error: mean squared distance of a latent from its centroid, summed over dimensions.
        iterations: passes over the data.
    """

    centroids: torch.Tensor
    counts: torch.Tensor
    error: float
    iterations: int


def kmeans(
    data: torch.Tensor | Iterable[torch.Tensor],
    codebook_size: int,
    *,
    seed: int = 0,
    max_iterations: int = 100,
    tolerance: float = 1e-4,
    stream_passes: int = 5,
    progress: Progress | None = None,
) -> KMeans:
    """Lloyd's algorithm from a k-means++ start; empty clusters move to latents with large errors.

    A stream of batches is sampled evenly (128 latents per code, kept in memory), and the sample is
    clustered. If the stream can be iterated again (a list or DataLoader, not a generator), up to
    `stream_passes` passes over all of it follow. Processes of a group must pass the same data:
    nothing is exchanged.

    Args:
        data: (N, D) float latents, or an iterable of (..., D) batches of them.
        codebook_size: K, at least 1; N must be at least K.
        seed: seed of all random numbers.
        max_iterations: most passes over the latents in memory.
        tolerance: stop when a pass lowers the error by less than this fraction.
        stream_passes: most passes over a whole stream.
        progress: called with "k-means" and the passes done; their total is a limit, rarely reached.

    Raises:
        ValueError: codebook_size is not positive, latents are not finite, or there are fewer
            different latents than codes.
    """
    check_positive(codebook_size=codebook_size, max_iterations=max_iterations)
    generator = torch.Generator().manual_seed(seed)
    if isinstance(data, torch.Tensor):
        sample, again = _flat(data), False
    else:
        again = iter(data) is not data and stream_passes > 0
        sample = _reservoir(data, SAMPLE_PER_CODE * codebook_size, generator)
    if len(sample) < codebook_size:
        raise ValueError(f"{len(sample)} latents are too few for {codebook_size} codes")
    centroids = _plus_plus(sample, codebook_size, generator).to(sample.device)
    data_and_limits = [([sample], max_iterations)] + ([(data, stream_passes)] if again else [])
    done, most = 0, sum(limit for _, limit in data_and_limits)
    for batches, limit in data_and_limits:
        before = math.inf
        for i in range(limit):
            moved, counts, error = _lloyd(batches, centroids, sample, generator)
            done += 1
            if progress:
                progress("k-means", done, most)
            settled = before - error <= tolerance * error and bool((counts > 0).all())
            if settled or i + 1 == limit:
                break
            centroids, before = moved, error
    apart = _separate(centroids, sample, generator)
    if apart is not centroids:
        _, counts, error = _lloyd(data_and_limits[-1][0], apart, sample, generator)
        done += 1
    return KMeans(apart, counts, error, done)


def _lloyd(
    batches: Iterable[torch.Tensor],
    centroids: torch.Tensor,
    sample: torch.Tensor,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """One pass: the means of the cells, the latents in each cell, and the error before the pass."""
    size, dim = centroids.shape
    center = sample.mean(0)
    scale = 2.0**30 / (sample - center).abs().max().double().clamp(min=1e-30)
    counts = torch.zeros(size, dtype=torch.int64, device=centroids.device)
    sums = torch.zeros(size, dim, dtype=torch.int64, device=centroids.device)
    total, n = 0.0, 0
    assign = _assigner(centroids)
    for batch in batches:
        for part in _flat(batch).to(centroids.device).split(ASSIGN_CHUNK):
            codes = assign(part)
            total += (part - centroids[codes]).double().square().sum().item()
            n += len(part)
            counts += torch.bincount(codes, minlength=size)
            sums.index_add_(0, codes, ((part - center).double() * scale).round().long())
    moved = (sums / (counts.unsqueeze(1).clamp(min=1) * scale)).float() + center
    empty = counts == 0
    if empty.any():
        moved[empty] = _worst_latents(sample, centroids, int(empty.sum()), generator)
    return moved, counts, total / max(n, 1)


def _assigner(centroids: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from (N, D) latents to their nearest centroids, (N,) int64.

    On a CPU, many centroids of few dimensions are searched with a k-d tree: 15 times faster than
    all distances for 16,384 centroids of 5 dimensions.
    """
    size, dim = centroids.shape
    if centroids.device.type == "cpu" and size >= TREE_CODES and dim <= TREE_DIMENSIONS:
        tree = cKDTree(centroids.numpy())
        return lambda part: torch.from_numpy(tree.query(part.numpy())[1]).long()
    return lambda part: nearest(part, centroids)


def _plus_plus(
    sample: torch.Tensor, codebook_size: int, generator: torch.Generator
) -> torch.Tensor:
    """k-means++: codes are latents, drawn in proportion to their squared distance to earlier codes.

    Up to 1,024 codes are drawn one by one, each the best of a few candidates; more are drawn in
    equal rounds.
    """
    limit = max(SEEDING_PER_CODE * codebook_size, 1 << 14)
    pool = sample.cpu()
    if len(pool) > limit:
        pool = pool[torch.randperm(len(pool), generator=generator)[:limit]]
    first = torch.randint(len(pool), (1,), generator=generator)
    codes = [pool[first]]
    error = (pool - codes[0]).square().sum(1)
    rounds = min(codebook_size - 1, SEEDING_ROUNDS)
    for i in range(rounds):
        number = (codebook_size - 1) * (i + 1) // rounds - (codebook_size - 1) * i // rounds
        trials = 2 + int(math.log(codebook_size)) if number == 1 else number
        drawn = pool[_draw(error, trials, generator)]
        if number == 1:
            distances = (pool.unsqueeze(1) - drawn).square().sum(2).T
            remaining = torch.minimum(distances, error)
            best = int(remaining.sum(1).argmin())
            codes.append(drawn[best : best + 1])
            error = remaining[best]
        else:
            codes.append(drawn)
            error = torch.minimum(error, kth_distances(pool, drawn, (1,))[0].square())
    return torch.cat(codes)


def _draw(weights: torch.Tensor, number: int, generator: torch.Generator) -> torch.Tensor:
    """Draw `number` indices in proportion to (N,) weights, on the CPU."""
    cumulative = weights.double().cumsum(0)
    at = torch.rand(number, dtype=torch.float64, generator=generator) * cumulative[-1]
    return torch.searchsorted(cumulative, at, right=True).clamp_(max=len(weights) - 1)


def _worst_latents(
    sample: torch.Tensor, centroids: torch.Tensor, number: int, generator: torch.Generator
) -> torch.Tensor:
    """Replacements for unused codes: latents drawn in proportion to their squared error."""
    assign = _assigner(centroids)
    parts = sample.split(ASSIGN_CHUNK)
    errors = [(part - centroids[assign(part)]).square().sum(1) for part in parts]
    error = torch.cat(errors).cpu()
    available = int((error > 0).sum())
    if available < number:
        codes = len(centroids)
        raise ValueError(f"only {codes - number + available} different latents for {codes} codes")
    # Weighted sampling without replacement: the first arrivals of a race with these rates.
    race = torch.empty(len(error), dtype=torch.float64).exponential_(generator=generator) / error
    picked = race.topk(number, largest=False).indices
    return sample[picked.to(sample.device)]


def _separate(
    centroids: torch.Tensor, sample: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Move centroids that coincide with others, so that each is its own nearest centroid."""
    own = torch.arange(len(centroids), device=centroids.device)
    for _ in range(20):
        lost = nearest(centroids, centroids) != own
        if not lost.any():
            return centroids
        centroids = centroids.clone()
        centroids[lost] = _worst_latents(sample, centroids, int(lost.sum()), generator)
    raise ValueError(f"the latents are too close together for {len(centroids)} codes")


def _reservoir(
    batches: Iterable[torch.Tensor], size: int, generator: torch.Generator
) -> torch.Tensor:
    """A uniform sample of at most `size` latents from a stream."""
    kept: list[torch.Tensor] = []
    keys: list[torch.Tensor] = []
    count = 0

    def thin() -> None:
        best, order = torch.cat(keys).topk(size)
        keys[:], kept[:] = [best], [torch.cat(kept)[order.to(kept[0].device)]]

    for batch in batches:
        batch = _flat(batch)
        if kept and batch.shape[1] != kept[0].shape[1]:
            widths = f"{kept[0].shape[1]} and {batch.shape[1]}"
            raise ValueError(f"latents of {widths} dimensions in one stream")
        keys.append(torch.rand(len(batch), dtype=torch.float64, generator=generator))
        kept.append(batch)
        count += len(batch)
        if count > 2 * size:
            thin()
            count = size
    if not kept:
        raise ValueError("no latents to fit a codebook to")
    if count > size:
        thin()
    return torch.cat(kept)


def _flat(latents: torch.Tensor) -> torch.Tensor:
    """(..., D) -> (N, D) float32; ValueError if they are not finite."""
    flat = latents.detach().reshape(-1, latents.shape[-1]).float()
    if not torch.isfinite(flat).all():
        bad = flat[~torch.isfinite(flat)][0].item()
        raise ValueError(f"latents must be finite, got {bad}")
    return flat
