"""The configuration of a model, as in config.json: `AudioConfig` or `ImageConfig`.

Fields are documented only here; unknown keys and wrong types are refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
MAX_CODEBOOK = 2**32  # limit of token files
MAX_STORED_CODES = 2**20  # in a stored codebook: more take too long to fit and to search
PARTS = ("encoder", "decoder")
UNKNOWN_TYPE = "unknown_type"
TAGS = {"fsp", "vp", "fsq", "vq", "simvq", "lfq", "audio", "libritts", "image", "huggingface"}
TEXTUAL = ("str", "Literal", "Config", "Corpus")  # in the names of types that accept text
TAGGED = {
    "quantizer",
    "noise",
    "data",
}  # fields that are one of several; lists of them have numbers


class ConfigError(ValueError):
    """A configuration or recipe that cannot be used; the message names the field."""


def _not_too_many(levels: tuple[int, ...]) -> tuple[int, ...]:
    if math.prod(levels) > MAX_CODEBOOK:
        raise ValueError(f"make {math.prod(levels)} codes, more than {MAX_CODEBOOK}")
    return levels


Levels = Annotated[tuple[Annotated[int, Field(ge=2)], ...], AfterValidator(_not_too_many)]


class Strict(BaseModel):
    """Refuses unknown fields, infinite numbers, and text or booleans in place of numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: ValidationInfo) -> Any:
        kind = str(cls.model_fields[info.field_name].annotation)
        truth, text = "bool" in kind, any(word in kind for word in TEXTUAL)
        for item in value if isinstance(value, list | tuple) else [value]:
            if truth and not isinstance(item, bool):
                raise ValueError("should be true or false")
            if not truth and isinstance(item, bool):
                raise ValueError("should not be true or false")
        if not text and isinstance(value, str):
            raise ValueError("should be a number")
        return value


class GridConfig(Strict):
    """A quantizer whose codebook is a product of scalar grids."""

    levels: Levels = Field(description="Levels per latent dimension.")

    @property
    def codebook_size(self) -> int:
        return math.prod(self.levels)

    @property
    def dim(self) -> int:
        return len(self.levels)


class FSPConfig(GridConfig):
    """Finite scalar perturbation: uniform latents, Lloyd-Max centroids."""

    training_only: ClassVar[frozenset[str]] = frozenset({"rejection", "eta"})
    outside_space: ClassVar[frozenset[str]] = training_only | {"quantize_rate"}

    type: Literal["fsp"] = "fsp"
    levels: Levels = Field(
        (9, 9, 9, 7, 7, 7),
        min_length=1,
        description="Levels per latent dimension; their product is the codebook size.",
    )
    activation: Literal["tanh", "normal", "sigmoid", "laplace"] = Field(
        "tanh",
        description="Squashing to [0, 1], with the latent variance that makes the result uniform: "
        "tanh (0.8225), normal CDF (1), sigmoid (3.29), Laplace CDF (2).",
    )
    quantize_rate: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of training tokens that are quantized instead of perturbed.",
    )
    rejection: Literal["vector", "dimension"] = Field(
        "vector",
        description="What passes unchanged if a dimension leaves [0, 1]: the vector, or that "
        "dimension.",
    )
    eta: float = Field(
        1.0, gt=0, le=2, description="Width of the perturbation over the width of a cell."
    )


class FSQConfig(GridConfig):
    """Finite scalar quantization, symmetric, with noise in training (baseline)."""

    training_only: ClassVar[frozenset[str]] = frozenset({"noise_rate"})
    outside_space: ClassVar[frozenset[str]] = training_only

    type: Literal["fsq"] = "fsq"
    levels: Levels = Field(
        (8, 8, 8, 6, 5), min_length=1, description="Points per latent dimension."
    )
    noise_rate: float = Field(
        0.5, ge=0, le=1, description="Share of training scalars that get noise instead of rounding."
    )


class _CodebookConfig(Strict):
    """A quantizer with a stored codebook."""

    dim: Positive = Field(5, description="Latent dimensions.")
    codebook_size: Annotated[int, Field(gt=0, le=MAX_STORED_CODES)] = Field(
        16_384, description="Codes."
    )


