"""Recipes of audio codecs: the sections of an `AudioRecipe`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Tag, model_validator

from ..config import AudioConfig, NotNegative, Positive, Share, Strict, by_type
from .base import (
    Data,
    Discriminator,
    Evaluation,
    HuggingFaceCorpus,
    Losses,
    Recipe,
    Weight,
    one_or_more,
    path_or_mapping,
)

Decibels = Annotated[float, Field(ge=-120, le=120)]
Range = tuple[Decibels, Decibels]
WHISPER_SECONDS = 30.0  # longest clip that its encoder has positions for


class AudioCorpus(Strict):
    """Audio files of any format, sample rate and number of channels that libsndfile reads."""

    type: Literal["audio"] = "audio"
    path: str = Field(
        min_length=1,
        description="A folder (searched recursively), a glob such as `speech/**/*.flac`, or a "
        "manifest: .txt with a path per line, or .tsv, .csv, .jsonl with a column `path` and, if "
        "known, `seconds` and `offset`; paths are relative to the manifest.",
    )
    weight: Weight = Field(1.0, description="Share of the crops, relative to other corpora.")


class LibriTTSCorpus(Strict):
    """The LibriTTS corpus (Zen et al. 2019, CC BY 4.0)."""

    type: Literal["libritts"] = "libritts"
    path: str = Field("data", description="Folder that contains, or will contain, `LibriTTS/`.")
    subsets: tuple[
        Literal[
            "dev-clean",
            "dev-other",
            "test-clean",
            "test-other",
            "train-clean-100",
            "train-clean-360",
            "train-other-500",
        ],
        ...,
    ] = Field(("train-clean-100", "train-clean-360"), min_length=1, description="Subsets to use.")
    download: bool = Field(False, description="Download missing subsets (through torchaudio).")
    weight: Weight = Field(1.0, description="Share of the crops, relative to other corpora.")


class HuggingFaceAudio(HuggingFaceCorpus):
    """A dataset of the Hugging Face Hub, streamed; needs the package `datasets`."""

    path: str = Field(
        min_length=1, description="Name on the Hub, such as `mozilla-foundation/common_voice_17_0`."
    )
    column: str = Field("audio", description="Column of the audio.")


FilesConfig = Annotated[
    Annotated[AudioCorpus, Tag("audio")] | Annotated[LibriTTSCorpus, Tag("libritts")],
    by_type("audio", "audio", "libritts"),
    BeforeValidator(path_or_mapping),
]
CorpusConfig = Annotated[
    Annotated[AudioCorpus, Tag("audio")]
    | Annotated[LibriTTSCorpus, Tag("libritts")]
    | Annotated[HuggingFaceAudio, Tag("huggingface")],
    by_type("audio", "audio", "libritts", "huggingface"),
    BeforeValidator(path_or_mapping),
]


class DataConfig(Data):
    """Training audio: its sources and augmentation."""

    train: Annotated[tuple[CorpusConfig, ...], BeforeValidator(one_or_more)] = Field(
        (),
        description="Corpora, mixed equally unless they have weights: paths, or mappings as below; "
        "a single one needs no list. null: generated signals.",
    )
    crop_seconds: float = Field(1.536, gt=0, le=600, description="Length of a training crop.")
    gain_db: Range = Field((-12.0, 6.0), description="Random gain, uniform in dB.")
    flip_polarity: bool = Field(True, description="Invert the polarity of half of the crops.")
    noise: Annotated[FilesConfig, BeforeValidator(path_or_mapping)] | None = Field(
        None, description="Corpus of noise to mix in; the mixture is the target."
    )
    noise_rate: Share = Field(
        0.5, description="Share of the crops that get noise, if `noise` is set."
    )
    noise_snr_db: Range = Field(
        (5.0, 30.0), description="Random signal-to-noise ratio, uniform in dB."
    )
    telephone_rate: Share = Field(
        0.0, description="Share of the crops that sound like a telephone: 8 kHz, 8 bits of mu-law."
    )
    cache_mb: NotNegative = Field(
        2048,
        description="Memory for decoded files of up to a minute, MiB, for all workers together; of "
        "other files, only the crop is read.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        for name in ("gain_db", "noise_snr_db"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must be a lower and an upper bound, got {low}, {high}")
        return self


class LossConfig(Losses):
    """Weights of the loss terms of the codec."""

    wave: float = Field(
        1.0, ge=0, description="L1 on the waveform, relative to the mean of |target|."
    )
    stft: float = Field(
        1.0,
        ge=0,
        description="Multi-resolution STFT: relative L1 of magnitudes plus L1 of log10 magnitudes.",
    )
    mel: float = Field(2.0, ge=0, description="Multi-resolution mel: L1 of log10.")
    loudness: float = Field(
        0.0, ge=0, description="Loudness disturbance in critical bands, after PESQ."
    )
    intelligibility: float = Field(
        0.0, ge=0, description="Correlation of band envelopes over 384 ms, after ESTOI."
    )
    energy: bool = Field(
        False,
        description="Spectral energy distance: `wave`, `stft` and `mel` averaged over two outputs "
        "with different noise, minus half their own distance; needs `model.noise_channels`.",
    )
    joint: bool = Field(
        False,
        description="Take the root mean square instead of the mean over the bins of a frame in the "
        "log terms of `stft` and `mel`, so that `energy` matches their joint distribution.",
    )
    perceptual: float = Field(
        0.0,
        ge=0,
        description="Distance between features of a frozen speech encoder; 0: not loaded.",
    )
    perceptual_model: str = Field(
        "openai/whisper-tiny.en",
        description="Whisper model of the perceptual loss, a folder or a name on the Hub; needs "
        "the package `transformers`.",
    )
    fft_sizes: tuple[Annotated[int, Field(ge=4)], ...] = Field(
        (64, 128, 256, 512, 1024, 2048), min_length=1, description="FFT sizes of `stft` and `mel`."
    )
    mel_bands: tuple[NotNegative, ...] = Field(
        (0, 16, 32, 64, 80, 128), description="Mel bands per FFT size; 0: no mel loss at that size."
    )

    @model_validator(mode="after")
    def _consistent(self) -> LossConfig:
        if len(self.fft_sizes) != len(self.mel_bands):
            raise ValueError("mel_bands needs one entry per FFT size")
        if len(set(self.fft_sizes)) < len(self.fft_sizes):
            raise ValueError("fft_sizes has a duplicate entry")
        for size, bands in zip(self.fft_sizes, self.mel_bands):
            if bands > size // 4:
                raise ValueError(f"mel_bands must be at most a quarter of the FFT size: {bands}")
        auditory = self.loudness + self.intelligibility + self.perceptual
        if not self.wave + self.stft + self.mel + auditory:
            raise ValueError("at least one loss of the output needs a weight")
        return self


class DiscriminatorConfig(Discriminator):
    """Multi-period and multi-resolution STFT discriminators, trained against the codec."""

    size: Literal["none", "frame", "small", "full"] = Field(  # type: ignore[assignment]
        "none",
        description="frame: few activations, most of them at frame rate, the cheapest on CPUs; "
        "small: about the size of the codec; full: as in GAN vocoders; none: no adversarial "
        "training.",
    )
    per_step: Positive | None = Field(
        None,
        description="Number of discriminators per step, drawn at random; null: all.",
    )
    periods: tuple[Annotated[int, Field(ge=2)], ...] = Field(
        (2, 3, 5, 7, 11), description="Periods of the multi-period discriminator."
    )
    fft_sizes: tuple[Annotated[int, Field(ge=16)], ...] = Field(
        (2048, 1024, 512), description="FFT sizes of the multi-resolution STFT discriminator."
    )

    @model_validator(mode="after")
    def _consistent(self) -> DiscriminatorConfig:
        if self.size != "none" and not (self.periods or self.fft_sizes):
            raise ValueError("a discriminator needs periods or fft_sizes")
        if self.size == "frame" and any(size % 32 for size in self.fft_sizes):
            raise ValueError("with size frame, fft_sizes must be multiples of 32")
        return self


class EvalConfig(Evaluation):
    """Quality on held-out audio during training."""

    data: Annotated[FilesConfig, BeforeValidator(path_or_mapping)] | None = Field(
        None, description="Corpus of held-out audio, as in `data`; null: no evaluation."
    )
    max_seconds: float = Field(
        15.0, ge=0.5, le=600, description="Length of the beginning of each file that is used."
    )
    metrics: tuple[Literal["distillmos", "dnsmos_p808", "dnsmos_sig", "estoi"], ...] = Field(
        (),
        description="Metrics in addition to pesq_wb, stoi, mel_distance and si_sdr; distillmos "
        "needs the package of that name.",
    )
    best: Literal["pesq_wb", "stoi", "mel_distance", "si_sdr", "distillmos", "dnsmos_p808"] = Field(
        "mel_distance", description="Metric by which the best averaged weights are selected."
    )


class AudioRecipe(Recipe):
    """The recipe of an audio codec."""

    model: AudioConfig
    data: DataConfig = Field(default_factory=DataConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    discriminator: DiscriminatorConfig = Field(default_factory=DiscriminatorConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)

    @model_validator(mode="before")
    @classmethod
    def _fetch_held_out_data_too(cls, data: Any) -> Any:
        """Missing subsets of LibriTTS to evaluate on are downloaded where those to train on are."""
        held_out = (data.get("eval") or {}).get("data") if isinstance(data, dict) else None
        if not isinstance(held_out, dict) or held_out.get("type") != "libritts":
            return data
        train = (data.get("data") or {}).get("train")
        corpora = train if isinstance(train, list) else [train]
        fetch = any(isinstance(x, dict) and x.get("download") is True for x in corpora)
        if not fetch or "download" in held_out:
            return data
        return data | {"eval": data["eval"] | {"data": held_out | {"download": True}}}

    @model_validator(mode="after")
    def _crops_fill_the_windows(self) -> AudioRecipe:
        crop = int(self.data.crop_seconds * self.model.sample_rate)
        crop -= self.model.decoder_delay * self.model.hop_length
        if crop <= max(self.loss.fft_sizes) // 2:
            raise ValueError("data.crop_seconds is too short for the largest of loss.fft_sizes")
        if self.loss.energy and not self.model.noise_channels:
            raise ValueError("loss.energy needs model.noise_channels")
        seconds = self.data.crop_seconds
        if self.loss.perceptual and seconds > WHISPER_SECONDS:
            raise ValueError(
                f"data.crop_seconds is {seconds:g}, but loss.perceptual takes {WHISPER_SECONDS:g}"
            )
        if not self.adversarial:
            return self
        discriminator = self.discriminator
        largest = max(discriminator.fft_sizes, default=0)
        if crop < (largest if discriminator.size == "frame" else largest // 2 + 1):
            raise ValueError(
                "data.crop_seconds is too short for the largest of discriminator.fft_sizes"
            )
        if crop < 2 * max(discriminator.periods, default=0):
            raise ValueError("data.crop_seconds is too short for discriminator.periods")
        return self
