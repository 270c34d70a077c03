"""Metrics by networks from the Hub, with tiny random ones in their place; nothing is fetched."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest

from vpcodec.metrics import neural
from vpcodec.metrics.base import Clip, MetricError

WORDS = ["Ġone", "Ġtwo", "Ġthree", "Ġfour", "Ġfive"]
SPECIAL = [
    "<|endoftext|>",
    "<|startoftranscript|>",
    "<|en|>",
    "<|ne|>",
    "<|translate|>",
    "<|transcribe|>",
    "<|notimestamps|>",
]


def noise(seed: int, seconds: float = 2, rate: int = 16_000) -> Clip:
    samples = np.random.default_rng(seed).normal(0, 0.1, round(seconds * rate))
    return Clip(samples.astype(np.float32), rate)


def tone(frequency: float, seconds: float = 2, level: float = 0.1) -> Clip:
    """`frequency` in radians per sample."""
    samples = level * np.cos(frequency * np.arange(round(seconds * 16_000)))
    return Clip(samples.astype(np.float32), 16_000)


@pytest.fixture(autouse=True)
def forget() -> None:
    """What other tests have loaded."""
    for cached in (neural._recognizer, neural._session, neural._normalizes):
        cached.cache_clear()


# ---------------------------------------------------------------------------------- words and edits


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (" ... — !? ", []),
        ("Hello, WORLD.", ["hello", "world"]),
        ("Don’t don't well-known", ["dont", "dont", "well", "known"]),
        ("ＡＢＣ ﬁne ½", ["abc", "fine", "1", "2"]),  # full width, a ligature, a fraction
        ("Győr, Żółć; façade", ["győr", "żółć", "façade"]),
        ("cafe\u0301 café", ["café", "café"]),  # composed or not
        ("हिन्दी, नेपाली।", ["हिन्दी", "नेपाली"]),  # vowel signs belong to their word
        ("今天 good。カー", ["今", "天", "good", "カ", "ー"]),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert neural.split_words(text) == words


@pytest.mark.parametrize(
    ("reference", "hypothesis", "rate"),
    [
        ("a b c d", "a b c d", 0),
        ("a b c d", "a x c d", 1 / 4),
        ("a b c d", "a c d", 1 / 4),
        ("a b c d", "a b b c d", 1 / 4),
        ("a b c d", "", 1),
        ("a", "b c d", 3),
        ("a b c d", "b c d a", 2 / 4),
        ("", "a", math.nan),
        ("", "", math.nan),
    ],
)
def test_word_error_rate(reference: str, hypothesis: str, rate: float) -> None:
    value = neural.word_error_rate(reference.split(), hypothesis.split())
    assert value == pytest.approx(rate, nan_ok=True)


def test_word_error_rate_is_that_of_jiwer() -> None:
    jiwer = pytest.importorskip("jiwer", reason="needs jiwer")
    draw = random.Random(0)
    for _ in range(200):
        a, b = (draw.choices("abcd", k=draw.randint(low, 12)) for low in (1, 0))
        expected = jiwer.wer(" ".join(a), " ".join(b))
        assert neural.word_error_rate(a, b) == pytest.approx(expected)


# -------------------------------------------------------------------------------------- transcripts


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Whisper that has never been trained: five words, two languages, float16."""
    torch = pytest.importorskip("torch", reason="needs the train extra")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    ids = {token: number for number, token in enumerate(WORDS + SPECIAL)}
    end, start = ids["<|endoftext|>"], ids["<|startoftranscript|>"]
    special = {"pad_token_id": end, "eos_token_id": end, "decoder_start_token_id": start}
    torch.manual_seed(0)
    network = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=len(ids),
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            max_target_positions=16,
            init_std=0.5,
            suppress_tokens=None,
            begin_suppress_tokens=None,
            bos_token_id=end,
            **special,
        )
    )
    network.generation_config = transformers.GenerationConfig(
        is_multilingual=True,
        lang_to_id={language: ids[language] for language in ("<|en|>", "<|ne|>")},
        task_to_id={task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")},
        no_timestamps_token_id=ids["<|notimestamps|>"],
        suppress_tokens=[ids[token] for token in SPECIAL],
        max_length=12,
        **special,
    )
    folder = tmp_path_factory.mktemp("whisper")
    network.half().save_pretrained(folder)
    tokenizer = transformers.WhisperTokenizer(
        vocab=ids, merges=[], extra_special_tokens=SPECIAL[1:]
    )
    tokenizer.save_pretrained(folder)
    transformers.WhisperFeatureExtractor().save_pretrained(folder)
    return folder


@pytest.fixture
def asr(whisper: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(neural.ASR_VARIABLE, str(whisper))
    return whisper


def test_clips_are_heard(asr: Path) -> None:
    recognizer = neural._recognizer(neural.asr_model())
    heard = [recognizer.hear(clip) for clip in (noise(0), tone(0.05), tone(2.1), noise(0))]
    assert {language for _, language in heard} <= {"<|en|>", "<|ne|>"}
    assert {word for words, _ in heard for word in words} <= {word[1:] for word in WORDS}
    assert len({tuple(words) for words, _ in heard}) == 3 and heard[0] == heard[3]
    assert not recognizer.network.training
    assert str(recognizer.network.dtype) == "torch.float32"  # whatever the file has


def test_a_clip_against_itself_has_no_errors(asr: Path) -> None:
    assert neural.wer(noise(0), noise(0)) == (0.0,)
    assert neural.wer(noise(0), tone(0.05))[0] > 0


def test_the_language_is_that_of_the_reference(asr: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the reference is heard once for any number of systems."""
    calls = []

    def hear(self: neural._Recognizer, clip: Clip, language: str | None = None):
        calls.append((clip, language))
        return ["one", "two"] if clip is reference else ["one"], language or "<|ne|>"

    monkeypatch.setattr(neural._Recognizer, "hear", hear)
    reference, first, second = (noise(seed) for seed in range(3))
    assert [neural.wer(reference, clip) for clip in (first, second)] == [(0.5,), (0.5,)]
    assert calls == [(reference, None), (first, "<|ne|>"), (second, "<|ne|>")]


def test_long_clips_are_heard_in_parts(asr: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recognizer = neural._recognizer(neural.asr_model())
    parts = [noise(0, 1), tone(0.05, 1), tone(2.1, 1)]
    alone = [recognizer.hear(part, "<|en|>")[0] for part in parts]
    monkeypatch.setattr(neural, "PART_SECONDS", 1)
    whole = Clip(np.concatenate([part.samples for part in parts]), 16_000)
    assert recognizer.hear(whole, "<|en|>") == (sum(alone, []), "<|en|>")


def test_silence_has_no_words(asr: Path) -> None:
    silence = Clip(np.zeros(32_000, np.float32), 16_000)
    assert math.isnan(neural.wer(silence, noise(0))[0])
    assert neural.wer(noise(0), silence) == (1.0,)


def test_pickled_weights_are_refused(
    whisper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor opened."""

    class Trap:
        def __reduce__(self) -> tuple[Callable, tuple]:
            return Path.touch, (tmp_path / "sprung",)

    folder = tmp_path / "asr"
    folder.mkdir()
    for file in whisper.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    monkeypatch.setenv(neural.ASR_VARIABLE, str(folder))
    with pytest.raises(MetricError, match=r"^wer needs .*: model\.safetensors: no such") as caught:
        neural.wer(noise(0), noise(0))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "sprung").exists()


# ------------------------------------------------------------------------------------ ONNX networks


def write_network(path: Path, output: str, source: str) -> None:
    """ONNX of float32 (1, T) -> (1, 4): |4 frequencies, of windows of 400|, means over the windows;
    for the output "mos" the mean of these, (1,)."""
    onnx = pytest.importorskip("onnx", reason="needs the train extra")
    from onnx import TensorProto, helper, numpy_helper

    waves = np.cos(np.outer([0.3, 0.7, 1.3, 2.1], np.arange(400)))[:, None].astype(np.float32)
    constants = {"waves": waves, "one": np.array([1]), "last": np.array([2])}
    nodes = [
        helper.make_node("Unsqueeze", [source, "one"], ["signal"]),
        helper.make_node("Conv", ["signal", "waves"], ["filtered"], strides=[320]),
        helper.make_node("Tanh", ["filtered"], ["bent"]),
        helper.make_node("Abs", ["bent"], ["size"]),
        helper.make_node("ReduceMean", ["size", "last"], ["embeddings"], keepdims=0),
        helper.make_node("ReduceMean", ["embeddings", "one"], ["mos"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(source, TensorProto.FLOAT, ["batch", "time"])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)


@pytest.fixture
def speaker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a tiny network for x-vectors."""
    write_network(tmp_path / "onnx" / "model.onnx", "embeddings", "input_values")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    monkeypatch.setattr(neural, "SPEAKER_MODEL", str(tmp_path))
    return tmp_path


def test_speaker_similarity(speaker: Path) -> None:
    (same,), (near,), (far,) = (
        neural.speaker_similarity(tone(0.3), other) for other in (tone(0.3), tone(0.31), tone(2.1))
    )
    assert same == pytest.approx(1, abs=1e-6)
    assert 0 < far < near < same


@pytest.mark.parametrize("normalized", [False, True])
def test_signals_are_normalized_where_the_network_wants_it(speaker: Path, normalized: bool) -> None:
    (speaker / "preprocessor_config.json").write_text(json.dumps({"do_normalize": normalized}))
    clip = noise(0)
    louder = Clip(clip.samples * 8 + 0.2, 16_000)
    (value,) = neural.speaker_similarity(clip, louder)
    assert (value > 1 - 1e-4) == normalized


def test_the_reference_is_embedded_once(speaker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded = []
    embed = neural._x_vector
    monkeypatch.setattr(neural, "_x_vector", lambda clip: embedded.append(clip) or embed(clip))
    reference, first, second = (noise(seed) for seed in range(3))
    neural.speaker_similarity(reference, first)
    neural.speaker_similarity(reference, second)
    assert embedded == [reference, first, second]


@pytest.mark.parametrize("short", [0, 0.1, 0.49])
def test_too_short_or_silent_for_a_speaker(speaker: Path, short: float) -> None:
    silence = Clip(np.zeros(32_000, np.float32), 16_000)
    assert math.isnan(neural.speaker_similarity(tone(0.3, short), tone(0.3, short))[0])
    assert math.isnan(neural.speaker_similarity(silence, tone(0.3))[0])
    assert math.isnan(neural.speaker_similarity(tone(0.3), silence)[0])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub's cache, without network; empty."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv(neural.ASR_VARIABLE, raising=False)
    return tmp_path / "hub"


@pytest.fixture
def mos(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny network in the place of UTMOS: in the cache, in its revision."""
    repo, revision = neural.UTMOS_MODEL.split("@")
    path = cache / f"models--{repo.replace('/', '--')}" / "snapshots" / revision
    write_network(path / "utmos22_strong.onnx", "mos", "wave")
    digest = hashlib.sha256((path / "utmos22_strong.onnx").read_bytes()).hexdigest()
    monkeypatch.setattr(neural, "UTMOS_SHA256", digest)
    return path / "utmos22_strong.onnx"


def test_utmos_is_of_the_degraded_clip(mos: Path) -> None:
    (value,) = neural.utmos(noise(0), tone(0.3))
    assert neural.utmos(tone(2.1), tone(0.3)) == (value,)
    assert neural.utmos(tone(0.3), noise(0)) != (value,)
    assert 0 < value < 1


def test_long_clips_are_judged_in_parts(mos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [noise(0, 1), tone(0.3, 1)]
    alone = [neural.utmos(part, part)[0] for part in parts]
    monkeypatch.setattr(neural, "PART_SECONDS", 1)
    whole = Clip(np.concatenate([part.samples for part in parts]), 16_000)
    assert neural.utmos(whole, whole)[0] == pytest.approx(np.mean(alone), abs=1e-6)


def test_other_rates_are_resampled(mos: Path) -> None:
    clip = Clip(np.repeat(tone(0.05, 1).samples, 3), 48_000)
    assert neural.utmos(clip, clip)[0] == pytest.approx(neural.utmos(clip, tone(0.05, 1))[0], 0.05)


def test_too_short_for_utmos(mos: Path) -> None:
    assert math.isnan(neural.utmos(tone(0.3), tone(0.3, 0.49))[0])
    assert not math.isnan(neural.utmos(tone(0.3), tone(0.3, 0.5))[0])


def test_whisper_comes_from_the_cache(cache: Path, whisper: Path) -> None:
    """In its revision, and of the files that are named."""
    repo, revision = neural.ASR_MODEL.split("@")
    path = cache / f"models--{repo.replace('/', '--')}" / "snapshots" / revision
    path.mkdir(parents=True)
    for name in neural.ASR_FILES:
        (path / name).symlink_to(whisper / name)
    assert neural.wer(noise(0), noise(0)) == (0.0,)
    (path / "model.safetensors").unlink()
    neural._recognizer.cache_clear()
    with pytest.raises(MetricError, match=r"Hub: model\.safetensors: "):
        neural.wer(noise(0), noise(0))


def test_a_changed_network_is_refused(mos: Path) -> None:
    with open(mos, "ab") as file:
        file.write(b"\0")
    with pytest.raises(MetricError, match=r"utmos22_strong\.onnx is damaged or changed"):
        neural.utmos(noise(0), noise(0))


def test_a_file_that_is_no_network_is_refused(speaker: Path) -> None:
    (speaker / "onnx" / "model.onnx").write_bytes(pickle.dumps([1]))
    with pytest.raises(MetricError, match="^speaker_similarity needs ") as caught:
        neural.speaker_similarity(noise(0), noise(0))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("metric", "repo"),
    [
        ("wer", "openai/whisper-base"),
        ("speaker_similarity", "Xenova/wavlm-base-plus-sv"),
        ("utmos", "TigreGotico/utmos-onnx"),
    ],
)
def test_what_is_not_there_is_one_line(cache: Path, metric: str, repo: str) -> None:
    if metric == "wer":
        pytest.importorskip("transformers", reason="needs transformers")
    expected = f"^{metric} needs {repo} from the Hugging Face Hub: .{{20,}}"
    with pytest.raises(MetricError, match=expected) as caught:
        getattr(neural, metric)(noise(0), noise(1))
    assert "\n" not in str(caught.value)