class VPConfig(_CodebookConfig):
    """Vector perturbation: no codebook in training, k-means afterwards."""

    training_only: ClassVar[frozenset[str]] = frozenset(
        {
            "eta",
            "mh_steps",
            "neighbors",
            "search_size",
            "queue_size",
            "push_size",
            "metropolis",
            "calibrate_every",
        }
    )
    outside_space: ClassVar[frozenset[str]] = training_only

    type: Literal["vp"] = "vp"
    eta: float = Field(
        1.5, gt=0, description="Radius of the proposals over D_M, before calibration."
    )
    mh_steps: Positive = Field(
        1, description="Least Metropolis-Hastings steps per token; calibration may raise them."
    )
    neighbors: Positive = Field(8, description="k of the density estimate.")
    search_size: Positive | None = Field(
        8192,
        description="Newest latents among which distances are measured; null: the whole queue.",
    )
    queue_size: Positive | None = Field(
        None, description="Latents kept; null: 16 per code, at least 65,536."
    )
    push_size: Positive = Field(256, description="Latents that a process adds per step.")
    metropolis: bool = Field(True, description="False: accept every proposal (an ablation).")
    calibrate_every: NotNegative = Field(
        2000,
        description="Steps between calibrations of eta to the error of a k-means codebook on the "
        "queue; 0: never.",
    )

    @model_validator(mode="after")
    def _enough_latents(self) -> VPConfig:
        if self.queue_size is not None and self.queue_size < self.codebook_size:
            raise ValueError("queue_size must be at least codebook_size")
        if self.neighbors > min(
            self.search_size or MAX_STORED_CODES, self.queue_size or MAX_STORED_CODES
        ):
            raise ValueError("neighbors must be at most search_size and queue_size")
        return self


class VQConfig(_CodebookConfig):
    """Codebook of moving averages, with a k-means start and restarts of unused codes (baseline)."""

    training_only: ClassVar[frozenset[str]] = frozenset(
        {"decay", "commitment", "restart_below", "push_size"}
    )
    outside_space: ClassVar[frozenset[str]] = training_only

    type: Literal["vq"] = "vq"
    decay: float | None = Field(
        None, ge=0, le=1, description="Decay of the moving averages; null: 32 latents per code."
    )
    commitment: float = Field(0.25, ge=0, description="Weight of the commitment loss.")
    restart_below: float = Field(
        0.1, ge=0, le=1, description="Fraction of the average use below which a code restarts."
    )
    push_size: Positive = Field(256, description="Latents kept per step and process, for restarts.")


class SimVQConfig(_CodebookConfig):
    """A frozen random codebook under a learned linear map (baseline)."""

    training_only: ClassVar[frozenset[str]] = frozenset()
    outside_space: ClassVar[frozenset[str]] = training_only

    type: Literal["simvq"] = "simvq"


class LFQConfig(Strict):
    """Lookup-free quantization: one bit per dimension (baseline)."""

    training_only: ClassVar[frozenset[str]] = frozenset(
        {"entropy_weight", "commitment", "temperature"}
    )
    outside_space: ClassVar[frozenset[str]] = training_only

    type: Literal["lfq"] = "lfq"
    dim: Positive = Field(14, le=24, description="Bits per token.")
    entropy_weight: float = Field(0.1, ge=0, description="Weight of the entropy loss.")
    commitment: float = Field(0.25, ge=0, description="Weight of the commitment loss.")
    temperature: float = Field(
        0.01, gt=0, description="Temperature of the soft assignment to codes."
    )

    @property
    def codebook_size(self) -> int:
        return 2**self.dim


def by_type(default: str, *types: str) -> Discriminator:
    """A discriminator that selects the member of a union by its field `type`."""

    def tag(value: Any) -> str:
        found = value.get("type", default) if isinstance(value, dict) else value
        return str(getattr(found, "type", found))

    return Discriminator(
        tag,
        custom_error_type=UNKNOWN_TYPE,
        custom_error_message=f"must be one of {', '.join(types)}",
    )


