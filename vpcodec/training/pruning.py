"""Pruning: smaller audio models from trained ones, without the hidden units that matter least.

The units of a hidden layer are removed one at a time with Optimal Brain Surgeon (Hassibi and Stork,
1993), applied to the whole column of a unit in the matrix W that follows the layer. With
H = E[h h^T] over the hidden activations h on real signals, removing unit p costs

    |w_p|^2 / (2 [H^-1]_pp),    and    W <- W - w_p [H^-1]_p / [H^-1]_pp

is the update of the remaining columns that compensates for it best. Training continues from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
from ..progress import Progress
from ..recipe import Recipe
from .modalities import make_task

DAMPING = 1e-4  # relative to the mean of the diagonal of H
# Fields whose values can become smaller.
SHRINK = {"attention_window", "expansion"} | {
    f"{part}_{what}"
    for part in PARTS
    for what in ("depths", "layers", "expansions", "feedforward_dim")
}
# Fields that may differ in any way.
FREE = {"name", "description", "license"}


class PruningError(ValueError):
    """A model cannot be pruned to the configuration that is asked for."""


def prune_folder(
    folder: Path,
    recipe: Recipe,
    target: Path,
    *,
    batches: int = 16,
    progress: Progress | None = None,
) -> int:
    """Prune a model to the smaller one of a recipe; training can start from the result.

    Args:
        folder: model folder of a native audio model.
        recipe: recipe of the smaller model; its data decide which hidden units matter.
        target: safetensors file to write.
        batches: number of batches of the recipe's data to use.
        progress: called with "batches".

    Returns:
        Number of parameters of the smaller model.

    Raises:
        PruningError: the model cannot be pruned to that of the recipe.
        DataError: the data of the recipe cannot be used.
        ModelError: the model folder is missing or damaged.
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
                if progress:
                    progress("batches", done, batches)

        smaller = prune(load_model(found), recipe.model, samples())
    with atomic_output(target) as file:
        file.write(save(smaller.state_dict(), metadata={"format": "pt"}))
    return sum(parameter.numel() for parameter in smaller.parameters())


@torch.no_grad()
def prune(
    model: AudioAutoencoder, config: AudioConfig, batches: Iterable[torch.Tensor]
) -> AudioAutoencoder:
    """A smaller model with weights taken from a trained one.

    Hidden layers can become narrower (`expansion`, `*_expansions`, `*_feedforward_dim`), stages and
    Transformers shallower (their first units are kept), and `attention_window` shorter.

    Args:
        model: the trained model; its quantizer is fitted.
        config: configuration of the smaller model.
        batches: (B, T) samples typical of the model's use, at its sample rate, T a multiple of the
            hop.

    Raises:
        PruningError: `config` is larger somewhere, or differs in a field that pruning cannot
            change.
    """
    for field in sorted(AudioConfig.model_fields.keys() - SHRINK - FREE):
        if getattr(config, field) != getattr(model.config, field):
            raise PruningError(
                f"{field} differs: {', '.join(sorted(SHRINK))} can become smaller, nothing else"
            )
    smaller = build_model(config).eval()
    wide, narrow = dict(model.named_modules()), dict(smaller.named_modules())
    prunable = (ConvUnit, TransformerLayer)
    names = [
        name
        for name, layer in narrow.items()
        if isinstance(layer, prunable)
        and type(wide.get(name)) is type(layer)
        and layer.narrow.in_features < wide[name].narrow.in_features
    ]
    weights = model.state_dict()
    for name, layer in narrow.items():
        bias = f"{name}.distance_bias"
        if isinstance(layer, LocalAttention) and bias in weights:
            weights[bias] = weights[bias][: layer.window]
    thinned = {f"{name}.{part}" for name in names for part in ("widen", "gate", "narrow")}
    for name, value in smaller.state_dict().items():
        if name.startswith("quantizer."):  # its lazy buffers may be empty in the smaller model
            continue
        if name.rpartition(".")[0] in thinned:  # pruned below
            continue
        if name not in weights or weights[name].shape != value.shape:
            found = tuple(weights[name].shape) if name in weights else "absent"
            raise PruningError(
                f"{name}: larger than in the model: {tuple(value.shape)} instead of {found}"
            )
    moments = _second_moments(model, {name: wide[name].narrow for name in names}, batches)
    for name in names:
        keep = narrow[name].narrow.in_features
        weights |= {f"{name}.{k}": v for k, v in _thin(wide[name], moments[name], keep).items()}
    smaller.load_state_dict({k: v for k, v in weights.items() if k in smaller.state_dict()})
    return smaller


def _second_moments(
    model: AudioAutoencoder, layers: dict[str, nn.Linear], batches: Iterable[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """E[h h^T] of the inputs h of each layer, with a 1 appended: float64 (H + 1, H + 1)."""
    if not layers:  # only depths shrink
        return {}
    sums = {name: torch.zeros((), dtype=torch.float64) for name in layers}
    rows = dict.fromkeys(layers, 0)

    def accumulate_into(name: str):
        def hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            h = inputs[0].flatten(0, -2).double()
            h = torch.cat([h, torch.ones_like(h[:, :1])], 1)
            sums[name] = sums[name] + h.T @ h
            rows[name] += len(h)

        return hook

    hooks = [layer.register_forward_hook(accumulate_into(name)) for name, layer in layers.items()]
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
    """Weights of a layer reduced to `keep` hidden units, by their name within the layer."""
    last = layer.narrow
    if isinstance(layer, TransformerLayer):
        kept, weight = surgeon(moments[:-1, :-1], last.weight, keep)
        gate = torch.cat([kept, last.in_features + kept])  # rows of the values, then of the gates
        return {"gate.weight": layer.gate.weight[gate], "narrow.weight": weight}
    # The bias is the column of a unit that is always 1, which is never removed.
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
    """Optimal Brain Surgeon on the columns of a matrix.

    Args:
        moments: H, (N, N), second moments of the N inputs of the matrix.
        weight: W, (C, N).
        keep: number of inputs to keep.
        fixed: number of inputs at the end that are always kept.

    Returns:
        Indices of the inputs that are kept, ascending, int64 (keep,), and their columns, float32
        (C, keep).
    """
    h, w = moments.double(), weight.double().clone()
    n = len(h)
    inverse = torch.linalg.inv(h + DAMPING * h.diagonal().mean() * torch.eye(n).to(h))
    present = torch.ones(n, dtype=torch.bool)
    removable = present.clone()
    removable[n - fixed :] = False
    for _ in range(n - keep):
        costs = w.square().sum(0) / inverse.diagonal()
        p = int(costs.where(removable, torch.inf).argmin())
        row, pivot = inverse[p].clone(), inverse[p, p].clone()
        w -= torch.outer(w[:, p], row / pivot)
        inverse -= torch.outer(row, row) / pivot
        w[:, p], inverse[p, p] = 0, 1
        present[p] = removable[p] = False
    kept = torch.nonzero(present)[:, 0]
    return kept, w[:, kept].float()
