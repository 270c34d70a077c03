from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from vpcodec.quantizers import kmeans as module
from vpcodec.quantizers.kmeans import KMeans, kmeans

pytestmark = pytest.mark.slow

KINDS = ("gaussian", "blobs", "uniform")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def latents(kind: str, n: int, dim: int = 4, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    if kind == "gaussian":
        x = rng.normal(size=(n, dim))
    elif kind == "uniform":
        x = rng.random((n, dim))
    else:
        centers = np.random.default_rng(99).normal(size=(100, dim)) * 3
        x = centers[rng.integers(100, size=n)] + rng.normal(size=(n, dim)) * 0.3
    return torch.from_numpy(x.astype(np.float32))


def true_error(x: torch.Tensor, centroids: torch.Tensor) -> float:
    parts = [
        (part[:, None] - centroids.double()).square().sum(-1).amin(1)
        for part in x.double().split(2048)
    ]
    return torch.cat(parts).mean().item()


def own_nearest(centroids: torch.Tensor) -> bool:
    distances = torch.cdist(
        centroids.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    return torch.equal(distances.argmin(1), torch.arange(len(centroids)))


def same(first: KMeans, second: KMeans) -> bool:
    return (
        torch.equal(first.centroids, second.centroids)
        and torch.equal(first.counts, second.counts)
        and first.error == second.error
        and first.iterations == second.iterations
    )


@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_gives_one_codebook(kind):
    x = latents(kind, 4000)
    assert same(kmeans(x, 64, seed=3), kmeans(x, 64, seed=3))
    assert not torch.equal(kmeans(x, 64, seed=3).centroids, kmeans(x, 64, seed=4).centroids)


def test_the_global_seed_neither_matters_nor_changes():
    x = latents("gaussian", 2000)
    torch.manual_seed(1)
    first, drawn = kmeans(x, 32), torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), drawn)
    assert same(kmeans(x, 32), first)


@pytest.mark.parametrize("size", [16, 100])
def test_the_number_of_threads_does_not_matter(size):
    x = latents("blobs", 6000)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(kmeans(x, size, max_iterations=10))
    assert torch.equal(found[0].centroids, found[1].centroids)
    assert torch.equal(found[0].counts, found[1].counts)
    assert found[0].error == pytest.approx(found[1].error, rel=1e-6)


def test_the_order_of_latents_in_a_stream_of_one_pass_does_not_change_the_sums():
    x = latents("blobs", 3000)
    start = x[:50].clone()
    generator = torch.Generator()
    moved, counts, _ = module._lloyd([x], start, x, generator)
    again, same_counts, _ = module._lloyd([x.flip(0)[:1000], x.flip(0)[1000:]], start, x, generator)
    assert torch.equal(moved, again) and torch.equal(counts, same_counts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [64, 256, 1024])
def test_as_good_as_sklearn(kind, size):
    cluster = pytest.importorskip("sklearn.cluster", reason="needs scikit-learn to compare with")
    x = latents(kind, max(16 * size, 8192))
    reference = cluster.KMeans(size, n_init=1, random_state=0).fit(x.numpy())
    theirs = true_error(x, torch.from_numpy(reference.cluster_centers_))
    assert true_error(x, kmeans(x, size).centroids) <= 1.02 * theirs


@pytest.mark.parametrize("kind, limit", [*((kind, 100) for kind in KINDS), ("gaussian", 3)])
def test_the_error_is_that_of_the_centroids(kind, limit):
    x = latents(kind, 5000)
    found = kmeans(x, 64, max_iterations=limit)
    assert found.iterations <= limit
    assert found.error == pytest.approx(true_error(x, found.centroids), rel=1e-5)


def test_the_error_of_a_stream_is_that_of_the_centroids():
    x = latents("gaussian", 12_000)
    found = kmeans(list(x.split(1000)), 16)
    assert found.error == pytest.approx(true_error(x, found.centroids), rel=1e-5)