QuantizerConfig = Annotated[
    Annotated[FSPConfig, Tag("fsp")]
    | Annotated[VPConfig, Tag("vp")]
    | Annotated[FSQConfig, Tag("fsq")]
    | Annotated[VQConfig, Tag("vq")]
    | Annotated[SimVQConfig, Tag("simvq")]
    | Annotated[LFQConfig, Tag("lfq")],
    by_type("fsp", "fsp", "vp", "fsq", "vq", "simvq", "lfq"),
]


class ModelConfig(Strict):
    """The fields of every model."""

    descriptive: ClassVar[frozenset[str]] = frozenset(
        {"description", "license"}
    )  # no part of the identity
    outside_space: ClassVar[frozenset[str]] = descriptive | {"name"}  # do not decide the tokens
    decoder_weights: ClassVar[tuple[str, ...]] = ("decoder.",)  # how the names of others begin

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(@([2-9]|[1-9][0-9]+))?$",
        max_length=64,
        description="Model name, as in token files; @2 and so on is its revision.",
    )
    kind: str = Field(description="What the model codes.")
    description: str = Field("", description="One line, shown by `vpcodec models`.")
    license: str = Field("unknown", description="Licence of the weights.")
    quantizer: QuantizerConfig = Field(
        default_factory=FSPConfig,
        description="One of the quantizers below, selected by its `type`.",
    )

    @property
    def revision(self) -> int:
        """1 for a plain name; a new encoder makes a new revision."""
        return int(self.name.partition("@")[2] or 1)

    @property
    def modality(self) -> str:
        """ "audio" or "image": what config.json calls `kind`."""
        return self.kind

    @property
    def codebook_size(self) -> int:
        return self.quantizer.codebook_size

    @property
    def bits_per_token(self) -> float:
        """log2 of the codebook size."""
        return math.log2(self.codebook_size)


class AudioModelConfig(ModelConfig):
    """The fields of every audio model."""

    kind: Literal["audio"] = Field("audio", description="What the model codes.")
    sample_rate: Positive = Field(16_000, le=10_000_000, description="Audio rate of the model, Hz.")

    @property
    def hop_length(self) -> int:
        """Samples per token."""
        raise NotImplementedError

    @property
    def latency(self) -> float | None:
        """Algorithmic latency in seconds; None if the model is not for live streams."""
        raise NotImplementedError

    @property
    def frame_rate(self) -> float:
        """Tokens per second."""
        return self.sample_rate / self.hop_length

    @property
    def bitrate(self) -> float:
        """Nominal bit/s of one channel: tokens per second times log2 of the codebook size."""
        return self.frame_rate * self.bits_per_token


