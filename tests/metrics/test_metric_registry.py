from __future__ import annotations

import json
import math
import subprocess
import sys

import metric_references as references
import numpy as np
import pytest
from paths import RESOURCES, ROOT

from vpcodec.metrics import base
from vpcodec.metrics.base import Clip, Measure, MetricError
from vpcodec.metrics.registry import MEASURES, METRICS, SYSTEM_METRICS, choose

RATE = references.RATE
GOLDEN = json.loads((RESOURCES / "metrics_golden.json").read_text())
AUDIO = [m for m in MEASURES if m.metrics[0].modality == "audio" and m.metrics[0].default]
IMAGES = [m for m in MEASURES if m.metrics[0].modality == "image" and m.metrics[0].default]
NAMES = [measure.name for measure in AUDIO]
IDEALS = {
    "pesq_wb": pytest.approx(4.644, abs=1e-3),
    "pesq_nb": pytest.approx(4.549, abs=1e-3),
    "stoi": pytest.approx(1),
    "estoi": pytest.approx(1),
    "psnr": 100,
    "ssim": pytest.approx(1),
    "ms_ssim": pytest.approx(1),
}
TOLERANCES = {  # absolute; 1e-3 where nothing is named
    "pesq_wb": 0.01,
    "pesq_nb": 0.02,  # of another resampler
    "dnsmos": 0.01,
    "log_spectral_distance": 0.01,
    "mel_cepstral_distortion": 0.01,
    "pitch": 0.5,  # cents; pYIN of other versions may decide another frame
    "si_sdr": 0.01,
}


