from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")
spatial = pytest.importorskip("scipy.spatial", reason="needs the dev extra")

from vpcodec.quantizers import VP, knn
from vpcodec.quantizers.knn import distinct, kth_distances, nearest

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distances(queries: torch.Tensor, points: torch.Tensor) -> np.ndarray:
    """(N, P) float64."""
    gaps = queries.double().numpy()[:, None] - points.double().numpy()[None]
    return np.sqrt(np.square(gaps).sum(-1))


def clustered(clusters: int, per_cluster: int, spacing: float) -> torch.Tensor:
    centers = normal(clusters, 1, 3)
    return (centers + spacing * normal(clusters, per_cluster, 3, seed=1)).flatten(0, 1)


@pytest.mark.parametrize("offset", [0, 100])
@pytest.mark.parametrize("number", [1, 3, 700])
@pytest.mark.parametrize("dim", [1, 4])
def test_nearest_is_the_brute_force_argmin(number, dim, offset):
    points, queries = normal(number, dim) + offset, normal(1500, dim, seed=1) + offset
    expected = distances(queries, points)
    found = nearest(queries, points)
    assert found.dtype == torch.int64 and found.shape == (1500,)
    excess = expected[np.arange(1500), found.numpy()] - expected.min(1)
    assert excess.max() < 1e-6 * (1 + offset)
    assert (found.numpy() == expected.argmin(1)).mean() > 0.995


@pytest.mark.parametrize("per_cluster", [2, 4, 8])
@pytest.mark.parametrize("at", ["the points", "beside them"])
def test_nearest_tells_close_points_apart(per_cluster, at):
    points = clustered(256 // per_cluster, per_cluster, 1e-4)
    queries = points if at == "the points" else points + 2e-5 * normal(256, 3, seed=2)
    found = nearest(queries, points).numpy()
    np.testing.assert_array_equal(found, distances(queries, points).argmin(1))


def test_nearest_among_many_close_points_is_as_near_as_float32_can_tell():
    points = clustered(16, 16, 1e-4)
    exact = distances(points, points)
    found = exact[np.arange(256), nearest(points, points).numpy()]
    assert (found**2).max() < 1e-6 * (points.numpy() ** 2).sum(1).max()


def test_nearest_does_not_depend_on_the_chunk(monkeypatch):
    points, queries = normal(50, 3), normal(333, 3, seed=1)
    whole = nearest(queries, points)
    for chunk in (1, 50, 1000):
        monkeypatch.setattr(knn, "CHUNK", chunk)
        assert torch.equal(nearest(queries, points), whole)


def test_nothing_is_near_to_no_queries():
    assert nearest(torch.zeros(0, 3), normal(5, 3)).tolist() == []
    assert [part.tolist() for part in kth_distances(torch.zeros(0, 3), normal(5, 3), (1, 2))] == [
        [],
        [],
    ]


@pytest.mark.parametrize("offset", [0, 100])
@pytest.mark.parametrize("chunk", [64, 1 << 20])
@pytest.mark.parametrize("some_count", [False, True])
def test_kth_distances_are_the_sorted_ones(some_count, chunk, offset, monkeypatch):
    monkeypatch.setattr(knn, "CHUNK", chunk)
    points, queries = normal(300, 3) + offset, normal(40, 3, seed=1) + offset
    counted = torch.arange(300) % 3 == 0 if some_count else None
    expected = np.sort(distances(queries, points[counted] if some_count else points), 1)
    orders = (8, 1, 70, 2, 8)
    found = kth_distances(queries, points, orders, counted=counted)
    assert len(found) == len(orders)
    for order, part in zip(orders, found):
        assert part.dtype == torch.float32
        np.testing.assert_allclose(part, expected[:, order - 1], rtol=1e-4, atol=2e-5)


def test_the_distance_to_a_point_itself_is_next_to_nothing():
    points = normal(2000, 3)
    own, other = kth_distances(points, points, (1, 2))
    assert own.max() < 2e-3
    np.testing.assert_allclose(other, np.sort(distances(points, points), 1)[:, 1], atol=2e-4)


@pytest.mark.parametrize("chunk", [4, 1 << 20])
def test_kth_distances_are_infinite_where_too_few_count(chunk, monkeypatch):
    monkeypatch.setattr(knn, "CHUNK", chunk)
    points, queries = normal(10, 2), normal(6, 2, seed=1)
    counted = torch.arange(10) < 4
    fourth, fifth = kth_distances(queries, points, (4, 5), counted=counted)
    assert fourth.isfinite().all() and fifth.tolist() == [math.inf] * 6
    tenth, eleventh = kth_distances(queries, points, (10, 11))
    assert tenth.isfinite().all() and eleventh.tolist() == [math.inf] * 6


@pytest.mark.parametrize("dim", [1, 3, 5])
def test_points_that_coincide_count_once(dim):
    points = 0.3 + torch.arange(50.0)[:, None].expand(50, dim)
    repeated = points.repeat_interleave(torch.arange(50) % 4 + 1, 0)
    order = torch.randperm(len(repeated), generator=torch.Generator().manual_seed(0))
    kept = repeated[order][distinct(repeated[order], 1e-3)]
    assert torch.equal(kept.sort(0).values, points)


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_points_far_enough_apart_all_count(dim):
    step = 0.01
    ticks = (torch.arange(4000) - 2000) * step * math.sqrt(dim) * 1.001
    line = ticks[:, None].expand(-1, dim) / math.sqrt(dim)
    assert distinct(line, step).all()
    axis = torch.cat([ticks[:, None], torch.zeros(4000, dim - 1)], 1)
    assert distinct(axis, step).all()
    side = round(4000 ** (1 / dim))
    grid = torch.cartesian_prod(*[torch.arange(side) - side / 2] * dim).reshape(-1, dim)
    assert distinct(grid * step * 1.001, step).all()


def test_the_order_of_points_hardly_changes_how_many_count():
    points, step = normal(3000, 2), 0.1
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(0))
    here, there = points[distinct(points, step)], points[order][distinct(points[order], step)]
    assert 700 < len(here) < 1700 and abs(len(here) - len(there)) < 0.05 * len(here)
    for kept in (here, there):
        assert spatial.cKDTree(kept).query(points)[0].max() <= 2 * step * math.sqrt(2)


