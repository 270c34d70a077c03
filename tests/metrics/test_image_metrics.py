from __future__ import annotations

import math
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from vpcodec.metrics import lpips, ms_ssim, psnr, ssim
from vpcodec.metrics.image import BEST_PSNR, scales_that_fit
from vpcodec.scoring.pool import WorkerError
from vpcodec.scoring.workers import IMAGE_METRICS, Workers, measure_image

METRICS = [psnr, ssim, ms_ssim]


def picture(height: int = 100, width: int = 130, channels: int = 3) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width][..., None]
    waves = 50 * np.sin(rows / 7 + np.arange(channels)) + 50 * np.cos(columns / 11)
    texture = np.random.default_rng(0).normal(0, 8, waves.shape)
    return (128 + waves + texture).clip(0, 255).astype(np.uint8)


def noisy(image: np.ndarray, level: float) -> np.ndarray:
    noise = np.random.default_rng(1).normal(0, level, image.shape)
    return (image + noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("metric", METRICS)
def test_more_noise_makes_every_metric_worse(metric):
    x = picture()
    values = [metric(x, noisy(x, level)) for level in (2, 10, 50)]
    assert values == sorted(values, reverse=True) and len(set(values)) == 3


@pytest.mark.parametrize("metric", METRICS)
def test_metrics_are_symmetric_and_best_for_equal_images(metric):
    x, y = picture(), noisy(picture(), 10)
    assert metric(x, y) == pytest.approx(metric(y, x), rel=1e-12)
    assert metric(x, x) == (math.inf if metric is psnr else pytest.approx(1))


@pytest.mark.parametrize("metric", METRICS)
def test_grey_images_may_have_two_or_three_axes(metric):
    x, y = picture(channels=1), noisy(picture(channels=1), 10)
    assert metric(x[..., 0], y[..., 0]) == metric(x, y)
    assert metric(x.repeat(3, 2), y.repeat(3, 2)) == pytest.approx(metric(x, y))


def test_psnr_is_what_its_formula_says():
    x = np.full((20, 30, 3), 100, np.uint8)
    assert psnr(x, x + 1) == pytest.approx(48.1308, abs=1e-4)
    assert psnr(np.zeros_like(x), np.full_like(x, 255)) == 0
    y = x.copy()
    y[0, 0, 0] += 10
    assert psnr(x, y) == pytest.approx(10 * math.log10(255**2 * x.size / 100))


def test_ssim_of_flat_images_compares_their_light():
    x, y = np.full((30, 30), 100, np.uint8), np.full((30, 30), 120, np.uint8)
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 120 + c1) / (100**2 + 120**2 + c1)
    assert ssim(x, y) == pytest.approx(expected)
    assert ms_ssim(x, y) == pytest.approx(expected ** (0.2856 / (0.0448 + 0.2856)))  # two scales


@pytest.mark.parametrize("shape", [(100, 130), (11, 40), (37, 12)])
def test_ssim_and_psnr_are_those_of_scikit_image(shape):
    metrics = pytest.importorskip("skimage.metrics", reason="needs the package scikit-image")
    x = picture(*shape)
    y = noisy(x, 20)
    expected = metrics.structural_similarity(
        x,
        y,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=255,
        channel_axis=2,
    )
    assert ssim(x, y) == pytest.approx(expected, abs=1e-9)
    assert psnr(x, y) == pytest.approx(metrics.peak_signal_noise_ratio(x, y, data_range=255))


def test_ms_ssim_and_ssim_are_those_of_pytorch_msssim():
    torch = pytest.importorskip("torch", reason="needs the train extra")
    package = pytest.importorskip("pytorch_msssim", reason="needs the package pytorch-msssim")
    x = picture(192, 256)
    y = noisy(x, 20)
    pair = [torch.from_numpy(z).permute(2, 0, 1)[None].float() for z in (x, y)]
    assert ms_ssim(x, y) == pytest.approx(package.ms_ssim(*pair, data_range=255).item(), abs=1e-4)
    assert ssim(x, y) == pytest.approx(package.ssim(*pair, data_range=255).item(), abs=1e-4)


