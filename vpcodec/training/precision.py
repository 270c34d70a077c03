"""Whether networks compute in half precision what they compute in float32.

They do up to rounding, unless a library is wrong on the processor at hand: on Intel processors with
AMX, torch 2.11 gives no numbers for some convolutions in bf16 and for compiled modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# Relative errors of tensors. Rounding to bf16 gives 0.012 and 0.07 at most, in all recipes.
OUTPUT_ERROR, GRADIENT_ERROR = 0.05, 0.25


@dataclass(frozen=True)
class Network:
    """A network and what it is tried with.

    Attributes:
        name: for people.
        module: takes `example`; gives a tensor, or lists of them.
        example: a batch; its gradient is compared as well if it requires one.
    """

    name: str
    module: nn.Module
    example: torch.Tensor


def find_fault(networks: Iterable[Network], dtype: torch.dtype, *, compiled: bool) -> str | None:
    """Compare one pass of each network under autocast, forward and backward, with float32.

    The state of all random number generators, and the gradients that parameters hold, stay as they
    are.

    Args:
        networks: to try.
        dtype: what to autocast to.
        compiled: the networks are; they are tried compiled and not.

    Returns:
        What is wrong with the first network where something is, such as "the decoder, compiled,
        gives values that are not finite"; None if all is well.
    """
    for network in networks:
        module = network.module
        ways: dict[str, Callable[..., Any]] = {"": module.forward}  # which is never compiled
        if compiled:
            ways[", compiled,"] = module
        exact = _pass(network, module.forward, None)
        for way, function in ways.items():
            with _same_random_numbers() if way else nullcontext():
                found = _pass(network, function, dtype)
            fault = _compare(found, exact)
            if fault is not None:
                return f"the {network.name}{way} {fault}"
    return None


def _same_random_numbers() -> AbstractContextManager[Any]:
    """Modules that are compiled inside draw the random numbers that they draw uncompiled."""
    from torch._inductor import config

    return config.patch(fallback_random=True)


@dataclass(frozen=True)
class _Pass:
    """Outputs, the example's gradient if any, and those of the parameters; all float32."""

    outputs: list[torch.Tensor]
    inputs: list[torch.Tensor]
    parameters: list[torch.Tensor]


def _pass(network: Network, function: Callable[..., Any], dtype: torch.dtype | None) -> _Pass:
    """One pass in `dtype`, None: float32, with random numbers that are the same each time."""
    example = network.example
    device = example.device
    inputs = [example] if example.requires_grad else []
    parameters = [p for p in network.module.parameters() if p.requires_grad]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            found = function(example)
        outputs = [found] if torch.is_tensor(found) else [x for layers in found for x in layers]
        outputs = [x.float() for x in outputs]
        gradients: list[torch.Tensor] = []
        if inputs or parameters:
            ways = [torch.randn(x.shape, device=device) / x.numel() ** 0.5 for x in outputs]
            found = torch.autograd.grad(
                outputs, [*inputs, *parameters], ways, allow_unused=True, materialize_grads=True
            )
            gradients = [x.float() for x in found]
    outputs = [x.detach() for x in outputs]
    return _Pass(outputs, gradients[: len(inputs)], gradients[len(inputs) :])


def _compare(found: _Pass, exact: _Pass) -> str | None:
    """What is wrong with a pass."""
    for x in (*found.outputs, *found.inputs, *found.parameters):
        if not torch.isfinite(x).all():
            return "gives values that are not finite"
    if (error := _error(found.outputs, exact.outputs)) > OUTPUT_ERROR:
        return f"is off by {error:.0%}"
    errors = [_error(found.inputs, exact.inputs), _error(found.parameters, exact.parameters)]
    if max(errors) > GRADIENT_ERROR:
        return f"has gradients off by {max(errors):.0%}"
    return None


def _error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """The largest relative error of a tensor, those that are small beside the others spared."""
    if not exact:
        return 0.0
    sizes = torch.stack([x.norm() for x in exact])
    typical = sizes.square().mean().sqrt()
    errors = torch.stack([(x - y).norm() for x, y in zip(found, exact, strict=True)])
    return float((errors / sizes.clamp(min=typical).clamp(min=1e-30)).max())
