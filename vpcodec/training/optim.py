"""Optimisers, and learning rates as functions of the step."""

from __future__ import annotations

import math

import torch

from ..recipe.base import Discriminator, OptimConfig

ONECYCLE_START = 0.1  # of the peak


def learning_rate(step: int, steps: int, optim: OptimConfig) -> float:
    """Of the update number `step` (from 0) of `steps`; see `OptimConfig.schedule`."""
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
    """Half a cosine from `start` to `end`."""
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


def build_optimizers(model: torch.nn.Module, optim: OptimConfig) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for matrices of linear layers and AdamW for the rest.

    Parameters that need no gradient are left out. Weight decay applies to matrices and kernels, not
    to biases, norms and Snake's scale.
    """
    matrices, kernels, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = name.endswith("weight") and parameter.ndim >= 2
        if not plain or name.startswith("quantizer."):  # biases, norms, Snake's scale, codes
            vectors.append(parameter)
        elif optim.name == "muon" and parameter.ndim == 2:
            matrices.append(parameter)
        else:
            kernels.append(parameter)
    decay = optim.weight_decay
    groups = [{"params": kernels, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=_on_gpu(model))
    ]
    if matrices:
        muon = torch.optim.Muon(
            matrices, lr=optim.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
        )
        optimizers.append(muon)
    return optimizers


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
