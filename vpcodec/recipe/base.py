"""What the recipes of all kinds of models share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ..config import ModelConfig, NotNegative, Positive, Strict
from .quantizers import FSPTrainingConfig, QuantizerTraining, with_training_options

Weight = Annotated[float, Field(ge=1e-6, le=1e6)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = tuple[Beta, Beta]


class HuggingFaceCorpus(Strict):
    """A dataset of the Hugging Face Hub, streamed; needs the package `datasets`."""

    type: Literal["huggingface"] = "huggingface"
    path: str = Field(min_length=1, description="Name on the Hub.")
    name: str | None = Field(None, description="Configuration of the dataset, such as `en`.")
    revision: str | None = Field(None, description="Git revision.")
    split: str = Field("train", description="Split.")
    column: str = Field(description="Column of the data.")
    shuffle_buffer: Positive = Field(1000, description="Items among which the order is random.")
    weight: Weight = Field(1.0, description="Share of the crops, relative to other corpora.")


def path_or_mapping(value: Any) -> Any:
    """A corpus given as a path alone."""
    return {"path": value} if isinstance(value, str) else value


def one_or_more(value: Any) -> Any:
    """Corpora given as one alone, or as none."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str | dict | Strict) else value


class Data(Strict):
    """Where training data come from and what becomes of them."""

    train: tuple[Any, ...] = Field((), description="Corpora, of the types that the kind has.")
    batch_size: Positive = Field(8, description="Crops per process and (partial) step.")
    workers: Annotated[int, Field(ge=0, le=256)] | None = Field(
        None,
        description="Worker processes of the loader per training process; 0: threads. None: "
        "threads when training on a CPU, up to 8 processes beside a GPU.",
    )

    @model_validator(mode="after")
    def _streams_have_no_workers(self) -> Data:
        if self.streams and self.workers:
            raise ValueError("workers must be 0 with a streamed dataset, which one process reads")
        return self

    @property
    def streams(self) -> bool:
        """Whether a corpus can only be read in order."""
        return any(isinstance(corpus, HuggingFaceCorpus) for corpus in self.train)


class Losses(Strict):
    """Weights of the loss terms of the codec."""

    quantizer: float = Field(
        1.0, ge=0, description="The quantizer's own loss (moments of latents)."
    )
    adversarial: float = Field(
        0.1,
        ge=0,
        description="What the discriminators say, see `discriminator.loss`; only where there is a "
        "discriminator.",
    )
    feature: float = Field(
        0.5,
        ge=0,
        description="Feature matching: relative L1 of the discriminators' hidden layers; only "
        "where there is a discriminator.",
    )
    balancer: bool = Field(
        False,
        description="Gradient balancer: weights become shares of the gradient at the output "
        "instead of factors of the losses (all but `quantizer`).",
    )
    balancer_every: Positive = Field(
        1,
        description="Measure the norms of the gradients at every n-th step, which costs a backward "
        "pass through the losses for each of them; between these steps one serves all.",
    )
    balancer_decay: float = Field(
        0.99, ge=0, lt=1, description="Of the balancer's averages of gradient norms."
    )


class Discriminator(Strict):
    """Discriminators that are trained against the codec."""

    size: Literal["none", "small", "full"] = Field(
        "none",
        description="small: for CPUs, about the size of the codec; full: as GAN vocoders have; "
        "none: no adversarial training.",
    )
    start_step: NotNegative = Field(
        0, description="Steps of the codec alone before adversarial training begins."
    )
    loss: Literal["lsgan", "relativistic"] = Field(
        "lsgan",
        description="lsgan: squared distance of the logits from 1 (real) and 0 (decoded); "
        "relativistic: softplus of the difference between the logits of decoded and real.",
    )
    warmup_steps: NotNegative = Field(
        0, description="Steps from `start_step` on in which the discriminators alone are updated."
    )
    penalty: float = Field(
        0.0,
        ge=0,
        description="Weight of a gradient penalty, which keeps the discriminators from running "
        "away from the codec; taken at every fourth of their updates, four times as strong.",
    )
    every: Positive = Field(1, description="Update the discriminators at each n-th step.")
    lr: float = Field(3e-4, gt=0, description="Peak learning rate; its schedule is the codec's.")
    betas: Betas = Field((0.8, 0.99), description="Of AdamW.")
    weight_decay: float = Field(1e-5, ge=0, description="Of AdamW.")
    grad_clip: float = Field(10.0, gt=0, description="Largest gradient norm.")


class Evaluation(Strict):
    """Quality on held-out data during training."""

    every: Positive = Field(1000, description="Steps between evaluations; there is one at the end.")
    max_files: Positive = Field(64, description="Files used, spread over all.")


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
    encoder_lr: float = Field(
        1.0, gt=0, le=10, description="Learning rate of the encoder over that of the rest."
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


class TrainConfig(Strict):
    """How long, how precise, what is written."""

    steps: Positive = Field(1000, description="Updates of the codec.")
    decoder_only: bool = Field(
        False,
        description="Encoder and quantizer stay as `--init-from` has them, and with them the token "
        "space: the decoder learns from real tokens, and reads the token files of the old model.",
    )
    accumulate: Positive = Field(1, description="Batches per update, their gradients averaged.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="Of weights, crops and noise."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU if there is.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="Autocast; auto: bf16 where the machine multiplies it faster and computes the "
        "networks as in fp32, else fp32. fp16 needs a GPU.",
    )
    compile: bool = Field(False, description="torch.compile for encoder, decoder, discriminators.")
    log_every: Positive = Field(20, description="Steps between rows of metrics.jsonl.")
    save_every: Positive = Field(500, description="Steps between checkpoints.")
    keep: Positive = Field(2, description="Checkpoints kept, the newest.")
    show_every: Positive = Field(
        1000, description="Steps between samples in TensorBoard: audio and spectrograms, or images."
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
    quantizer: QuantizerTraining = Field(
        default_factory=FSPTrainingConfig,
        description="How the quantizer is trained; of the type that the model has.",
    )
    data: Data
    loss: Losses
    discriminator: Discriminator
    eval: Evaluation
    optim: OptimConfig = Field(default_factory=OptimConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)

    @model_validator(mode="before")
    @classmethod
    def _with_training_options(cls, data: Any) -> Any:
        return with_training_options(data)

    @model_validator(mode="after")
    def _quantizer_fits(self) -> Recipe:
        model, training = self.model.quantizer, self.quantizer
        if training.type != model.type:
            raise ValueError(f"quantizer.type is {training.type}, but the model has {model.type}")
        queue_size = getattr(training, "queue_size", None)
        if queue_size is not None and queue_size < model.codebook_size:
            raise ValueError(
                f"quantizer.queue_size must be at least the codebook_size, {model.codebook_size}"
            )
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
    def calibrate_every(self) -> int:
        """Steps between calibrations of the quantizer; 0: never."""
        return getattr(self.quantizer, "calibrate_every", 0)

    @property
    def adversarial(self) -> bool:
        """Whether there is a discriminator."""
        return self.discriminator.size != "none"
