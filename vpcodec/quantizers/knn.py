"""Nearest neighbours among a set of points, in chunks that stay in the cache.

Distances come from |q|^2 + |p|^2 - 2 q.p about the mean of the points, one matrix product a chunk.
Where the result is an index, the best few candidates are compared again by |q - p|^2 itself, so
that close points are told apart.
"""

from __future__ import annotations

import torch

CHUNK = 1 << 20  # distances at a time: 4 MB
TINY = 1e-12  # a distance that is no zero
SAME = 0.01  # of the width of a cell: latents closer than this count as one
CANDIDATES = 4  # compared again exactly


def nearest(queries: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Index of the nearest point of each query.

    Args:
        queries: (N, D) float32.
        points: (P, D) float32, P at least 1.

    Returns:
        (N,) int64; of equally near points the first of the candidates.
    """
    center = points.mean(0)
    points = points - center
    queries = queries - center
    norms = points.square().sum(1)
    if torch.compiler.is_compiling():  # a graph has one chunk
        return _nearest(queries, points, norms)
    out = [_nearest(part, points, norms) for part in _chunks(queries, len(points))]
    return torch.cat(out) if out else torch.zeros(0, dtype=torch.int64, device=queries.device)


def _nearest(queries: torch.Tensor, points: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    scores = torch.addmm(norms, queries, points.T, alpha=-2)
    candidates = scores.topk(min(CANDIDATES, len(points)), largest=False).indices
    exact = (points[candidates] - queries.unsqueeze(1)).square().sum(-1)
    return candidates.gather(1, exact.argmin(1, keepdim=True)).squeeze(1)


def kth_distances(
    queries: torch.Tensor,
    points: torch.Tensor,
    orders: tuple[int, ...],
    *,
    counted: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Distances to the k-th nearest points, without sorting all of them.

    Args:
        queries: (N, D) float32.
        points: (P, D) float32.
        orders: the k's, each at least 1.
        counted: (P,) bool, which points count; default all.

    Returns:
        (N,) float32 for each of `orders`; infinite where fewer points count.
    """
    most = max(orders)
    center = points.mean(0)
    points = points - center
    queries = queries - center
    norms = points.square().sum(1)
    if counted is not None:
        norms = torch.where(counted, norms, torch.inf)
    rows = []
    for part in _chunks(queries, len(points)):
        best = part.new_full((len(part), 0), torch.inf)
        for some, norm in zip(points.split(CHUNK), norms.split(CHUNK)):
            scores = torch.addmm(norm, part, some.T, alpha=-2)
            near = scores.topk(min(most, len(some)), largest=False).values
            best = torch.cat([best, near], 1)
            best = best.topk(min(most, best.shape[1]), largest=False).values
        best = torch.nn.functional.pad(best, (0, most - best.shape[1]), value=torch.inf)
        squared = best[:, [k - 1 for k in orders]] + part.square().sum(1, keepdim=True)
        rows.append(squared.clamp_(min=0).sqrt_())
    if not rows:
        return tuple(queries.new_zeros(0) for _ in orders)
    return tuple(torch.cat(rows).unbind(1))


def cell_width(points: torch.Tensor, codebook_size: int) -> torch.Tensor:
    """About the width of the cells of K codes for (P, D) points: their spread over K^(1/D)."""
    spread = points.std(0, correction=0).mean()
    return (spread * codebook_size ** (-1 / points.shape[1])).clamp(min=TINY)


def distinct(points: torch.Tensor, step: float | torch.Tensor) -> torch.Tensor:
    """Which points are the first in their cell of a grid.

    Args:
        points: (P, D) float32.
        step: width of the grid's cells.

    Returns:
        (P,) bool, True for one point of each occupied cell.
    """
    cells = torch.floor(points / step).long()
    mix = torch.tensor(
        [(0x9E3779B97F4A7C15 * (2 * i + 1)) % 2**63 for i in range(points.shape[1])],
        device=points.device,
    )
    keys = (cells * mix).sum(1)  # wraps around: a hash
    keys, order = torch.sort(keys, stable=True)
    first = torch.ones_like(keys, dtype=torch.bool)
    first[1:] = keys[1:] != keys[:-1]
    return torch.empty_like(first).scatter_(0, order, first)


def _chunks(queries: torch.Tensor, points: int) -> tuple[torch.Tensor, ...]:
    return queries.split(max(1, CHUNK // max(1, points))) if len(queries) else ()