def test_ms_ssim_has_as_many_scales_as_fit():
    sides = {1: 1, 11: 1, 21: 1, 22: 2, 43: 2, 44: 3, 88: 4, 175: 4, 176: 5, 5000: 5}
    assert {side: scales_that_fit(side, 9999) for side in sides} == sides
    x = picture(21, 21)
    assert ms_ssim(x, noisy(x, 20)) == pytest.approx(ssim(x, noisy(x, 20)), abs=0.05)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (2, 2), (3, 300), (10, 10), (10, 11)])
def test_small_images_have_values(shape):
    x = picture(*shape)
    for metric in (ssim, ms_ssim):
        assert metric(x, x) == pytest.approx(1)
        assert metric(x, 255 - x) < 0.6
        assert metric(x, noisy(x, 3)) > metric(x, 255 - x)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", [(50, 90, 3), (300, 3, 1), (3, 300, 1)])
def test_values_do_not_depend_on_how_images_are_cut_into_pieces(metric, shape, monkeypatch):
    x = picture(*shape)
    whole = metric(x, noisy(x, 20))
    for piece in (1, 700):
        monkeypatch.setattr("vpcodec.metrics.image._PIECE", piece)
        assert metric(x, noisy(x, 20)) == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("metric", METRICS)
def test_images_that_do_not_fit_are_refused(metric):
    x = picture(20, 20)
    with pytest.raises(ValueError, match="differ in shape"):
        metric(x, x[:-1])
    with pytest.raises(ValueError, match="float64"):
        metric(x, x / 255)
    for shape in ((20,), (2, 20, 20, 3), (0, 20, 3)):
        with pytest.raises(ValueError, match="of shape"):
            metric(np.zeros(shape, np.uint8), np.zeros(shape, np.uint8))


# LPIPS


def test_lpips_without_its_package_names_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match="pip install lpips"):
        lpips(picture(), picture())


def test_lpips_asks_the_package_about_rgb(monkeypatch):
    """A stand-in for the package: the mean absolute difference of its tensors."""

    class Network:
        def __init__(self, net: str, verbose: bool) -> None:
            assert net == "vgg" and not verbose

        def requires_grad_(self, flag: bool) -> Network:
            assert not flag
            return self

        def __call__(self, x: np.ndarray, y: np.ndarray) -> SimpleNamespace:
            assert x.shape[2] == 3
            return np.abs(x - y).mean()

    package = ModuleType("lpips")
    package.LPIPS, package.im2tensor = Network, lambda image: image / 127.5 - 1
    monkeypatch.setitem(sys.modules, "lpips", package)
    x, y = picture(), 255 - picture()
    expected = np.abs(x.astype(float) - y).mean() / 127.5
    assert lpips(x, y, net="vgg") == pytest.approx(expected)
    assert lpips(x[..., :1], x[..., :1], net="vgg") == 0
    assert math.isnan(lpips(x[:63], y[:63], net="vgg"))
    with pytest.raises(ValueError, match="4 channels"):
        lpips(picture(channels=4), picture(channels=4), net="vgg")


# Workers


def test_workers_measure_images_and_audio_in_any_order():
    x, wave = picture(40, 50), np.zeros(4000, np.float32)
    with Workers(1) as workers:
        first = workers.submit_image(x, noisy(x, 10))
        audio = workers.submit(wave, wave, 16_000)
        strips = workers.submit_image(x[:, ::-2], x[:, ::-2])
        assert first.result() == measure_image(x, noisy(x, 10))
        assert audio.result()["mel_distance"] == 0
        assert strips.result() == {"psnr": BEST_PSNR, "ssim": 1.0, "ms_ssim": 1.0}
        assert tuple(first.result()) == IMAGE_METRICS and len(workers.pids) == 1


def test_what_is_no_pair_of_images_is_refused():
    x = picture(20, 20)
    with Workers(1) as workers:
        for pair in ((x, x[:-1]), (x / 255, x / 255), (x[..., 0], x[..., 0])):
            with pytest.raises(ValueError, match="images"):
                workers.submit_image(*pair)
        with pytest.raises(WorkerError, match="no|of shape"):
            workers.submit_image(x[:0], x[:0]).result()
        assert workers.submit_image(x, x).result()["ssim"] == 1
