"""Metrics of decoded speech by networks from the Hugging Face Hub: optional, off by default.

Each takes two clips, the reference first, works at 16 kHz on the CPU in float32, and returns one
value in a tuple, NaN where it is undefined. Clips of more than 30 s are cut into equal parts of at
most 30 s, both at the same places. Networks are fetched when they are first needed, each at a fixed
revision, and kept for the process; HF_HOME and HF_HUB_OFFLINE are honoured. Only formats that
cannot carry code are
read: safetensors, ONNX and JSON. All raise MetricError, with one line, if a network cannot be had.

Only the word error rate needs torch, for Whisper; the others run in ONNX Runtime.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np

from .audio import is_silent
from .base import Clip, Metric, MetricError, registered

HUB = "the Hugging Face Hub"

# Folders, or owner/name@revision on the Hub.
ASR_MODEL = "openai/whisper-base@e37978b90ca9030d5170a5c07aadb050351a65bb"
ASR_VARIABLE = "VPCODEC_ASR_MODEL"  # environment variable: another Whisper instead
ASR_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
)
SPEAKER_MODEL = "Xenova/wavlm-base-plus-sv@839012c1abfd543d1f5178201a444706e85d3b07"
UTMOS_MODEL = "TigreGotico/utmos-onnx@ff41b8f440cb12ecda18261f9ff7326d058275ce"
UTMOS_SHA256 = "ece7ddb0999d0f12ffe8d7586b3618b8b6fa89269b5152288e4440d686409f69"
RATE = 16_000  # Hz
PART_SECONDS = 30  # at most; Whisper's window
MIN_SECONDS = 0.5  # below this the networks have too little to judge

# Thai, Lao, Burmese, Khmer, kana and Chinese characters: written without spaces
_UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff"
    "\U00020000-\U0003ffff])"
)


@registered(
    Metric(
        name="utmos",
        label="UTMOS",
        unit="MOS",
        better="higher",
        modality="audio",
        source="Saeki et al. 2022",
        rate=16_000,
        needs_reference=False,
        default=False,
    ),
)
def utmos(reference: Clip, degraded: Clip) -> tuple[float]:
    """UTMOS (Saeki et al. 2022, strong learner), about 1 to 5.

    It predicts how listeners of English speech rate the naturalness of the degraded clip; the
    reference is not used. NaN below 0.5 s.
    """
    if len(degraded.samples) < MIN_SECONDS * degraded.rate:
        return (math.nan,)
    session = _session("utmos", UTMOS_MODEL, "utmos22_strong.onnx", UTMOS_SHA256)
    values = [session.run(["mos"], {"wave": part[None]})[0] for part in _parts(degraded)]
    return (float(np.mean(values)),)


@registered(
    Metric(
        name="wer",
        label="WER",
        unit="",
        better="lower",
        modality="audio",
        source="transcript against that of the reference",
        rate=16_000,
        packages=("torch", "transformers"),
        install="pip install torch transformers",
        default=False,
    ),
)
def wer(reference: Clip, degraded: Clip) -> tuple[float]:
    """Word error rate between Whisper's transcripts of both clips.

    The language is that which Whisper detects in the reference. NaN if it hears no word there.

    openai/whisper-base, or what VPCODEC_ASR_MODEL names: a folder, or owner/name[@revision].
    """
    model = asr_model()
    recognizer = _recognizer(model)
    expected, language = reference.get(("transcript", model), lambda: recognizer.hear(reference))
    if not expected:
        return (math.nan,)
    return (word_error_rate(expected, recognizer.hear(degraded, language)[0]),)


@registered(
    Metric(
        name="speaker_similarity",
        label="Speaker similarity",
        unit="",
        better="higher",
        modality="audio",
        source="cosine of speaker embeddings",
        rate=16_000,
        default=False,
    ),
)
def speaker_similarity(reference: Clip, degraded: Clip) -> tuple[float]:
    """Cosine similarity of the x-vectors of both clips, from -1 to 1.

    The network is microsoft/wavlm-base-plus-sv; its authors take 0.86 and more for the same
    speaker. NaN below 0.5 s, and if either clip is silent.
    """
    if not (_is_heard(reference) and _is_heard(degraded)):
        return (math.nan,)
    expected = reference.get(("speaker", SPEAKER_MODEL), lambda: _x_vector(reference))
    return (float(expected @ _x_vector(degraded)),)


def asr_model() -> str:
    """The speech recogniser: a folder, or owner/name[@revision] on the Hub."""
    return os.environ.get(ASR_VARIABLE) or ASR_MODEL


def word_error_rate(reference: list[str], hypothesis: list[str]) -> float:
    """Substitutions, insertions and deletions per word of the reference; NaN if it has none."""
    if not reference:
        return math.nan
    row = list(range(len(hypothesis) + 1))
    for i, expected in enumerate(reference, 1):
        corner, row[0] = row[0], i
        for j, word in enumerate(hypothesis, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (word != expected))
    return row[-1] / len(reference)


def split_words(text: str) -> list[str]:
    """Words in NFKC and lower case, without punctuation and symbols.

    In scripts without spaces, each character is a word.
    """
    text = unicodedata.normalize("NFKC", text).lower().replace("'", "").replace("\u2019", "")
    kept = (c if unicodedata.category(c)[0] in "LMN" else " " for c in text)
    return _UNSPACED.sub(r" \1 ", "".join(kept)).split()


class _Recognizer:
    """Whisper, greedy.

    Args:
        model: folder, or owner/name[@revision] on the Hub.
    """

    def __init__(self, model: str) -> None:
        with _needed("wer", model):
            import torch
            from transformers import WhisperForConditionalGeneration, WhisperProcessor
            from transformers.utils import logging

            logging.set_verbosity_error()  # its warnings are for programmers
            folder = [_fetch(model, name) for name in ASR_FILES][0].parent
            self.processor = WhisperProcessor.from_pretrained(folder)
            self.network = WhisperForConditionalGeneration.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32
            ).eval()
        self.inference_mode = torch.inference_mode

    def hear(self, clip: Clip, language: str | None = None) -> tuple[list[str], str | None]:
        """Transcribe a clip.

        Args:
            clip: the speech.
            language: such as "<|en|>"; None: multilingual models detect it at the beginning.

        Returns:
            The words, none for silence; and the language.
        """
        if is_silent(clip.samples):
            return [], language
        several = getattr(self.network.generation_config, "is_multilingual", False)
        words = []
        for part in _parts(clip):
            inputs = self.processor(
                part, sampling_rate=RATE, return_tensors="pt", return_attention_mask=True
            )
            with self.inference_mode():
                if several and not language:
                    (found,) = self.network.detect_language(inputs.input_features)
                    language = self.processor.tokenizer.convert_ids_to_tokens(int(found))
                chosen = {"language": language, "task": "transcribe"} if language else {}
                (tokens,) = self.network.generate(**inputs, do_sample=False, num_beams=1, **chosen)
            words += split_words(self.processor.decode(tokens, skip_special_tokens=True))
        return words, language


@lru_cache(maxsize=1)
def _recognizer(model: str) -> _Recognizer:
    return _Recognizer(model)


def _x_vector(clip: Clip) -> np.ndarray:
    """The normalised mean x-vector over the parts, (512,) float64."""
    session = _session("speaker_similarity", SPEAKER_MODEL, "onnx/model.onnx", None)
    vectors = []
    for part in _parts(clip):
        if _normalizes(SPEAKER_MODEL):
            part = (part - part.mean()) / np.sqrt(part.var() + 1e-7)
        (vector,) = session.run(["embeddings"], {"input_values": part[None]})[0].astype(np.float64)
        vectors.append(vector / np.linalg.norm(vector))
    mean = np.mean(vectors, 0)
    return mean / np.linalg.norm(mean)


@lru_cache(maxsize=1)
def _normalizes(model: str) -> bool:
    """Whether the network expects signals with mean 0 and variance 1."""
    with _needed("speaker_similarity", model):
        return json.loads(_fetch(model, "preprocessor_config.json").read_text())["do_normalize"]


@lru_cache(maxsize=2)
def _session(metric: str, model: str, name: str, sha256: str | None):
    """An ONNX Runtime session of a file, which is checked against its hash if that is known."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    with _needed(metric, model):
        path = _fetch(model, name)
        with open(path, "rb") as file:
            if sha256 and hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise MetricError(f"{name} is damaged or changed (SHA-256 differs)")
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _fetch(model: str, name: str) -> Path:
    """A file of a model, from a folder or the Hub.

    Raises:
        MetricError: there is no such file, or it cannot be fetched.
    """
    if Path(model).is_dir():
        path = Path(model) / name
        if not path.is_file():
            raise MetricError(f"{name}: no such file")
        return path
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # or it reports each of its attempts
    repo, _, revision = model.partition("@")
    try:
        return Path(hf_hub_download(repo, name, revision=revision or None))
    except Exception as error:  # its own errors, and those of the HTTP client underneath
        raise MetricError(f"{name}: {_reason(error)}") from None


@contextmanager
def _needed(metric: str, model: str) -> Iterator[None]:
    """Turn any error into a MetricError, one line that says what the metric lacks."""
    try:
        yield
    except Exception as error:  # of many kinds: missing packages, transformers, ONNX Runtime
        place = model if Path(model).is_dir() else f"{model.partition('@')[0]} from {HUB}"
        raise MetricError(f"{metric} needs {place}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0]  # the rest is advice to programmers


def _parts(clip: Clip) -> list[np.ndarray]:
    """The samples at 16 kHz, float32, in equal parts of at most PART_SECONDS."""
    samples = clip.at(RATE).astype(np.float32, copy=False)
    return np.array_split(samples, max(1, -(-len(samples) // (PART_SECONDS * RATE))))


def _is_heard(clip: Clip) -> bool:
    return len(clip.samples) >= MIN_SECONDS * clip.rate and not is_silent(clip.samples)