@pytest.mark.parametrize("law", ["normal", "uniform", "student"])
def test_radii_of_a_subsample_are_those_of_the_whole_queue(law):
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(65_836, 5))
    if law == "uniform":
        draws = rng.uniform(-1, 1, draws.shape)
    if law == "student":
        draws /= np.sqrt(rng.chisquare(3, (len(draws), 1)) / 3)
    latents, queue = torch.from_numpy(draws).float().split([300, 65_536])
    options = {"eta": 1.0, "metropolis": False, "search_size": 8192, "seed": 0}
    quantizer = VP(5, 4096, queue_size=65_536, **options)
    quantizer.push(queue, number=len(queue))
    many = latents.repeat(50, 1)
    length = (quantizer(many).latents - many).double().norm(dim=1).reshape(50, 300)
    found = (2 * length.pow(5).mean(0)).pow(1 / 5)
    exact = spatial.cKDTree(queue).query(latents, [16])[0][:, 0]
    ratio = np.log(found.numpy() / exact)
    assert abs(ratio.mean()) < 0.06 and ratio.std() < 0.15


@pytest.mark.parametrize("at", [0.0, 0.7004])
@pytest.mark.parametrize("dim", [1, 3, 5])
def test_points_almost_at_one_place_count_as_fewer_than_the_eight_neighbors(dim, at):
    points = at + 1e-6 * normal(1000, dim).clamp(-1, 1)
    assert distinct(points, 0.0016).sum() < 8