def run(measure: Measure, x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    for metric in measure.metrics:
        for package in metric.packages:
            pytest.importorskip(package, reason="needs the score extra")
    clips = (Clip(x, RATE), Clip(y, RATE)) if measure.metrics[0].modality == "audio" else (x, y)
    values = measure.function(*clips)
    return dict(zip((metric.name for metric in measure.metrics), values, strict=True))


@pytest.fixture(scope="module")
def clean() -> np.ndarray:
    return references.made_speech()


@pytest.mark.parametrize("measure", AUDIO, ids=NAMES)
def test_values_are_those_of_the_reference_implementations(measure, clean):
    """Which tests/resources/make_metrics_golden.py asked."""
    name = measure.name
    for degradation, degrade in references.DEGRADATIONS.items():
        if degradation == "gain -6 dB" and name == "si_sdr":
            continue  # rounding of float32 alone
        found = run(measure, clean, degrade(clean))
        expected = GOLDEN[degradation][name]
        assert list(found.values()) == pytest.approx(expected, abs=TOLERANCES.get(name, 1e-3))


@pytest.mark.parametrize("measure", AUDIO, ids=NAMES)
def test_a_file_against_itself_is_ideal_and_noise_makes_it_worse(measure, clean):
    same = run(measure, clean, clean.copy())
    few, many = (run(measure, clean, references.with_noise(clean, snr)) for snr in (20, 10))
    for metric in measure.metrics:
        name = metric.name
        if metric.better == "higher":
            assert many[name] < few[name]
        else:
            assert abs(many[name]) > abs(few[name]) > abs(same[name])
        if name in ("si_sdr", "snr"):
            assert 100 < same[name] < math.inf
        elif metric.needs_reference:
            assert same[name] == IDEALS.get(name, 0)
        if metric.needs_reference and metric.better == "higher":
            assert few[name] < same[name]


@pytest.mark.parametrize("measure", IMAGES, ids=lambda measure: measure.name)
def test_an_image_against_itself_is_ideal_and_noise_makes_it_worse(measure, picture):
    image = picture(200, 190)
    noise = np.random.default_rng(0).normal(0, 20, image.shape)
    noisy = (image + noise).clip(0, 255).astype(np.uint8)
    for name, value in run(measure, image, noisy).items():
        ideal = run(measure, image, image.copy())[name]
        assert ideal == IDEALS[name] and value < 0.99 * ideal


def test_names_are_unique_and_tables_have_the_documented_order():
    assert len(METRICS) == sum(len(measure.metrics) for measure in MEASURES)
    assert not set(METRICS) & set(SYSTEM_METRICS)
    assert list(SYSTEM_METRICS) == [
        *("bitrate", "bits_per_pixel", "consistency", "entropy", "perplexity", "cvu")
    ]
    assert [metric.name for metric in choose("audio")[1]] == [
        "pesq_wb", "pesq_nb", "stoi", "estoi", "dnsmos_ovrl", "dnsmos_sig", "dnsmos_bak",
        "dnsmos_p808", "mel_distance", "stft_distance", "log_spectral_distance",
        "mel_cepstral_distortion", "si_sdr", "snr", "f0_rmse", "voicing_error",
        "loudness_difference",
    ]  # fmt: skip
    assert [metric.name for metric in choose("image")[1]] == ["psnr", "ssim", "ms_ssim"]


def test_named_metrics_come_in_the_order_of_tables_with_their_measures():
    measures, metrics, unavailable = choose("audio", ["snr", "dnsmos_bak", "voicing_error", "snr"])
    assert [metric.name for metric in metrics] == ["dnsmos_bak", "snr", "voicing_error"]
    assert [measure.name for measure in measures] == ["dnsmos", "snr", "pitch"]
    assert unavailable == {}
    assert choose("audio", []) == ([], [], {})


def test_a_missing_package_takes_away_its_metrics_and_no_others(monkeypatch):
    monkeypatch.setitem(sys.modules, "speechmos", None)
    monkeypatch.setitem(sys.modules, "lpips", None)
    measures, metrics, unavailable = choose("audio")
    assert list(unavailable) == ["dnsmos_ovrl", "dnsmos_sig", "dnsmos_bak", "dnsmos_p808"]
    assert unavailable["dnsmos_bak"] == (
        "dnsmos_bak needs the package speechmos: pip install 'vpcodec[score]'"
    )
    assert {metric.name for metric in metrics} == {
        metric.name for measure in AUDIO for metric in measure.metrics
    } - set(unavailable)
    assert [metric for measure in measures for metric in measure.metrics] == metrics
    assert METRICS["dnsmos_bak"].missing == ("speechmos",)
    with pytest.raises(MetricError, match="dnsmos_bak needs the package speechmos: pip install"):
        choose("audio", ["snr", "dnsmos_bak"])
    assert "lpips" in choose("image", ["all"])[2]
    with pytest.raises(MetricError, match="lpips needs .*lpips.*: pip install lpips torchvision"):
        choose("image", ["all", "lpips"])


def test_all_are_those_whose_packages_are_there(monkeypatch):
    monkeypatch.setattr(base, "find_spec", lambda name: None if name == "torch" else object())
    _, metrics, unavailable = choose("audio", ["all"])
    assert [metric.name for metric in metrics][-2:] == ["utmos", "speaker_similarity"]
    assert unavailable == {
        "wer": "wer needs the package torch: pip install torch transformers",
        "distillmos": "distillmos needs the package torch: pip install 'vpcodec[train]' distillmos",
        "speaker_similarity_ge2e": "speaker_similarity_ge2e needs the package torch: "
        "pip install 'vpcodec[train]' && pip install --no-deps resemblyzer",
    }
    monkeypatch.setattr(base, "find_spec", lambda name: object())
    assert [metric.name for metric in choose("audio", ["all"])[1]] == [
        metric.name for metric in METRICS.values() if metric.modality == "audio"
    ]
    assert [metric.name for metric in choose("image", ["all"])[1]][-1] == "lpips"


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("audio", "pesk_wb", "no metric 'pesk_wb'; did you mean pesq_wb.*si_sdr"),
        ("audio", "STOI", "no metric 'STOI'; did you mean stoi"),
        ("audio", "xyz", "no metric 'xyz'; there are pesq_wb"),
        ("audio", "psnr", "psnr is not a metric of audio; there are pesq_wb"),
        ("image", "snr", "snr is not a metric of images; there are psnr, ssim, ms_ssim, lpips"),
        ("audio", "cvu", "cvu is always measured, without being named"),
    ],
)
def test_unknown_names_are_refused_with_what_there_is(kind, name, message):
    with pytest.raises(MetricError, match=message) as caught:
        choose(kind, ["all", name])
    assert "\n" not in str(caught.value)