@pytest.mark.parametrize("limit", [3, 100])
def test_counts_are_those_of_the_cells(limit):
    x = latents("blobs", 5000)
    found = kmeans(x, 64, max_iterations=limit)
    distances = torch.cdist(
        x.double(), found.centroids.double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    assert found.counts.dtype == torch.int64
    assert torch.equal(found.counts, torch.bincount(distances.argmin(1), minlength=64))


def test_a_single_code_is_the_mean():
    x = latents("gaussian", 1000) + 3
    found = kmeans(x, 1)
    torch.testing.assert_close(found.centroids, x.mean(0, keepdim=True))
    assert found.error == pytest.approx(x.var(0, correction=0).sum().item(), rel=1e-4)


def test_as_many_codes_as_latents_leave_no_error():
    x = latents("gaussian", 40)
    found = kmeans(x, 40)
    assert found.error == pytest.approx(0, abs=1e-9)
    assert found.counts.tolist() == [1] * 40
    torch.testing.assert_close(
        found.centroids[found.centroids[:, 0].argsort()], x[x[:, 0].argsort()], atol=1e-6, rtol=0
    )


def test_repeated_latents_do_not_repeat_codes():
    x = latents("gaussian", 60).repeat(50, 1)
    x = torch.cat([torch.zeros(5000, 4), x])
    found = kmeans(x, 61)
    assert len(torch.unique(found.centroids, dim=0)) == 61
    assert own_nearest(found.centroids)
    assert found.error == pytest.approx(0, abs=1e-6)


def test_empty_clusters_move_to_latents(monkeypatch):
    x = latents("gaussian", 4000)
    plus_plus = module._plus_plus

    def far_away(sample, size, generator):
        codes = plus_plus(sample, size, generator)
        codes[:20] = 1e3 + torch.arange(20)[:, None]
        return codes

    good = kmeans(x, 64)
    monkeypatch.setattr(module, "_plus_plus", far_away)
    found = kmeans(x, 64)
    assert found.centroids.abs().max() <= x.abs().max()
    assert (found.counts > 0).all()
    assert len(torch.unique(found.centroids, dim=0)) == 64
    assert own_nearest(found.centroids)
    assert found.error < 1.1 * good.error


@pytest.mark.parametrize("limit", [1, 2])
def test_no_cluster_stays_empty_when_passes_run_out(monkeypatch, limit):
    x = latents("gaussian", 2000)
    monkeypatch.setattr(
        module, "_plus_plus", lambda sample, size, generator: sample[:1].repeat(size, 1)
    )
    found = kmeans(x, 16, max_iterations=limit)
    assert len(torch.unique(found.centroids, dim=0)) == 16
    assert own_nearest(found.centroids)


@pytest.mark.parametrize("kind", KINDS)
def test_every_centroid_is_its_own_nearest(kind):
    found = kmeans(latents(kind, 8000, dim=3), 512)
    assert found.centroids.shape == (512, 3) and found.centroids.dtype == torch.float32
    assert len(torch.unique(found.centroids, dim=0)) == 512
    assert own_nearest(found.centroids)


@pytest.mark.parametrize("stream", ["list", "loader", "generator"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_does_as_well_as_memory(kind, stream):
    x = latents(kind, 20_000)
    order = torch.Generator().manual_seed(0)  # else it hangs on the tests that ran before
    batches = {
        "list": list(x.split(999)),
        "loader": torch.utils.data.DataLoader(x, batch_size=700, shuffle=True, generator=order),
        "generator": (part for part in x.split(999)),
    }[stream]
    in_memory = true_error(x, kmeans(x, 32).centroids)
    assert true_error(x, kmeans(batches, 32).centroids) <= 1.03 * in_memory


def test_a_sorted_stream_is_sampled_evenly():
    x = latents("gaussian", 40_000)
    x = x[x[:, 0].argsort()]
    sample = module._reservoir(x.split(500), 4000, torch.Generator().manual_seed(0))
    ranks = torch.searchsorted(x[:, 0].contiguous(), sample[:, 0].contiguous()).sort().values
    assert len(sample) == 4000 == len(torch.unique(ranks))
    assert (ranks / 40_000 - torch.linspace(0, 1, 4000)).abs().max() < 0.03


def test_one_seed_gives_one_codebook_of_a_stream():
    x = latents("blobs", 10_000)
    batches = list(x.split(800))
    first = kmeans(batches, 32, seed=1)
    assert same(first, kmeans(batches, 32, seed=1))
    assert not torch.equal(first.centroids, kmeans(batches, 32, seed=2).centroids)
    once = [kmeans((part for part in batches), 32, seed=1) for _ in range(2)]
    assert same(*once)


def test_a_stream_may_have_any_leading_shape_and_type():
    x = latents("uniform", 6000).double()
    shaped = [part.reshape(2, 50, 10, 4) for part in x.split(1000)]
    assert same(kmeans(shaped, 8), kmeans(list(x.float().split(1000)), 8))


def test_a_re_iterable_stream_is_used_to_the_end():
    passes = []

    class Stream:
        def __iter__(self) -> Iterator[torch.Tensor]:
            passes.append(0)
            for part in latents("gaussian", 8000).split(1000):
                passes[-1] += 1
                yield part

    found = kmeans(Stream(), 16, stream_passes=3)
    assert found.counts.sum() == 8000
    assert 2 <= passes.count(8) <= 4


def test_a_stream_keeps_no_more_than_its_sample():
    size, batch = 64 * 8, 200
    rows = []

    def stream() -> Iterator[torch.Tensor]:
        for i in range(60):
            if i % 6 == 5:
                held = {
                    item.data_ptr(): len(item)
                    for item in gc.get_objects()
                    if type(item) is torch.Tensor and item.ndim == 2 and item.shape[1] == 13
                }
                rows.append(sum(held.values()))
            yield latents("gaussian", batch, dim=13, seed=i)

    kmeans(stream(), 8)
    assert size <= max(rows) <= 2 * size + 2 * batch


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "x, size, named",
    [
        (torch.zeros(5, 4), 6, "5.*6"),
        (torch.zeros(0, 4), 3, "0.*3"),
        (torch.zeros(500, 4), 3, "1 .*3"),
        (torch.arange(5.0).repeat(40)[:, None], 8, "5 .*8"),
        (torch.zeros(500, 4), 0, "0"),
        (torch.zeros(500, 4), -2, "-2"),
        (torch.tensor([[1.0], [float("nan")], [2.0]]), 2, "nan"),
        (torch.tensor([[1.0], [float("-inf")], [2.0]]), 2, "-inf"),
    ],
)
def test_what_cannot_be_clustered_is_refused_and_named(x, size, named, stream):
    with pytest.raises(ValueError, match=named):
        kmeans(list(x.split(2)) if stream else x, size)


def test_an_empty_stream_is_refused():
    for stream in ([], iter([])):
        with pytest.raises(ValueError, match="no latents"):
            kmeans(stream, 4)


def test_no_passes_are_refused():
    with pytest.raises(ValueError, match="0"):
        kmeans(latents("gaussian", 100), 4, max_iterations=0)


@pytest.mark.parametrize("stream", [False, True])
def test_progress_is_told_pass_by_pass(stream):
    x = latents("gaussian", 4000)
    calls = []
    data = list(x.split(500)) if stream else x
    found = kmeans(data, 32, progress=lambda *call: calls.append(call))
    most = 105 if stream else 100
    assert calls == [("k-means", i + 1, most) for i in range(found.iterations)]


def test_the_error_falls_pass_by_pass():
    x = latents("gaussian", 4000)
    errors = [kmeans(x, 32, max_iterations=n).error for n in range(1, 12)]
    assert errors[-1] < 0.95 * errors[0]
    assert all(later <= earlier for earlier, later in zip(errors, errors[1:]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_offset_does_no_harm(kind):
    x = latents(kind, 8192)
    shifted = x + 1000
    plain, found = kmeans(x, 128), kmeans(shifted, 128)
    assert true_error(shifted, found.centroids) == pytest.approx(plain.error, rel=0.02)
    assert found.error == pytest.approx(true_error(shifted, found.centroids), rel=1e-3)
    assert own_nearest(found.centroids)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_scale_does_not_matter(scale):
    x = latents("blobs", 4096)
    plain, found = kmeans(x, 64), kmeans(x * scale, 64)
    assert found.error / scale**2 == pytest.approx(plain.error, rel=0.02)


def test_one_latent_far_out_does_no_harm():
    x = torch.cat([latents("gaussian", 4096), torch.full((1, 4), 1e4)])
    found = kmeans(x, 64)
    assert found.error == pytest.approx(true_error(x, found.centroids), rel=1e-3)
    assert found.error < 1.1 * kmeans(x[:-1], 64).error