class AudioConfig(AudioModelConfig):
    """The native causal audio autoencoder. Rates follow from `sample_rate` and `strides`."""

    outside_space: ClassVar[frozenset[str]] = AudioModelConfig.outside_space | {
        "decoder_dims",
        "decoder_depths",
        "decoder_expansions",
        "decoder_layers",
        "decoder_feedforward_dim",
        "enhance_kernels",
        "enhance_dilations",
        "enhance_channels",
        "last_dim",
        "last_dilations",
        "synthesis_taps",
        "noise_channels",
        "decoder_delay",
        # These three may be written in several ways; the shapes of the weights show them.
        "expansion",
        "encoder_expansions",
        "encoder_feedforward_dim",
    }

    strides: tuple[Positive, ...] = Field(
        (8, 4, 3),
        min_length=1,
        description="Decimation of each encoder stage; their product is the hop length.",
    )
    encoder_dims: tuple[Positive, ...] = Field((32, 96, 192), description="Channels per stage.")
    encoder_depths: tuple[NotNegative, ...] = Field(
        (1, 2, 2), description="ConvUnits per encoder stage."
    )
    decoder_dims: tuple[Positive, ...] = Field(
        (256, 128, 48), description="Channels per decoder stage, lowest rate first."
    )
    decoder_depths: tuple[NotNegative, ...] = Field(
        (2, 1, 1), description="ConvUnits per decoder stage."
    )
    kernel_size: Positive = Field(7, description="Taps of the depthwise convolutions.")
    expansion: Positive = Field(4, description="Hidden width of a ConvUnit over its width.")
    encoder_expansions: tuple[Positive, ...] | None = Field(
        None, description="`expansion` for each encoder stage; null: the same for all."
    )
    decoder_expansions: tuple[Positive, ...] | None = Field(
        None, description="`expansion` for each decoder stage; null: the same for all."
    )
    tconv_kernels: tuple[Positive, ...] = Field(
        (1, 5, 11, 21, 45),
        min_length=1,
        description="TPooling windows of the first block, samples.",
    )
    tconv_channels: Positive = Field(64, description="Hidden width of the first block.")
    tconv_taps: Positive = Field(32, description="Taps of the first block's strided convolution.")
    attention_window: Positive = Field(128, description="Tokens that each token attends to.")
    attention_heads: Positive = Field(4, description="Attention heads.")
    encoder_layers: int = Field(1, ge=0, description="Transformer layers before the quantizer.")
    decoder_layers: int = Field(2, ge=0, description="Transformer layers after the quantizer.")
    encoder_feedforward_dim: Positive | None = Field(
        None,
        description="Hidden width of the encoder's Transformer layers; null: 8/3 of their width.",
    )
    decoder_feedforward_dim: Positive | None = Field(
        None,
        description="Hidden width of the decoder's Transformer layers; null: 8/3 of their width.",
    )
    enhance_kernels: tuple[Positive, ...] = Field(
        (1, 3, 5, 9), min_length=1, description="TPooling windows of the enhance blocks."
    )
    enhance_dilations: tuple[Positive, ...] = Field(
        (1, 2, 3, 5), description="Dilations of the enhance blocks, one per window."
    )
    enhance_channels: Positive = Field(2, description="Channels of each enhance branch.")
    last_dim: Positive = Field(32, description="Channels of the dilated last unit.")
    last_dilations: tuple[Positive, ...] = Field(
        (1, 3, 9), description="Dilations of the last unit."
    )
    synthesis_taps: Positive = Field(
        8, description="Window of the synthesis filterbank, in frames of the last stage."
    )
    noise_channels: Positive | None = Field(
        None,
        description="Channels of the noise that the decoder gates into its stages above the frame "
        "rate; null: no noise.",
    )
    decoder_delay: int = Field(
        2, ge=1, description="Frames of look-ahead that the decoder waits for."
    )

    @model_validator(mode="after")
    def _consistent(self) -> AudioConfig:
        n = len(self.strides)
        per_stride = [f"{a}_{b}" for b in ("dims", "depths", "expansions") for a in PARTS]
        for name in per_stride:
            value = getattr(self, name)
            if value is not None and len(value) != n:
                raise ValueError(f"{name} needs {n} entries, one per stride")
        if len(self.enhance_dilations) != len(self.enhance_kernels):
            raise ValueError("enhance_dilations needs one entry per enhance kernel")
        if self.encoder_dims[-1] % self.attention_heads:
            raise ValueError("encoder_dims[-1] must be a multiple of attention_heads")
        if self.tconv_taps < self.strides[0]:
            raise ValueError("tconv_taps must be at least strides[0]")
        return self

    @property
    def hop_length(self) -> int:
        """Samples per token."""
        return math.prod(self.strides)

    @property
    def latency(self) -> float:
        """Algorithmic latency in seconds: one hop to fill a token and the decoder's delay."""
        return (1 + self.decoder_delay) * self.hop_length / self.sample_rate


