"""Checks that networks compute the same in half precision as in float32.

They should, up to rounding, but libraries have faults on some processors: on Intel processors with
AMX, torch 2.11 returns NaN for some convolutions in bf16 and for compiled modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# Largest relative errors of tensors. Rounding to bf16 gives at most 0.012 and 0.07, in all recipes.
OUTPUT_ERROR, GRADIENT_ERROR = 0.05, 0.25


@dataclass(frozen=True)
class Network:
    """A network to check, with an input.

    Attributes:
        name: name of the network in messages.
        module: maps `example` to a tensor, or to lists of tensors.
        example: a batch; its gradient is compared as well if it requires one.
    """

    name: str
    module: nn.Module
    example: torch.Tensor


def find_fault(networks: Iterable[Network], dtype: torch.dtype, *, compiled: bool) -> str | None:
    """Compare a forward and backward pass of each network under autocast with one in float32.

    The states of random number generators and the gradients of parameters are left unchanged.

    Args:
        networks: the networks to check.
        dtype: the type to autocast to.
        compiled: whether the networks are compiled; then they are checked both ways.

    Returns:
        The first fault found, such as "the decoder, compiled, gives values that are not finite";
        None if there is none.
    """
    for network in networks:
        module = network.module
        variants: dict[str, Callable[..., Any]] = {"": module.forward}  # never compiled
        if compiled:
            variants[", compiled,"] = module
        exact = _pass(network, module.forward, None)
        for label, function in variants.items():
            with _same_random_numbers() if label else nullcontext():
                found = _pass(network, function, dtype)
            fault = _compare(found, exact)
            if fault is not None:
                return f"the {network.name}{label} {fault}"
    return None


def _same_random_numbers() -> AbstractContextManager[Any]:
    """Modules compiled in this context draw the same random numbers as uncompiled ones."""
    from torch._inductor import config

    return config.patch(fallback_random=True)


@dataclass(frozen=True)
class _Pass:
    """Outputs, and gradients of the example (if any) and of the parameters; all float32."""

    outputs: list[torch.Tensor]
    inputs: list[torch.Tensor]
    parameters: list[torch.Tensor]


def _pass(network: Network, function: Callable[..., Any], dtype: torch.dtype | None) -> _Pass:
    """One pass in `dtype` (None: float32), with the same random numbers each time."""
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
            weights = [torch.randn(x.shape, device=device) / x.numel() ** 0.5 for x in outputs]
            found = torch.autograd.grad(
                outputs, [*inputs, *parameters], weights, allow_unused=True, materialize_grads=True
            )
            gradients = [x.float() for x in found]
    outputs = [x.detach() for x in outputs]
    return _Pass(outputs, gradients[: len(inputs)], gradients[len(inputs) :])


def _compare(found: _Pass, exact: _Pass) -> str | None:
    """The fault of a pass, given the exact one; None if there is none."""
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
    """The largest relative error of a tensor; small tensors are compared with the typical norm."""
    if not exact:
        return 0.0
    sizes = torch.stack([x.norm() for x in exact])
    typical = sizes.square().mean().sqrt()
    errors = torch.stack([(x - y).norm() for x, y in zip(found, exact, strict=True)])
    return float((errors / sizes.clamp(min=typical).clamp(min=1e-30)).max())
