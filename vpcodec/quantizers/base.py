"""The contract of all quantizers, and what they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn

from ..progress import Progress
from ..usage import CodebookUsage
from .kmeans import KMeans

MOMENT_WEIGHTS = (0.1, 0.07)  # of the squared mean, and of the squared error of the variance


class NoCodebookError(RuntimeError):
    """The quantizer has no codebook yet."""


class NotFiniteError(ValueError):
    """Latents that are NaN or infinite."""


class Quantized:
    """What a quantizer returns.

    Attributes:
        latents: (..., D) float32, the input of the decoder: perturbed in training, codes in eval.
        tokens: (...) int64, the index of the nearest code. If training needs no codebook (VP), they
            are looked up on first access.
        loss: scalar float32, the quantizer's own loss, unweighted.
        stats: scalars worth logging.
    """

    def __init__(
        self,
        latents: torch.Tensor,
        tokens: torch.Tensor | Callable[[], torch.Tensor],
        loss: torch.Tensor,
        stats: dict[str, torch.Tensor] | None = None,
    ) -> None:
        self.latents = latents
        self.loss = loss
        self.stats = stats or {}
        self._tokens = tokens

    @property
    def lazy(self) -> bool:
        """Whether the tokens have not been looked up yet."""
        return not isinstance(self._tokens, torch.Tensor)

    @property
    def tokens(self) -> torch.Tensor:
        """See the attributes of the class."""
        if not isinstance(self._tokens, torch.Tensor):
            self._tokens = self._tokens()
        return self._tokens


@dataclass(frozen=True)
class Calibration:
    """The result of `Quantizer.calibrate`.

    Attributes:
        eta: the radius factor that was set.
        mh_steps: the number of Metropolis-Hastings steps that was set.
        noise: mean squared length of the perturbation, counting rejected proposals as zero.
        error: mean squared quantization error that the noise should match.
    """

    eta: float
    mh_steps: int
    noise: float
    error: float


class Quantizer(nn.Module, ABC):
    """Maps latents (..., D) to tokens (...) and back, in float32 and int64 even under autocast.

    Casting a model to another type (`model.half()`) leaves its quantizer in float32.

    Training calls `calibrate` from time to time, `forget_codebook` when it continues a finished
    run, and `fit` at the end if `fit_after_training` is set.

    Attributes:
        dim: D.
        codebook_size: K.
        latent_std: standard deviation that the latents should have.
        fit_after_training: whether `fit` makes the codebook after training; otherwise the codebook
            is fixed or learned.
        training_state: names in the state dict that only training needs; models are stored and
            loaded without them.
        lazy_buffers: buffers that stay empty until they are first filled -> their length then.
    """

    dim: int
    codebook_size: int
    latent_std: float = 1.0
    fit_after_training: ClassVar[bool] = False
    training_state: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.lazy_buffers: dict[str, int] = {}

    @property
    def fitted(self) -> bool:
        """Whether there is a codebook, as needed in eval mode."""
        return True

    def fit(
        self,
        latents: torch.Tensor | Iterable[torch.Tensor] | None = None,
        *,
        seed: int = 0,
        max_iterations: int = 100,
        progress: Progress | None = None,
    ) -> KMeans | None:
        """Fit the codebook, if training does not make it; see `VP.fit`.

        Returns:
            The codebook and its error; None if the quantizer gets its codebook by other means.

        Raises:
            NoCodebookError: there is no codebook, and only training can make one.
            ValueError: the latents have another width, are not finite, or too few of them differ.
        """
        if not self.fitted:
            raise NoCodebookError(f"{type(self).__name__} has no codebook yet, training makes it")
        return None

    def forget_codebook(self) -> None:
        """Drop the codebook if `fit` made it, as when training continues."""
        return None

    def calibrate(
        self,
        latents: torch.Tensor | None = None,
        *,
        error: float | None = None,
        seed: int = 0,
    ) -> Calibration | None:
        """Make the perturbation as strong as the quantization error; see `VP.calibrate`.

        Every process of a group must call this.

        Returns:
            What was set; None if there is nothing to set, or in processes other than the first.

        Raises:
            ValueError: there are too few latents, or the strength is out of reach; nothing changes.
        """
        return None

    @abstractmethod
    def forward(self, latents: torch.Tensor) -> Quantized:
        """Perturb (training) or quantize (eval) latents.

        Args:
            latents: (..., D) floating point.

        Raises:
            ValueError: the last dimension is not D, or the dtype is not floating point.
            NotFiniteError: latents are not finite; not checked in training on CUDA, where the check
                would wait for the device.
            NoCodebookError: there is no codebook, in eval.
        """

    @abstractmethod
    def encode(self, latents: torch.Tensor) -> torch.Tensor:
        """(..., D) latents, as for `forward` -> (...) int64 tokens; raises as `forward`."""

    @abstractmethod
    def tokens_to_latents(self, tokens: torch.Tensor) -> torch.Tensor:
        """(...) integer tokens -> (..., D) float32 codes, as the decoder sees them.

        Raises:
            ValueError: tokens are not integers in 0 .. K - 1.
        """

    def latents_to_tokens(self, latents: torch.Tensor) -> torch.Tensor:
        """(..., D) codes from `tokens_to_latents` -> (...) int64 tokens, exactly."""
        return self.encode(latents)

    def check_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """The latents as float32; raises as `forward`."""
        if latents.ndim == 0 or latents.shape[-1] != self.dim:
            found = latents.shape[-1] if latents.ndim else "none"
            raise ValueError(f"expected latents of {self.dim} dimensions, got {found}")
        if not latents.is_floating_point():
            raise ValueError(f"latents must be floating point, got {latents.dtype}")
        waits = latents.is_cuda and self.training
        if not torch.compiler.is_compiling() and not waits and not latents.isfinite().all():
            bad = latents[~latents.isfinite()][0].item()
            raise NotFiniteError(f"latents must be finite, got {bad}")
        return latents.float()

    def check_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """The tokens as int64; raises as `tokens_to_latents`."""
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise ValueError(f"tokens must be integers, got {tokens.dtype}")
        tokens = tokens.long()
        if not torch.compiler.is_compiling() and tokens.numel():
            for bad in (tokens.min().item(), tokens.max().item()):
                if not 0 <= bad < self.codebook_size:
                    raise ValueError(f"token {bad} is not within 0 .. {self.codebook_size - 1}")
        return tokens

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(fn(tensor.new_empty(0)).device)

        return super()._apply(move, recurse)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *rest: Any,
    ) -> None:
        """Resize lazy buffers to their stored length; allow training state to be missing."""
        for name, length in self.lazy_buffers.items():
            stored, own = state_dict.get(prefix + name), self._buffers[name]
            if stored is None and name in self.training_state:
                self._buffers[name] = own[:0]  # it belongs to other codes
            if stored is not None and len(stored) in (0, length) and len(stored) != len(own):
                self._buffers[name] = own.new_zeros(len(stored), *own.shape[1:])
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *rest
        )
        optional = {prefix + name for name in self.training_state}
        missing_keys[:] = [key for key in missing_keys if key not in optional]


def mean_square(values: torch.Tensor) -> torch.Tensor:
    """Mean of the squares; 0 for an empty tensor."""
    return values.square().sum() / max(1, values.numel())


def moment_loss(latents: torch.Tensor, variance: float, *, shared: bool) -> torch.Tensor:
    """VP-VAE paper, eq. 11: 0.1 mean_d mu_d^2 + 0.07 mean_d (sigma_d^2 - variance)^2.

    Args:
        latents: (..., D) float32; moments are taken over all but the last dimension.
        variance: target variance.
        shared: take the moments over the latents of all processes of the group.
    """
    flat = latents.reshape(-1, latents.shape[-1])
    count = flat.new_full((), float(len(flat)))
    total = flat.sum(0)
    if shared and processes() > 1:
        count, total = sum_with_gradient(count), sum_with_gradient(total)
    mean = total / count.clamp(min=1)
    spread = (flat - mean).square().sum(0)
    if shared and processes() > 1:
        spread = sum_with_gradient(spread)
    off = spread / count.clamp(min=1) - variance
    return MOMENT_WEIGHTS[0] * mean.square().mean() + MOMENT_WEIGHTS[1] * off.square().mean()


def processes() -> int:
    """Size of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_usage(usage: CodebookUsage) -> None:
    """Replace the counts by their sum over all processes of the group; without a group, do nothing.

    Every process must call this once.
    """
    if processes() > 1:
        counts = torch.from_numpy(usage.counts)
        counts = counts.cuda() if dist.get_backend() == "nccl" else counts
        dist.all_reduce(counts)
        usage.counts = counts.cpu().numpy()


def rank() -> int:
    """Rank of this process in the default group; 0 without one."""
    return dist.get_rank() if processes() > 1 else 0


def sum_with_gradient(value: torch.Tensor) -> torch.Tensor:
    """The sum over all processes of the group; gradients pass through it."""
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(value)


def uniform_like(values: torch.Tensor) -> torch.Tensor:
    """Uniform random numbers in [0, 1) with the shape, dtype and device of (B, ...) values.

    If all processes of a group have the same random state, each draws its part of what one process
    would draw for the joint batch.
    """
    return _share_of(torch.rand, values)


def normal_like(values: torch.Tensor) -> torch.Tensor:
    """As `uniform_like`, but normally distributed."""
    return _share_of(torch.randn, values)


def _share_of(draw: Callable[..., torch.Tensor], values: torch.Tensor) -> torch.Tensor:
    options = {"dtype": values.dtype, "device": values.device}
    number = processes()
    if number == 1:
        return draw(values.shape, **options)
    return draw((number, *values.shape), **options)[rank()]
