"""Decoder levels in tiles and attention in blocks, for graphs that need little memory.

The layers between two enhance blocks are local, and some hundred channels wide at the sample rate.
A graph computes them tile by tile, each tile with a halo on both sides.
"""

from __future__ import annotations

import copy

import onnx
import torch
from torch import nn

from .network import BlockAttention, Level, SQCodecAutoencoder, TransformerLayer

TILE_NUMBERS = 1 << 19  # elements of the widest tensor of a tile
SHORTEST_TILE = 80  # in units of the halo; two halos more are computed and dropped


def tiled(model: SQCodecAutoencoder) -> SQCodecAutoencoder:
    """A copy of a model with the same results, for export; see `settle`."""
    model = copy.deepcopy(model)
    model.decoder.levels = nn.ModuleList(Tiles(level) for level in model.decoder.levels)
    for module in model.decoder.modules():
        if isinstance(module, TransformerLayer):
            module.blocks = Blocks()
    return model


class Blocks(BlockAttention):
    """Attention block by block: the weights of all blocks of a clip would take gigabytes."""

    def forward(self, q, k, v, missing: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        def block(q, k, v, missing, bias):
            return (BlockAttention.forward(self, q, k, v, missing, bias),)

        each = [y.transpose(0, 1).contiguous() for y in (q, k, v, missing)]
        (y,) = torch.ops.higher_order.scan(block, (), each, (bias,))
        return y.transpose(0, 1)


class Tiles(nn.Module):
    """A level computed tile by tile, for whole clips; it is fast only as a graph.

    Tiles have equal lengths, limited by `TILE_NUMBERS` and no longer than needed.
    """

    def __init__(self, level: Level) -> None:
        super().__init__()
        self.level = level
        self.halo = -(-level.reach // level.stride) + 1  # one step for the interpolation
        longest = TILE_NUMBERS // (level.width * level.stride)
        self.longest = max(longest, SHORTEST_TILE * self.halo)

    def forward(self, x: torch.Tensor, trends: torch.Tensor) -> torch.Tensor:
        """(B, T, C) and (B, T, 4) -> the output of `Level`."""
        steps, stride = x.shape[1], self.level.stride
        count = (steps + self.longest - 1) // self.longest
        length = (steps + count - 1) // count
        at = torch.arange(length + 2 * self.halo) - self.halo
        at = at + length * torch.arange(count).unsqueeze(1)
        inside = ((at >= 0) & (at < steps)).to(x.dtype)
        at = at.clamp(min=0, max=steps - 1)  # as the interpolation does beyond the ends
        weights = dict(self.level.named_parameters())

        def tile(at, inside, x, trends, *values):
            parts = [y.index_select(0, at).transpose(0, 1) for y in (x, trends)]
            named = dict(zip(weights, values))
            y = torch.func.functional_call(self.level, named, (*parts, inside))
            return (y[:, self.halo * stride : -self.halo * stride].transpose(0, 1).contiguous(),)

        # Time first, because tiles are concatenated.
        clip = [y.transpose(0, 1).contiguous() for y in (x, trends)]
        (y,) = torch.ops.higher_order.scan(tile, (), (at, inside), (*clip, *weights.values()))
        return y.flatten(0, 1).narrow(0, 0, steps * stride).transpose(0, 1)


def settle(graph: onnx.ModelProto) -> None:
    """Prepare the bodies of a graph's loops: remove metadata, and move their weights into them.

    ONNX Runtime optimises the layout of convolutions only if their weights are in the same graph.
    """
    bodies = [a.g for node in graph.graph.node for a in node.attribute if a.name == "body"]
    for body in bodies:
        body.ClearField("value_info")
        for entry in (*body.node, *body.input, *body.output):
            entry.ClearField("doc_string")
            entry.ClearField("metadata_props")
    used = [{name for node in part.node for name in node.input} for part in (graph.graph, *bodies)]
    for tensor in list(graph.graph.initializer):
        users = [i for i, names in enumerate(used) if tensor.name in names]
        if len(users) == 1 and users[0] > 0:
            bodies[users[0] - 1].initializer.append(tensor)
            graph.graph.initializer.remove(tensor)