def test_what_is_made_of_a_reference_is_made_once(clean, monkeypatch):
    pytest.importorskip("pyloudnorm", reason="needs the score extra")
    from vpcodec.metrics import prosody

    calls = []
    for module, name in ((base, "resample"), (prosody, "pitch"), (prosody, "loudness")):
        plain = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda *args, name=name, plain=plain: calls.append(name) or plain(*args),
        )
    reference = Clip(clean[:RATE], RATE)
    wanted = {"pesq_nb", "f0_rmse", "loudness_difference"}
    measures = [m for m in MEASURES if wanted & {metric.name for metric in m.metrics}]
    for level in (10, 20):
        degraded = Clip(references.with_noise(clean[:RATE], level), RATE)
        for measure in measures:
            if not any(metric.missing for metric in measure.metrics):
                measure.function(reference, degraded)
    assert calls.count("pitch") == calls.count("loudness") == calls.count("resample") == 3


def test_a_clip_gives_its_own_samples_at_its_own_rate(clean):
    clip = Clip(clean, RATE)
    assert clip.at(RATE) is clean
    assert len(clip.at(8000)) == -(-len(clean) // 2) and clip.at(8000) is clip.at(8000)


def test_listing_and_importing_metrics_loads_no_heavy_package():
    code = (
        "import sys, vpcodec.metrics, vpcodec.metrics.registry as r; "
        "r.choose('audio'); "
        "print(*{'torch', 'librosa', 'scipy', 'pesq', 'pystoi', 'numba', 'speechmos', "
        "'pyloudnorm', 'onnxruntime', 'matplotlib'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


@pytest.mark.slow
def test_no_metric_loads_librosa_or_numba():
    """Numba's cache, written by two processes at once, has crashed a third."""
    code = """if True:
        import sys
        import numpy as np
        from vpcodec.metrics.base import Clip
        from vpcodec.metrics.registry import MEASURES

        noise = np.random.default_rng(0).standard_normal((2, 24_000)).astype(np.float32)
        clips = [Clip(0.1 * x, 16_000) for x in noise]
        images = [(x[:1200].reshape(20, 20, 3) * 50 + 128).astype(np.uint8) for x in noise]
        for measure in MEASURES:
            first = measure.metrics[0]
            networks = {"utmos", "wer", "speaker_similarity", "lpips"}  # are downloaded
            if first.name not in networks and not any(m.missing for m in measure.metrics):
                measure.function(*(images if first.modality == "image" else clips))
                print(measure.name)
        print("loaded:", *{"numba", "librosa", "llvmlite"} & set(sys.modules))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *names, loaded = done.stdout.splitlines()
    assert {"pitch", "mel_cepstral_distortion"} <= set(names)
    assert loaded == "loaded:"


def test_the_metrics_of_training_load_no_torch():
    code = (
        "import sys, numpy, vpcodec.scoring.workers as w; x = numpy.ones(8000); "
        "w.measure(x, x, 16000); print('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_the_documentation_of_metrics_is_up_to_date():
    script = ROOT / "docs" / "make_metrics.py"
    assert subprocess.run([sys.executable, script, "--check"]).returncode == 0


def test_a_new_file_in_the_folder_of_metrics_is_enough(tmp_path):
    (tmp_path / "silly.py").write_text(
        "from vpcodec.metrics.base import Metric, registered\n"
        "@registered(Metric('silly', 'Silly', '', 'zero', 'audio', 'here'))\n"
        "def silly(x, y):\n    return (0.0,)\n"
    )
    code = (
        "import sys, vpcodec.metrics as m; m.__path__.append(sys.argv[1]); "
        "from vpcodec.metrics.registry import choose; print(choose('audio', ['silly'])[0][0].name)"
    )
    command = [sys.executable, "-c", code, tmp_path]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "silly\n"