class ImageConfig(ModelConfig):
    """The native image autoencoder: convolutions, and attention within windows of tokens.

    Every layer sees a bounded neighbourhood, so large images can be coded in tiles with the tokens
    of the whole.
    """

    outside_space: ClassVar[frozenset[str]] = ModelConfig.outside_space | {
        "decoder_depths",
        "decoder_layers",
    }

    kind: Literal["image"] = Field("image", description="What the model codes.")
    patch_size: Positive = Field(
        2,
        le=32,
        description="Side of the squares of pixels that the first stage takes as one input.",
    )
    dims: tuple[Positive, ...] = Field(
        (64, 128, 160),
        min_length=1,
        max_length=6,
        description="Channels per stage; each stage after the first halves width and height.",
    )
    encoder_depths: tuple[NotNegative, ...] = Field(
        (1, 1, 2), description="Residual blocks per encoder stage."
    )
    decoder_depths: tuple[NotNegative, ...] = Field(
        (1, 2, 2), description="Residual blocks per decoder stage, in the order of `dims`."
    )
    attention_window: Annotated[int, Field(ge=1, le=64)] = Field(
        8, description="Side of the square windows of tokens that attend to each other."
    )
    attention_heads: Positive = Field(4, description="Attention heads.")
    encoder_layers: NotNegative = Field(1, description="Attention layers before the quantizer.")
    decoder_layers: NotNegative = Field(1, description="Attention layers after the quantizer.")

    @model_validator(mode="after")
    def _consistent(self) -> ImageConfig:
        n = len(self.dims)
        for name in ("encoder_depths", "decoder_depths"):
            if len(getattr(self, name)) != n:
                raise ValueError(f"{name} needs {n} entries, one per entry of dims")
        if self.dims[-1] % self.attention_heads:
            raise ValueError("dims[-1] must be a multiple of attention_heads")
        return self

    @property
    def hop_length(self) -> int:
        """Side of the square of pixels that a token stands for."""
        return self.patch_size * 2 ** (len(self.dims) - 1)

    @property
    def bits_per_pixel(self) -> float:
        """Nominal bits per pixel of one channel: bits per token over pixels per token."""
        return self.bits_per_token / self.hop_length**2

    @property
    def block_size(self) -> int:
        """Side of an attention window in pixels; the network takes multiples of it."""
        return self.hop_length * self.attention_window

    @property
    def encoder_halo(self) -> int:
        """Most tokens around a tile of whole windows whose pixels its tokens depend on."""
        return self._halo(self.encoder_depths)

    @property
    def decoder_halo(self) -> int:
        """Most tokens around a tile of whole windows that its pixels depend on."""
        return self._halo(self.decoder_depths)

    def _halo(self, depths: tuple[int, ...]) -> int:
        """Reach of the 3 x 3 convolutions, one at each end and two per block, in whole windows."""
        blocks = sum(2 * depth * 2**i for i, depth in enumerate(depths))
        windows = -(-self.patch_size * (1 + blocks) // self.block_size)
        return windows * self.attention_window


KINDS: dict[str, type[ModelConfig]] = {"audio": AudioConfig, "image": ImageConfig}
_architectures: dict[str, type[AudioModelConfig]] = {}  # of audio that are not native


def register_architecture(names: Iterable[str], config: type[AudioModelConfig]) -> None:
    """Register the configuration class of audio models whose `architecture` is one of `names`."""
    _architectures.update(dict.fromkeys(names, config))


def explain(error: ValidationError) -> str:
    """The first error, as one line that begins with the path of the field."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    for at in range(len(path) - 1, 0, -1):
        if path[at] in TAGS and (path[at - 1] in TAGGED or path[at - 1].isdigit()):
            del path[at]  # pydantic's tag of the union, not a field
    if first["type"] == UNKNOWN_TYPE:
        path.append("type")
    where = ".".join(path)
    reason = first["msg"].removeprefix("Value error, ")
    return f"{where}: {reason}" if where else reason


def parse_model(data: Any) -> ModelConfig:
    """The configuration of a model from a plain dict.

    Without `kind` it is an audio model, without `architecture` a native one.

    Raises:
        ConfigError: a wrong field, which the message names.
    """
    try:
        return model_class(data).model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error)) from None


def model_class(data: Any) -> type[ModelConfig]:
    """The configuration class for a plain dict.

    Raises:
        ConfigError: unknown `kind` or `architecture`.
    """
    kind = data.get("kind", "audio") if isinstance(data, dict) else "audio"
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"kind: must be one of {', '.join(KINDS)}")
    if kind == "audio" and isinstance(data, dict) and "architecture" in data:
        architecture = data["architecture"]
        if not isinstance(architecture, str) or architecture not in _architectures:
            known = ", ".join(_architectures) or "none here"
            raise ConfigError(f"architecture: must be one of {known}")
        return _architectures[architecture]
    return KINDS[kind]
