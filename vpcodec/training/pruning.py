"""Smaller audio models from trained ones: hidden units that matter least are taken out.

A hidden layer's units are removed one by one with Optimal Brain Surgeon (Hassibi and Stork, 1993),
here for the whole column that a unit has in the matrix W after the layer. With H = E[h h^T] of the
hidden units h on real signals, removing unit p costs

    |w_p|^2 / (2 [H^-1]_pp),    and    W <- W - w_p [H^-1]_p / [H^-1]_pp

makes the others stand in for it as well as they can. Training goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from ..backends.torch import load_model
from ..config import PARTS, AudioConfig
from ..media.files import atomic_output
from ..model_folder import read_folder
from ..models import build_model
from ..models.audio import AudioAutoencoder
from ..models.layers import ConvUnit
from ..models.local_attention import LocalAttention, TransformerLayer
from ..recipe import Recipe
from .kinds import make_task

DAMPING = 1e-4  # of the mean of H's diagonal
SHRINK = {"attention_window", "expansion"} | {
    f"{part}_{what}"
    for part in PARTS
    for what in ("depths", "layers", "expansions", "feedforward_dim")
}  # fields whose values can become smaller
FREE = {"name", "description", "license"}


class PruningError(ValueError):
    """A model that cannot be made smaller in this way."""


def prune_folder(
    folder: Path,
    recipe: Recipe,
    target: Path,
    *,
    batches: int = 16,
    report: Callable[[str, int, int], None] | None = None,
) -> int:
    """Weights of a recipe's model from those of a larger one, as `--init-from` takes them.

    Args:
        folder: of a native audio model.
        recipe: of the smaller one; hidden units are judged by its data.
        target: safetensors file to make.
        batches: of the recipe's data.
        report: called with "batches", how many are done and how many there are.

    Returns:
        Parameters of the smaller model.

    Raises:
        PruningError, DataError, ModelError: it cannot be done.
    """
    found = read_folder(folder)
    for config in (found.config, recipe.model):
        if not isinstance(config, AudioConfig):
            raise PruningError(f"{config.name}: not a native audio model")
    crops = make_task(recipe).crops(process=0, processes=1, workers=0)
    with closing(crops.batches(0, batches)) as read:

        def samples() -> Iterator[torch.Tensor]:
            for done, batch in enumerate(read, 1):
                yield torch.from_numpy(batch)
                if report:
                    report("batches", done, batches)

        smaller = prune(load_model(found), recipe.model, samples())
    with atomic_output(target) as file:
        file.write(save(smaller.state_dict(), metadata={"format": "pt"}))
    return sum(parameter.numel() for parameter in smaller.parameters())


@torch.no_grad()
def prune(
    model: AudioAutoencoder, config: AudioConfig, batches: Iterable[torch.Tensor]
) -> AudioAutoencoder:
    """A model of `config` with what `model` knows.

    Hidden layers may be narrower (`expansion` and its like, `*_feedforward_dim`), stages and
    Transformers shorter, whose first units are kept, and `attention_window` too.

    Args:
        model: to take the weights of; fitted.
        config: of the smaller one.
        batches: (B, T) samples that the model is meant for, at its rate, T a multiple of the hop.

    Raises:
        PruningError: something is larger in `config`, or another part differs.
    """
    for field in sorted(AudioConfig.model_fields.keys() - SHRINK - FREE):
        if getattr(config, field) != getattr(model.config, field):
            raise PruningError(
                f"{field} differs: {', '.join(sorted(SHRINK))} can become smaller, nothing else"
            )
    smaller = build_model(config).eval()
    wide, narrow = dict(model.named_modules()), dict(smaller.named_modules())
    kinds = (ConvUnit, TransformerLayer)
    names = [
        name
        for name, layer in narrow.items()
        if isinstance(layer, kinds)
        and type(wide.get(name)) is type(layer)
        and layer.narrow.in_features < wide[name].narrow.in_features
    ]
    weights = model.state_dict()
    for name, layer in narrow.items():
        at = f"{name}.distance_bias"
        if isinstance(layer, LocalAttention) and at in weights:
            weights[at] = weights[at][: layer.window]
    thinned = {f"{name}.{part}" for name in names for part in ("widen", "gate", "narrow")}
    for name, value in smaller.state_dict().items():
        if name.startswith("quantizer."):  # whose tables may be empty here
            continue
        if name.rpartition(".")[0] in thinned:  # below
            continue
        if name not in weights or weights[name].shape != value.shape:
            there = tuple(weights[name].shape) if name in weights else "absent"
            raise PruningError(f"{name}: larger than in the model, {tuple(value.shape)}, {there}")
    moments = _second_moments(model, {name: wide[name].narrow for name in names}, batches)
    for name in names:
        keep = narrow[name].narrow.in_features
        weights |= {f"{name}.{k}": v for k, v in _thin(wide[name], moments[name], keep).items()}
    smaller.load_state_dict({k: v for k, v in weights.items() if k in smaller.state_dict()})
    return smaller


def _second_moments(
    model: AudioAutoencoder, layers: dict[str, nn.Linear], batches: Iterable[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """E[h h^T] of what goes into each layer, followed by 1: float64 (H + 1, H + 1)."""
    if not layers:  # nothing to judge, as where only depths shrink
        return {}
    sums = {name: torch.zeros((), dtype=torch.float64) for name in layers}
    rows = dict.fromkeys(layers, 0)

    def watch(name: str):
        def see(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            h = inputs[0].flatten(0, -2).double()
            h = torch.cat([h, torch.ones_like(h[:, :1])], 1)
            sums[name] = sums[name] + h.T @ h
            rows[name] += len(h)

        return see

    hooks = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        for samples in batches:
            model.decode(model.encode(samples))
    finally:
        for hook in hooks:
            hook.remove()
    if not all(rows.values()):
        raise PruningError("no samples to judge hidden units by")
    return {name: sums[name] / rows[name] for name in layers}


def _thin(
    layer: ConvUnit | TransformerLayer, moments: torch.Tensor, keep: int
) -> dict[str, torch.Tensor]:
    """Weights of a layer with `keep` of its hidden units, by name within it."""
    last = layer.narrow
    if isinstance(layer, TransformerLayer):
        kept, weight = surgeon(moments[:-1, :-1], last.weight, keep)
        gate = torch.cat([kept, last.in_features + kept])  # values, then gates
        return {"gate.weight": layer.gate.weight[gate], "narrow.weight": weight}
    # The bias is the column of a unit that is always 1, which stays.
    columns = torch.cat([last.weight, last.bias[:, None]], 1)
    kept, columns = surgeon(moments, columns, keep + 1, fixed=1)
    first = layer.widen
    return {
        "widen.weight": first.weight[kept[:-1]],
        "widen.bias": first.bias[kept[:-1]],
        "narrow.weight": columns[:, :-1],
        "narrow.bias": columns[:, -1],
    }


def surgeon(
    moments: torch.Tensor, weight: torch.Tensor, keep: int, *, fixed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Optimal Brain Surgeon over the columns of a matrix.

    Args:
        moments: H, (N, N), of the N inputs that the matrix has.
        weight: W, (C, N).
        keep: how many of the inputs stay.
        fixed: the last so many of them stay in any case.

    Returns:
        Which stay, rising, int64 (keep,), and their columns, float32 (C, keep).
    """
    h, w = moments.double(), weight.double().clone()
    n = len(h)
    inverse = torch.linalg.inv(h + DAMPING * h.diagonal().mean() * torch.eye(n).to(h))
    there = torch.ones(n, dtype=torch.bool)
    removable = there.clone()
    removable[n - fixed :] = False
    for _ in range(n - keep):
        costs = w.square().sum(0) / inverse.diagonal()
        p = int(costs.where(removable, torch.inf).argmin())
        row, pivot = inverse[p].clone(), inverse[p, p].clone()
        w -= torch.outer(w[:, p], row / pivot)
        inverse -= torch.outer(row, row) / pivot
        w[:, p], inverse[p, p] = 0, 1  # out of the game
        there[p] = removable[p] = False
    kept = torch.nonzero(there)[:, 0]
    return kept, w[:, kept].float()
