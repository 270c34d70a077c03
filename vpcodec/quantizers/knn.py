"""Nearest neighbours among a set of points, in chunks that fit the cache.

Distances are |q|^2 + |p|^2 - 2 q.p relative to the mean of the points, one matrix product per
chunk. If the result is an index, the best few candidates are compared again by |q - p|^2 itself,
which distinguishes close points.
"""

from __future__ import annotations

import random

import torch

CHUNK = 1 << 20  # distances at a time: 4 MB, which fit the cache of a CPU
CUDA_CHUNK = 1 << 26  # fewer, larger kernels
TILE = 1 << 14  # points at a time, so that a chunk has many queries
TINY = 1e-12  # smallest distance, in place of zero
SAME = 0.01  # relative to the width of a cell: closer latents count as one
CANDIDATES = 8  # nearest points that are compared again exactly


def nearest(queries: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Index of the nearest point of each query.

    Args:
        queries: (N, D) float32.
        points: (P, D) float32, P at least 1.

    Returns:
        (N,) int64. Exact unless more than 8 points are equally near in float32, that is, within
        1e-7 of the squared distance from the mean of all points; then it is one of them.
    """
    center = points.mean(0)
    points = points - center
    queries = queries - center
    norms = points.square().sum(1)
    if torch.compiler.is_compiling():  # graphs use a single chunk
        return _nearest(queries, points, norms)
    rows = max(1, _chunk(queries) // len(points))
    out = [_nearest(part, points, norms) for part in queries.split(rows) if len(part)]
    return torch.cat(out) if out else torch.zeros(0, dtype=torch.int64, device=queries.device)


def _nearest(queries: torch.Tensor, points: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    with torch.autocast(queries.device.type, enabled=False):
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
        orders: the values of k, each at least 1.
        counted: (P,) bool, which points count; None: all.

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
    tile = max(1, min(TILE, _chunk(queries)))
    for part in queries.split(max(1, _chunk(queries) // max(1, min(tile, len(points))))):
        if len(part) == 0:
            break
        best = part.new_full((len(part), 0), torch.inf)
        for some, norm in zip(points.split(tile), norms.split(tile)):
            with torch.autocast(queries.device.type, enabled=False):
                scores = torch.addmm(norm, part, some.T, alpha=-2)
            near = scores.topk(min(most, len(some)), largest=False).values
            best = torch.cat([best, near], 1)
            best = best.topk(min(most, best.shape[1]), largest=False).values
        best = torch.nn.functional.pad(best, (0, most - best.shape[1]), value=torch.inf)
        squared = torch.stack([best[:, k - 1] for k in orders], 1) + part.square().sum(
            1, keepdim=True
        )
        rows.append(squared.clamp_(min=0).sqrt_())
    if not rows:
        return tuple(queries.new_zeros(0) for _ in orders)
    return tuple(torch.cat(rows).unbind(1))


def cell_width(points: torch.Tensor, codebook_size: int) -> torch.Tensor:
    """The approximate width of the cells of K codes for (P, D) points: their std over K^(1/D)."""
    spread = points.std(0, correction=0).mean()
    return (spread * codebook_size ** (-1 / points.shape[1])).clamp(min=TINY)


def distinct(points: torch.Tensor, step: float | torch.Tensor) -> torch.Tensor:
    """Which points are neither equal nor almost equal to an earlier one.

    Args:
        points: (P, D) float32.
        step: width of grid cells; one point is kept per cell. Points much closer together than this
            fall into one cell or very few.

    Returns:
        (P,) bool.
    """
    once = _first(_keys(points / step))
    # Points at the border of two cells are in the middle of a cell of a grid moved by half a step.
    keys = torch.where(once, _keys(points / step + 0.5), torch.iinfo(torch.int64).max)
    return once & _first(keys)


def _keys(scaled: torch.Tensor) -> torch.Tensor:
    """(P, D) -> (P,) int64 hash of the unit cell of each point."""
    draw = random.Random(0)
    cells = torch.floor(scaled).long()
    return sum(column * (draw.getrandbits(63) | 1) for column in cells.unbind(1))  # wraps around


def _first(keys: torch.Tensor) -> torch.Tensor:
    """(P,) keys -> (P,) bool, whether no earlier key is equal."""
    keys, order = torch.sort(keys, stable=True)
    first = torch.ones_like(keys, dtype=torch.bool)
    first[1:] = keys[1:] != keys[:-1]
    return torch.empty_like(first).scatter_(0, order, first)


def _chunk(queries: torch.Tensor) -> int:
    return CUDA_CHUNK if queries.is_cuda else CHUNK
