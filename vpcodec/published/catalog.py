"""The published models, the paths of their weights, and their configurations."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..model_folder import ModelError
from .config import SQCodecConfig

MODULES = ("encoder", "quantizer", "decoder", "en_encoder", "en_decoder")


@dataclass(frozen=True)
class Published:
    """A published model.

    Attributes:
        repo: repository on the Hub, owner/name.
        name: name of the model in the repository.
        version: version of its weights.
        fields: those of its configuration.
    """

    repo: str
    name: str
    version: str
    fields: dict[str, Any] = field(hash=False)

    @cached_property  # few programs need any of them
    def config(self) -> SQCodecConfig:
        """Configuration of the model."""
        return SQCodecConfig(**self.fields)

    @property
    def spec(self) -> str:
        """The name for users: owner/name:model."""
        return f"{self.repo}:{self.name}"

    @property
    def files(self) -> tuple[str, ...]:
        """Paths of the weights in the repository, in the order of `MODULES`."""
        return tuple(f"weights/{self.name}.{self.version}/{module}.pt" for module in MODULES)


def is_published(name: str) -> bool:
    """Whether a name begins with a repository of the catalog; `look_up` checks the model."""
    return any(name.partition(":")[0] == published.repo for published in PUBLISHED)


def look_up(spec: str) -> Published:
    """The published model named "owner/name:model".

    Raises:
        ModelError: there is no such model; the message lists those of the repository, or all.
    """
    models = {published.spec: published for published in PUBLISHED}
    if spec in models:
        return models[spec]
    repo = spec.partition(":")[0]
    same_repo = [published.spec for published in PUBLISHED if published.repo == repo]
    raise ModelError(f"no published model {spec!r} (there are {', '.join(same_repo or models)})")


# Widths and depths are the same within a family; only fields that depend on the rate differ. Models
# with several features per token have two levels of Transformers, the others one.
_SEVEN = (7, 7, 7, 7, 7, 7)
_NINE = (9, 9, 9, 7, 7, 7)


def _l3ac(name: str, rate: str, token_stride: int, **fields: Any) -> Published:
    settings = dict(
        name=f"l3ac-{name}",
        description=f"L3AC, {rate} kbit/s, speech and music at 16 kHz",
        architecture="l3ac",
        sample_rate=16_000,
        encoder_dims=(24, 48, 96, 192),
        encoder_depths=(1, 1, 1, 2),
        decoder_dims=(512, 256, 96, 48, 24),
        decoder_depths=(3, 3, 2, 1),
        feature_dim=128,
        token_stride=token_stride,
        encoder_layers=2 if token_stride > 1 else 1,
        encoder_outer_layers=1 if token_stride > 1 else 0,
        decoder_layers=3,
        decoder_outer_layers=2 if token_stride > 1 else 0,
        **fields,
    )
    return Published("zhai-lw/L3AC", name, "v1", settings)


def _sqcodec(
    name: str, rate: str, token_stride: int = 1, *, khz: int = 16, **fields: Any
) -> Published:
    deep = len(fields["strides"]) == 3  # models of low rates have one more stage
    settings = dict(
        name=f"sqcodec-{name}".replace("_", "-"),
        description=f"SQCodec, {rate} kbit/s, speech and music at {khz} kHz",
        architecture="sqcodec",
        sample_rate=khz * 1000,
        encoder_dims=(24, 48, 96, 192) if deep else (24, 96, 192),
        encoder_depths=(1, 1, 1, 2) if deep else (1, 1, 2),
        decoder_dims=(384, 192, 96, 48, 24) if deep else (384, 192, 96, 48),
        decoder_depths=(3, 2, 2, 1) if deep else (3, 2, 1),
        feature_dim=256,
        token_stride=token_stride,
        encoder_layers=3,
        encoder_outer_layers=2 if token_stride > 1 else 0,
        decoder_layers=3,
        decoder_outer_layers=2 if token_stride > 1 else 0,
        **fields,
    )
    return Published("zhai-lw/SQCodec", name, "v0", settings)


def _rates(
    strides: tuple[int, ...],
    decoder_strides: tuple[int, ...],
    attention_window: int,
    levels: tuple[int, ...] = _SEVEN,
) -> dict[str, Any]:
    return {
        "strides": strides,
        "decoder_strides": decoder_strides,
        "attention_window": attention_window,
        "quantizer": {"type": "fsq", "levels": levels},
    }


PUBLISHED: tuple[Published, ...] = (
    _l3ac("0k75bps", "0.75", 3, **_rates((6, 5, 4), (5, 4, 3, 2), 200)),
    _l3ac("1kbps", "1", 3, **_rates((6, 5, 3), (5, 3, 3, 2), 250)),
    _l3ac("1k5bps", "1.5", 2, **_rates((6, 5, 3), (5, 3, 3, 2), 300)),
    _l3ac("3kbps", "3", 1, **_rates((6, 4, 4), (4, 4, 3, 2), 400, _NINE)),
    _sqcodec("0k75bps", "0.75", 3, **_rates((6, 5, 4), (5, 4, 3, 2), 200)),
    _sqcodec("1k5bps", "1.5", 2, **_rates((6, 5, 3), (5, 3, 3, 2), 300)),
    _sqcodec("3kbps", "3", **_rates((6, 5, 3), (5, 3, 3, 2), 400)),
    _sqcodec("6kbps", "6", **_rates((9, 5), (5, 3, 3), 300)),
    _sqcodec("12kbps", "12", **_rates((6, 4), (4, 3, 2), 400, _NINE)),
    _sqcodec("12kbps_24khz", "12", khz=24, **_rates((6, 6), (4, 3, 3), 400, _NINE)),
    _sqcodec("24kbps_24khz", "24", khz=24, **_rates((6, 3), (3, 3, 2), 600, _NINE)),
)
