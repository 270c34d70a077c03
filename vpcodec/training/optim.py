"""Optimisers, and learning rates as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from ..recipe.base import Discriminator, OptimConfig

ONECYCLE_START = 0.1  # relative to the peak


def learning_rate(step: int, steps: int, optim: OptimConfig) -> float:
    """Learning rate of update `step` (from 0) of `steps`; see `OptimConfig.schedule`."""
    if optim.schedule == "onecycle":
        peak = optim.peak_at * (steps - 1)
        if step < peak:
            return _between(ONECYCLE_START * optim.lr, optim.lr, step / peak)
        return _between(optim.lr, optim.final_lr, (step - peak) / max(1, steps - 1 - peak))
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    done = (step - optim.warmup_steps) / max(1, steps - 1 - optim.warmup_steps)
    return _between(optim.lr, optim.final_lr, done)


def _between(start: float, end: float, done: float) -> float:
    """A half cosine from `start` to `end`; `done` is 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


def build_optimizers(model: torch.nn.Module, optim: OptimConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters, or Muon for matrices of linear layers and AdamW for the rest.

    Parameters that need no gradient are left out. Weight decay applies to matrices and kernels, not
    to biases, norms and Snake's scale. The learning rate of each group is that of the step times
    the group's `scale`.
    """
    parts = {"encoder.": optim.encoder_lr} if optim.encoder_lr != 1 else {}
    adamw: list[dict[str, Any]] = []
    muon: list[dict[str, Any]] = []
    for part in (None, *parts):
        matrices, kernels, vectors = [], [], []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if part != next((p for p in parts if name.startswith(p)), None):
                continue
            plain = name.endswith("weight") and parameter.ndim >= 2
            if not plain or name.startswith("quantizer."):  # biases, norms, Snake's scale, codes
                vectors.append(parameter)
            elif optim.name == "muon" and parameter.ndim == 2:
                matrices.append(parameter)
            else:
                kernels.append(parameter)
        scale, decay = parts.get(part, 1.0), optim.weight_decay
        adamw.append({"params": kernels, "weight_decay": decay, "scale": scale})
        adamw.append({"params": vectors, "weight_decay": 0.0, "scale": scale})
        if matrices:
            muon.append({"params": matrices, "weight_decay": decay, "scale": scale})
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(adamw, lr=optim.lr, betas=optim.betas, fused=_on_gpu(model))
    ]
    if muon:
        optimizers.append(torch.optim.Muon(muon, lr=optim.lr, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], rate: float) -> None:
    """Set the learning rate of the next update: `rate` times the `scale` of each group, if any."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)


def build_discriminator_optimizer(
    discriminators: torch.nn.Module, config: Discriminator
) -> torch.optim.Optimizer:
    """AdamW for the discriminators."""
    return torch.optim.AdamW(
        discriminators.parameters(),
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=_on_gpu(discriminators),
    )


def _on_gpu(module: torch.nn.Module) -> bool:
    return any(parameter.is_cuda for parameter in module.parameters())
