"""How a model is trained: `Recipe`, the contents of a YAML file.

Every field is documented here; docs/recipes.md is made of it. Unknown keys, wrong types and
combinations that cannot work are refused with the path of the field.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Tag, ValidationError, model_validator

from .config import (
    ConfigError,
    ModelConfig,
    NotNegative,
    Positive,
    Share,
    Strict,
    by_type,
    explain,
)

Weight = Annotated[float, Field(ge=1e-6, le=1e6)]
Decibels = Annotated[float, Field(ge=-120, le=120)]
Range = tuple[Decibels, Decibels]
Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = tuple[Beta, Beta]
WHISPER_SECONDS = 30.0  # that its encoder has positions for
NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


class AudioCorpus(Strict):
    """Audio files of any format, rate and number of channels that libsndfile reads."""

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
    path: str = Field("data", description="Folder that holds, or shall hold, `LibriTTS/`.")
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
    ] = Field(("train-clean-100", "train-clean-360"), min_length=1, description="What to use.")
    download: bool = Field(
        False, description="Fetch subsets that are not there (through torchaudio)."
    )
    weight: Weight = Field(1.0, description="Share of the crops, relative to other corpora.")


class HuggingFaceCorpus(Strict):
    """A dataset of the Hugging Face Hub, streamed; needs the package `datasets`."""

    type: Literal["huggingface"] = "huggingface"
    path: str = Field(
        min_length=1, description="Name on the Hub, such as `mozilla-foundation/common_voice_17_0`."
    )
    name: str | None = Field(None, description="Configuration of the dataset, such as `en`.")
    revision: str | None = Field(None, description="Git revision.")
    split: str = Field("train", description="Split.")
    column: str = Field("audio", description="Column of the audio.")
    shuffle_buffer: Positive = Field(1000, description="Items among which the order is random.")
    weight: Weight = Field(1.0, description="Share of the crops, relative to other corpora.")


def _corpus(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def _corpora(value: Any) -> Any:
    if value is None:
        return ()
    return (value,) if isinstance(value, str | dict | Strict) else value


CorpusConfig = Annotated[
    Annotated[AudioCorpus, Tag("audio")]
    | Annotated[LibriTTSCorpus, Tag("libritts")]
    | Annotated[HuggingFaceCorpus, Tag("huggingface")],
    by_type("audio", "audio", "libritts", "huggingface"),
    BeforeValidator(_corpus),
]


class DataConfig(Strict):
    """Where training audio comes from and what becomes of it."""

    train: Annotated[tuple[CorpusConfig, ...], BeforeValidator(_corpora)] = Field(
        (),
        description="Corpora, mixed equally unless they have weights: paths, or mappings as below; "
        "one alone needs no list. None: generated signals.",
    )
    crop_seconds: float = Field(1.536, gt=0, le=600, description="Length of a training crop.")
    batch_size: Positive = Field(8, description="Crops per process and (partial) step.")
    gain_db: Range = Field((-12.0, 6.0), description="Random gain, uniform in dB.")
    flip_polarity: bool = Field(True, description="Turn the sign of half of the crops.")
    noise: Annotated[CorpusConfig, BeforeValidator(_corpus)] | None = Field(
        None, description="Corpus of noise to mix in; the mixture is what is to be coded."
    )
    noise_rate: Share = Field(0.5, description="Share of the crops that get noise, if there is.")
    noise_snr_db: Range = Field(
        (5.0, 30.0), description="Random ratio of signal to noise, uniform in dB."
    )
    cache_mb: NotNegative = Field(
        2048,
        description="Memory for decoded files of up to a minute, all workers together; files "
        "beyond it, and longer ones, are read where the crop lies.",
    )
    workers: Annotated[int, Field(ge=0, le=256)] | None = Field(
        None,
        description="Worker processes of the loader per training process; 0: threads. None: "
        "threads when training on a CPU, up to 8 processes beside a GPU.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        for name in ("gain_db", "noise_snr_db"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must be a lower and an upper bound, got {low}, {high}")
        if isinstance(self.noise, HuggingFaceCorpus):
            raise ValueError("noise must be files: a streamed dataset has no random access")
        if self.streams and self.workers:
            raise ValueError("workers must be 0 with a streamed dataset, which one process reads")
        return self

    @property
    def streams(self) -> bool:
        """Whether a corpus can only be read in order."""
        return any(isinstance(corpus, HuggingFaceCorpus) for corpus in self.train)


class LossConfig(Strict):
    """Weights of the loss terms of the codec."""

    wave: float = Field(1.0, ge=0, description="L1 on the waveform over the mean of |target|.")
    stft: float = Field(
        1.0, ge=0, description="Multi-resolution STFT: relative L1 of magnitudes plus L1 of log10."
    )
    mel: float = Field(2.0, ge=0, description="Multi-resolution mel: L1 of log10.")
    quantizer: float = Field(
        1.0, ge=0, description="The quantizer's own loss (moments of latents)."
    )
    adversarial: float = Field(
        0.1, ge=0, description="LSGAN: mean of (1 - D)^2; only where there is a discriminator."
    )
    feature: float = Field(
        0.5,
        ge=0,
        description="Feature matching: relative L1 of the discriminators' hidden layers; only "
        "where there is a discriminator.",
    )
    perceptual: float = Field(
        0.0, ge=0, description="Distance of the features of a frozen speech encoder; 0: not loaded."
    )
    perceptual_model: str = Field(
        "openai/whisper-tiny.en",
        description="Whisper model of the perceptual loss: folder or name on the Hub; needs the "
        "package `transformers`.",
    )
    balancer: bool = Field(
        False,
        description="Gradient balancer: weights become shares of the gradient at the output "
        "instead of factors of the losses (all but `quantizer`).",
    )
    balancer_decay: float = Field(
        0.99, ge=0, lt=1, description="Of the balancer's averages of gradient norms."
    )
    fft_sizes: tuple[Annotated[int, Field(ge=4)], ...] = Field(
        (64, 128, 256, 512, 1024, 2048), min_length=1, description="FFT sizes of `stft` and `mel`."
    )
    mel_bands: tuple[NotNegative, ...] = Field(
        (0, 16, 32, 64, 80, 128), description="Mel bands per FFT size; 0: no mel at that size."
    )

    @model_validator(mode="after")
    def _consistent(self) -> LossConfig:
        if len(self.fft_sizes) != len(self.mel_bands):
            raise ValueError("mel_bands needs one entry per FFT size")
        if len(set(self.fft_sizes)) < len(self.fft_sizes):
            raise ValueError("fft_sizes has an entry twice")
        for size, bands in zip(self.fft_sizes, self.mel_bands):
            if bands > size // 4:
                raise ValueError(f"mel_bands must be at most a quarter of the FFT size: {bands}")
        if not self.wave + self.stft + self.mel + self.perceptual:
            raise ValueError("one of wave, stft, mel and perceptual needs a weight")
        return self


class DiscriminatorConfig(Strict):
    """Multi-period and multi-resolution STFT discriminators, trained against the codec."""

    size: Literal["none", "small", "full"] = Field(
        "none",
        description="small: for CPUs, about the size of the codec; full: as GAN vocoders have; "
        "none: no adversarial training.",
    )
    periods: tuple[Annotated[int, Field(ge=2)], ...] = Field(
        (2, 3, 5, 7, 11), description="Periods of the multi-period discriminator."
    )
    fft_sizes: tuple[Annotated[int, Field(ge=16)], ...] = Field(
        (2048, 1024, 512), description="FFT sizes of the multi-resolution STFT discriminator."
    )
    start_step: NotNegative = Field(
        0, description="Steps of the codec alone before adversarial training begins."
    )
    every: Positive = Field(1, description="Update the discriminators at each n-th step.")
    lr: float = Field(3e-4, gt=0, description="Peak learning rate; its schedule is the codec's.")
    betas: Betas = Field((0.8, 0.99), description="Of AdamW.")
    weight_decay: float = Field(1e-5, ge=0, description="Of AdamW.")
    grad_clip: float = Field(10.0, gt=0, description="Largest gradient norm.")

    @model_validator(mode="after")
    def _consistent(self) -> DiscriminatorConfig:
        if self.size != "none" and not (self.periods or self.fft_sizes):
            raise ValueError("a discriminator needs periods or fft_sizes")
        return self


class OptimConfig(Strict):
    """Optimiser of the codec, its schedule, and the averaging of weights."""

    name: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: Muon for weights of linear layers, AdamW for all others."
    )
    lr: float = Field(1e-3, gt=0, description="Peak learning rate.")
    final_lr: float = Field(1e-5, ge=0, description="Learning rate of the last step.")
    schedule: Literal["cosine", "onecycle", "constant"] = Field(
        "cosine",
        description="cosine: linear warm-up, then down to `final_lr`; onecycle: from `lr` / 10 up "
        "to `lr` at `peak_at` and down to `final_lr`, both as half a cosine; constant: warm-up, "
        "then `lr`.",
    )
    warmup_steps: NotNegative = Field(200, description="Of the cosine and constant schedules.")
    peak_at: float = Field(
        0.4, gt=0, lt=1, description="Share of the steps before the peak of onecycle."
    )
    betas: Betas = Field((0.9, 0.98), description="Of AdamW.")
    weight_decay: float = Field(
        0.01, ge=0, description="Of matrices and kernels; not of biases, norms and codes."
    )
    grad_clip: float = Field(1.0, gt=0, description="Largest gradient norm.")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="Of the averaged weights that ship.")

    @model_validator(mode="after")
    def _consistent(self) -> OptimConfig:
        if self.final_lr > self.lr:
            raise ValueError(f"final_lr is {self.final_lr:g}, above lr, {self.lr:g}")
        return self


class EvalConfig(Strict):
    """Quality on held-out audio during training."""

    data: Annotated[CorpusConfig, BeforeValidator(_corpus)] | None = Field(
        None, description="Corpus of held-out audio, as in `data`; none: no evaluation."
    )
    every: Positive = Field(1000, description="Steps between evaluations; there is one at the end.")
    max_files: Positive = Field(64, description="Files used, spread over all.")
    max_seconds: float = Field(
        15.0, ge=0.5, le=600, description="Beginning of each file that is used."
    )
    best: Literal["pesq_wb", "stoi", "mel_distance", "si_sdr"] = Field(
        "mel_distance", description="What decides which averaged weights are kept as the best."
    )

    @model_validator(mode="after")
    def _consistent(self) -> EvalConfig:
        if isinstance(self.data, HuggingFaceCorpus):
            raise ValueError("data must be files: a streamed dataset has no random access")
        return self


class TrainConfig(Strict):
    """How long, how precise, what is written."""

    steps: Positive = Field(1000, description="Updates of the codec.")
    accumulate: Positive = Field(1, description="Batches per update, their gradients averaged.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="Of weights, crops and noise."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU if there is.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="Autocast; auto: bf16 where the machine multiplies it faster, else fp32. fp16 "
        "needs a GPU.",
    )
    compile: bool = Field(False, description="torch.compile for encoder, decoder, discriminators.")
    log_every: Positive = Field(20, description="Steps between rows of metrics.jsonl.")
    save_every: Positive = Field(500, description="Steps between checkpoints.")
    keep: Positive = Field(2, description="Checkpoints kept, the newest.")
    audio_every: Positive = Field(
        1000, description="Steps between audio and spectrograms in TensorBoard."
    )
    trackers: tuple[Literal["trackio", "wandb"], ...] = Field(
        (), description="Also log to these services, through Accelerate; their packages are needed."
    )

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.precision == "fp16" and self.device == "cpu":
            raise ValueError("precision fp16 needs a GPU; bf16 and fp32 work on a CPU")
        return self


class Recipe(Strict):
    """One training: model, data, losses, optimiser and schedule."""

    model: ModelConfig
    data: DataConfig = Field(default_factory=DataConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    discriminator: DiscriminatorConfig = Field(default_factory=DiscriminatorConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)

    @model_validator(mode="after")
    def _crops_fill_the_windows(self) -> Recipe:
        crop = int(self.data.crop_seconds * self.model.sample_rate)
        crop -= self.model.decoder_delay * self.model.hop_length
        if crop <= max(self.loss.fft_sizes) // 2:
            raise ValueError("data.crop_seconds is too short for the largest of loss.fft_sizes")
        seconds = self.data.crop_seconds
        if self.loss.perceptual and seconds > WHISPER_SECONDS:
            raise ValueError(
                f"data.crop_seconds is {seconds:g}, but loss.perceptual takes {WHISPER_SECONDS:g}"
            )
        if not self.adversarial:
            return self
        discriminator = self.discriminator
        if crop <= max(discriminator.fft_sizes, default=0) // 2:
            raise ValueError(
                "data.crop_seconds is too short for the largest of discriminator.fft_sizes"
            )
        if crop < 2 * max(discriminator.periods, default=0):
            raise ValueError("data.crop_seconds is too short for discriminator.periods")
        return self

    @model_validator(mode="after")
    def _adversarial_training_begins(self) -> Recipe:
        if not self.adversarial:
            return self
        if self.discriminator.start_step >= self.train.steps:
            raise ValueError(
                f"discriminator.start_step is {self.discriminator.start_step}, but train.steps "
                f"ends at {self.train.steps}"
            )
        if not self.loss.adversarial + self.loss.feature:
            raise ValueError("a discriminator needs loss.adversarial or loss.feature")
        return self

    @property
    def adversarial(self) -> bool:
        """Whether there is a discriminator."""
        return self.discriminator.size != "none"


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file and apply overrides such as `optim.lr=3e-4` (values are YAML).

    Raises:
        ConfigError: unreadable file, unknown key, wrong type; the message names file and field.
    """
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML file ({str(error).splitlines()[0]})") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of sections")
    for item in overrides or []:
        _override(data, item)
    try:
        return Recipe.model_validate(_numbers(data))
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error)}") from None


def _override(data: dict[str, Any], item: str) -> None:
    """Set one field of a recipe.

    Raises:
        ConfigError: not of the form section.field=value.
    """
    import yaml

    key, eq, value = item.partition("=")
    *parents, leaf = key.split(".")
    if not eq or not all((*parents, leaf)):
        raise ConfigError(f"override {item!r} is not of the form section.field=value")
    node = data
    for part in parents:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {item!r}: {part} is not a section")
    try:
        node[leaf] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"override {item!r}: {value!r} is not a YAML value") from None


def _numbers(data: Any) -> Any:
    """The same with numbers such as 3e-4, which YAML 1.1 reads as text."""
    if isinstance(data, dict):
        return {key: _numbers(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_numbers(value) for value in data]
    if isinstance(data, str) and NUMBER.fullmatch(data):
        return float(data)
    return data
