"""The parts that recipes of all modalities share."""

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
    shuffle_buffer: Positive = Field(
        1000, description="Number of items that are shuffled at a time."
    )
    weight: Weight = Field(1.0, description="Share of the crops, relative to other corpora.")


def path_or_mapping(value: Any) -> Any:
    """Accept a corpus given only as a path."""
    return {"path": value} if isinstance(value, str) else value


def one_or_more(value: Any) -> Any:
    """Accept a single corpus, or None, in place of a list of corpora."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str | dict | Strict) else value


class Data(Strict):
    """Training data: their sources and augmentation."""

    train: tuple[Any, ...] = Field((), description="Corpora, of the types of the modality.")
    batch_size: Positive = Field(8, description="Crops per process and (partial) step.")
    workers: Annotated[int, Field(ge=0, le=256)] | None = Field(
        None,
        description="Worker processes of the loader per training process; 0: threads. "
        "null: threads when training on a CPU, up to 8 processes with a GPU.",
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
        1.0, ge=0, description="The quantizer's own loss, such as that on moments of the latents."
    )
    adversarial: float = Field(
        0.1,
        ge=0,
        description="Adversarial loss, see `discriminator.loss`; only with a discriminator.",
    )
    feature: float = Field(
        0.5,
        ge=0,
        description="Feature matching: relative L1 of the discriminators' hidden layers; only with "
        "a discriminator.",
    )
    balancer: bool = Field(
        False,
        description="Gradient balancer: weights (except `quantizer`) are shares of the gradient at "
        "the output instead of factors of the losses.",
    )
    balancer_every: Positive = Field(
        1,
        description="Measure gradient norms at every n-th step. This takes one backward pass "
        "through each loss; other steps take one for all losses together.",
    )
    balancer_decay: float = Field(
        0.99, ge=0, lt=1, description="Decay of the balancer's averages of gradient norms."
    )


class Discriminator(Strict):
    """Discriminators that are trained against the codec."""

    size: Literal["none", "small", "full"] = Field(
        "none",
        description="small: for CPUs, about the size of the codec; full: as in GAN vocoders; none: "
        "no adversarial training.",
    )
    start_step: NotNegative = Field(0, description="Step at which adversarial training begins.")
    loss: Literal["lsgan", "relativistic"] = Field(
        "lsgan",
        description="lsgan: squared distance of the logits from 1 (real) and 0 (decoded); "
        "relativistic: softplus of the difference between the logits of decoded and real.",
    )
    warmup_steps: NotNegative = Field(
        0, description="Steps from `start_step` on that update only the discriminators."
    )
    penalty: float = Field(
        0.0,
        ge=0,
        description="Weight of a gradient penalty, which keeps the discriminators from getting too "
        "far ahead of the codec; applied at every fourth update of theirs, four times as strong.",
    )
    every: Positive = Field(1, description="Update the discriminators at every n-th step.")
    lr: float = Field(3e-4, gt=0, description="Peak learning rate; its schedule is the codec's.")
    betas: Betas = Field((0.8, 0.99), description="Betas of AdamW.")
    weight_decay: float = Field(1e-5, ge=0, description="Weight decay of AdamW.")
    grad_clip: float = Field(10.0, gt=0, description="Largest gradient norm.")


class Evaluation(Strict):
    """Quality on held-out data during training."""

    every: Positive = Field(
        1000, description="Steps between evaluations; the last step is evaluated, too."
    )
    max_files: Positive = Field(64, description="Most files to use, spread evenly over all.")


class OptimConfig(Strict):
    """Optimiser of the codec, learning rate schedule, and averaging of weights."""

    name: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: Muon for weights of linear layers, AdamW for all others."
    )
    lr: float = Field(1e-3, gt=0, description="Peak learning rate.")
    final_lr: float = Field(1e-5, ge=0, description="Learning rate of the last step.")
    schedule: Literal["cosine", "onecycle", "constant"] = Field(
        "cosine",
        description="cosine: linear warm-up, then a half cosine to `final_lr`; onecycle: half "
        "cosines from `lr` / 10 to `lr` at `peak_at`, then to `final_lr`; constant: warm-up, then "
        "`lr`.",
    )
    warmup_steps: NotNegative = Field(
        200, description="Length of the warm-up of the cosine and constant schedules."
    )
    peak_at: float = Field(
        0.4, gt=0, lt=1, description="Position of the peak of onecycle, as a share of all steps."
    )
    encoder_lr: float = Field(
        1.0, gt=0, le=10, description="Learning rate of the encoder relative to that of the rest."
    )
    betas: Betas = Field((0.9, 0.98), description="Betas of AdamW.")
    weight_decay: float = Field(
        0.01,
        ge=0,
        description="Weight decay of matrices and kernels; none for biases, norms, codes.",
    )
    grad_clip: float = Field(1.0, gt=0, description="Largest gradient norm.")
    ema_decay: float = Field(
        0.999, ge=0, lt=1, description="Decay of the averaged weights, which are exported."
    )

    @model_validator(mode="after")
    def _consistent(self) -> OptimConfig:
        if self.final_lr > self.lr:
            raise ValueError(f"final_lr is {self.final_lr:g}, above lr, {self.lr:g}")
        return self


class TrainConfig(Strict):
    """Length, precision and output of a training run."""

    steps: Positive = Field(1000, description="Updates of the codec.")
    decoder_only: bool = Field(
        False,
        description="Train only the decoder. Encoder and quantizer, and so the token space, stay "
        "those of `--init-from`: the decoder learns from real tokens, and decodes the token files "
        "of the old model.",
    )
    accumulate: Positive = Field(1, description="Batches per update, with averaged gradients.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="Seed of weights, crops and noise."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: a GPU if there is one."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="Type to autocast the networks to. auto: bf16 if the machine multiplies it "
        "faster and computes the networks as in fp32, otherwise fp32. fp16 needs a GPU.",
    )
    compile: bool = Field(False, description="Compile encoder, decoder and discriminators.")
    log_every: Positive = Field(20, description="Steps between rows of metrics.jsonl.")
    save_every: Positive = Field(500, description="Steps between checkpoints.")
    keep: Positive = Field(2, description="Number of newest checkpoints to keep.")
    show_every: Positive = Field(
        1000, description="Steps between samples in TensorBoard: audio and spectrograms, or images."
    )
    trackers: tuple[Literal["trackio", "wandb"], ...] = Field(
        (), description="Further services to log to, through Accelerate; needs their packages."
    )

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.precision == "fp16" and self.device == "cpu":
            raise ValueError("precision fp16 needs a GPU; bf16 and fp32 work on a CPU")
        return self


class Recipe(Strict):
    """Everything that defines a training run: model, data, losses, optimiser and schedule."""

    model: ModelConfig
    quantizer: QuantizerTraining = Field(
        default_factory=FSPTrainingConfig,
        description="Training options of the quantizer; of the same type as in `model`.",
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
                f"discriminator.start_step is {self.discriminator.start_step}, but train.steps is "
                f"{self.train.steps}"
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
