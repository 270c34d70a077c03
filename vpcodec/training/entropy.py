"""Fits the tables of the entropy coder: a small network trained on tokens, rounded to integers."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import save
from torch import nn

from ..backends.torch import load_model
from ..codec import AudioCodec, Codec, ImageCodec
from ..config import GridConfig, ModelConfig
from ..entropy import (
    AVERAGE_BITS,
    AVERAGE_SHIFT,
    FORMAT,
    HIDDEN_MAX,
    HIDDEN_SHIFT,
    IMAGE_FORMAT,
    LOGIT_SHIFT,
    ONE,
    TABLES,
    TokenCoder,
    parse_tables,
)
from ..media.audio import find_audio, load
from ..media.files import atomic_output
from ..media.image import find_images, load_image
from ..model_folder import ModelFolder, read_folder, write_folder_config
from ..progress import Progress

PAST_BITS = 8  # fractional bits of the weights from inputs to hidden units
PAST_MAX = (1 << 11) - 1
HIDDEN_BITS = ONE.bit_length() - 1 + PAST_BITS - HIDDEN_SHIFT  # fractional bits of hidden units
OUTPUT_BITS = 6  # fractional bits of the weights from hidden units to logits
OUTPUT_MAX = (1 << 9) - 1
LOGIT_BITS = HIDDEN_BITS + OUTPUT_BITS - LOGIT_SHIFT  # fractional bits of logits
EXPONENTIAL_BITS = 16
# What a token of an image sees: rows above it, columns to the right.
NEIGHBOURS = (
    (0, -1), (1, 0), (1, -1), (1, 1), (0, -2), (2, 0), (2, 1), (2, -1), (1, -2), (2, 2), (2, -2),
    (0, -3),
)  # fmt: skip
TILE = (64, 128)  # rows and columns of tokens


class TableError(ValueError):
    """Tables cannot be fitted to the tokens or codebook that are given."""


def fit_tables(
    sequences: Sequence[np.ndarray],
    config: ModelConfig,
    *,
    codes: np.ndarray | None = None,
    hidden: int = 128,
    lags: int = 4,
    averages: tuple[int, ...] = (2, 4),
    lane: int = 64,
    steps: int = 3000,
    batch: int = 2048,
    lr: float = 1.6e-2,
    weight_decay: float = 0.06,
    seed: int = 0,
    progress: Progress | None = None,
) -> bytes:
    """Train the network on tokens, and round it to integers.

    Args:
        sequences: int64 tokens, (N,) of recordings, (rows, columns) of images; evaluate the tables
            on others.
        config: configuration of the model that the tokens come from.
        codes: float (K, D) codebook, for quantizers that have one. Its codes are ordered as the
            leaves of a k-d tree, so that the digits of a token are a path through the tree.
        hidden: hidden units per digit.
        lags, averages, lane: see `TokenCoder`; for recordings only.
        steps, batch, lr, weight_decay, seed: of the training, with AdamW.
        progress: called with "fitting" and the training steps done.

    Returns:
        The bytes of a tables file.

    Raises:
        TableError: fewer tokens than a lane, or a codebook whose size is not a power of two.
    """
    torch.manual_seed(seed)
    levels, order = split_levels(config, codes)
    flat = [np.asarray(s, np.int64).ravel() for s in sequences]
    tokens = np.concatenate(flat or [np.zeros(0, np.int64)])
    if len(tokens) < lane:
        raise TableError(f"{len(tokens)} tokens are too few to fit tables to")
    if order is not None:
        tokens = order[tokens]
    radix = np.cumprod(levels) // levels
    digits = torch.from_numpy(tokens[:, None] // radix % np.array(levels))
    contexts: _Sequences | _Images
    if np.ndim(sequences[0]) == 2:
        contexts = _Images(levels, digits, [s.shape for s in sequences])
    else:
        contexts = _Sequences(levels, digits, list(map(len, sequences)), lags, averages, lane)
    network = _Network(levels, hidden=hidden, inputs=contexts.inputs)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    for step in range(steps):
        rows = torch.randint(0, len(digits), (batch,))
        loss = network.loss(contexts.rows(rows), contexts.onehot[rows].float(), digits[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress and (step + 1) % 20 == 0:
            progress("fitting", step + 1, steps)
    return network.tables(order, contexts.facts)


def split_levels(
    config: ModelConfig, codes: np.ndarray | None = None
) -> tuple[tuple[int, ...], np.ndarray | None]:
    """How a token is split into digits.

    Args:
        config: configuration of the model.
        codes: see `fit_tables`.

    Returns:
        Levels of the digits, and the rank of each code in the order that is coded, int64 (K,); None
        if tokens are coded as they are.

    Raises:
        TableError: there are no codes, or the size of the codebook is not a power of two.
    """
    quantizer = config.quantizer
    if isinstance(quantizer, GridConfig):
        return tuple(quantizer.levels), None
    size = config.codebook_size
    bits = size.bit_length() - 1
    if codes is None or size != 1 << bits:
        raise TableError(f"no tree can be built over a codebook of {size}")
    parts = -(-bits // 5)
    shares = [bits // parts + (i < bits % parts) for i in range(parts)]
    leaves = _kd_tree(codes)  # rank of each code; its highest bit tells the side of the first cut
    order, below = np.zeros(size, np.int64), bits
    radix = 1
    for share in shares:
        below -= share
        order += (leaves >> below & (1 << share) - 1) * radix
        radix <<= share
    return tuple(1 << share for share in shares), order


def _kd_tree(codes: np.ndarray) -> np.ndarray:
    """(K, D) codes -> int64 (K,) rank of each among the leaves of a tree of median cuts."""
    rank = np.empty(len(codes), np.int64)
    stack = [(np.arange(len(codes)), 0)]
    while stack:
        members, first = stack.pop()
        if len(members) == 1:
            rank[members] = first
            continue
        part = codes[members]
        axis = part.var(0).argmax()
        members = members[np.argsort(part[:, axis], kind="stable")]
        half = len(members) // 2
        stack += [(members[:half], first), (members[half:], first + half)]
    return rank


def _onehot(levels: tuple[int, ...], digits: torch.Tensor) -> torch.Tensor:
    """(N, D) digits -> float16 (N, S)."""
    offsets = torch.from_numpy(np.cumsum(levels) - np.array(levels))
    rows = torch.zeros(len(digits), sum(levels), dtype=torch.float16)
    return rows.scatter_(1, digits + offsets, 1)


class _Sequences:
    """What `TokenCoder` sees of recordings.

    Args:
        levels: of the digits.
        digits: (N, D) of all recordings, one after the other.
        lengths: of the recordings.
        lags, averages, lane: see `TokenCoder`.

    Attributes:
        onehot: float16 (N, S).
        inputs: numbers that the network sees.
        facts: of the tables file.
    """

    def __init__(
        self,
        levels: tuple[int, ...],
        digits: torch.Tensor,
        lengths: list[int],
        lags: int,
        averages: tuple[int, ...],
        lane: int,
    ) -> None:
        self.size, self.lags, self.averages = sum(levels), lags, averages
        self.inputs = lags * (self.size + 1) + len(averages) * self.size + 1
        self.facts = {
            "format": FORMAT,
            "levels": json.dumps(list(levels)),
            "averages": json.dumps(list(averages)),
            "lags": str(lags),
            "lane": str(lane),
        }
        position = np.concatenate([np.arange(n) for n in lengths if n]) % lane
        self.position = torch.from_numpy(position)
        self.onehot = _onehot(levels, digits)
        self.means = self._means()

    def _means(self) -> torch.Tensor:
        """Running averages, float16 (N, A * S)."""
        n, rows, position = len(self.onehot), self.onehot, self.position
        first = torch.nonzero(position == 0)[:, 0]
        length = torch.diff(first, append=torch.tensor([n]))
        averages = torch.zeros(n, len(self.averages) * self.size, dtype=torch.float16)
        state = torch.zeros(len(self.averages), len(first), self.size, dtype=torch.int32)
        for step in range(1, int(length.max())):
            alive = torch.nonzero(length > step)[:, 0]
            at = first[alive] + step
            seen = rows[at - 1].to(torch.int32) << AVERAGE_BITS
            for i, shift in enumerate(self.averages):
                value = state[i, alive]
                value += (seen - value) >> shift
                state[i, alive] = value
                columns = slice(i * self.size, (i + 1) * self.size)
                averages[at, columns] = (value >> AVERAGE_SHIFT).half()
        return averages / ONE

    def rows(self, frames: torch.Tensor) -> torch.Tensor:
        """What the network sees at some frames, float (n, inputs)."""
        parts = []
        for lag in range(1, self.lags + 1):
            there = (self.position[frames] >= lag)[:, None].float()
            parts += [self.onehot[(frames - lag).clamp(min=0)].float() * there, there]
        parts += [self.means[frames].float(), torch.ones(len(frames), 1)]
        return torch.cat(parts, 1)


class _Images:
    """What `ImageCoder` sees of images; see `_Sequences`.

    Args:
        levels: of the digits.
        digits: (N, D) of all images, one after the other, row by row.
        shapes: rows and columns of the images.
    """

    def __init__(
        self, levels: tuple[int, ...], digits: torch.Tensor, shapes: Sequence[tuple[int, ...]]
    ) -> None:
        self.inputs = len(NEIGHBOURS) * (sum(levels) + 1) + 1
        self.facts = {
            "format": IMAGE_FORMAT,
            "levels": json.dumps(list(levels)),
            "tile": json.dumps(list(TILE)),
            "neighbours": json.dumps([list(place) for place in NEIGHBOURS]),
        }
        self.onehot = _onehot(levels, digits)
        around, first = [], 0  # frame of each neighbour, or -1
        for rows, columns in shapes:
            row, column = np.divmod(np.arange(rows * columns), columns)
            near = []
            for up, right in NEIGHBOURS:
                there = (row % TILE[0] >= up) & (column % TILE[1] + right >= 0)
                there &= (column % TILE[1] + right < TILE[1]) & (column + right < columns)
                frame = first + (row - up) * columns + column + right
                near.append(np.where(there, frame, -1).astype(np.int32))
            around.append(np.stack(near, 1))
            first += rows * columns
        self.around = torch.from_numpy(np.concatenate(around))

    def rows(self, frames: torch.Tensor) -> torch.Tensor:
        """What the network sees at some frames, float (n, inputs)."""
        parts = []
        for near in self.around[frames].unbind(1):
            there = (near >= 0)[:, None].float()
            parts += [self.onehot[near.clamp(min=0)].float() * there, there]
        return torch.cat([*parts, torch.ones(len(frames), 1)], 1)


class _Network(nn.Module):
    """The network of `TokenCoder` in floating point, limited to the range of the integers."""

    def __init__(self, levels: tuple[int, ...], *, hidden: int, inputs: int) -> None:
        super().__init__()
        self.levels, self.hidden = levels, hidden
        self.depth, self.size = len(levels), sum(levels)
        self.offsets = np.cumsum(levels) - np.array(levels)
        self.past = nn.Parameter(torch.randn(inputs, self.depth * hidden) * 0.15)
        self.current = nn.Parameter(torch.randn(self.size, self.depth, hidden) * 0.05)
        known = torch.zeros(self.size, self.depth, 1)
        for k, offset in enumerate(self.offsets):
            known[:offset, k] = 1
        self.register_buffer("known", known)
        self.output = nn.Parameter(torch.randn(self.depth, hidden, max(levels)) * 0.05)
        self.bias = nn.Parameter(torch.zeros(self.depth, max(levels)))
        beyond = torch.arange(max(levels)) >= torch.tensor(levels)[:, None]
        self.register_buffer("beyond", beyond)

    def loss(
        self, inputs: torch.Tensor, onehot: torch.Tensor, digits: torch.Tensor
    ) -> torch.Tensor:
        """Nats per token.

        Args:
            inputs: what is seen of other frames, float (n, inputs).
            onehot: of the digits, float (n, S).
            digits: of the frames, (n, D).
        """
        limit = PAST_MAX / 2**PAST_BITS
        past = self.past.clamp(-limit, limit)
        sums = (inputs @ past).unflatten(1, (self.depth, self.hidden))
        current = (self.current * self.known).clamp(-limit, limit).flatten(1)
        sums = sums + (onehot @ current).unflatten(1, (self.depth, self.hidden))
        units = sums.clamp(0, HIDDEN_MAX / 2**HIDDEN_BITS)
        limit = OUTPUT_MAX / 2**OUTPUT_BITS
        logits = torch.einsum("nkh,kho->nko", units, self.output.clamp(-limit, limit)) + self.bias
        logits = logits.masked_fill(self.beyond, -1e9)
        return self.depth * F.cross_entropy(logits.flatten(0, 1), digits.flatten())

    @torch.no_grad()
    def tables(self, order: np.ndarray | None, facts: dict[str, str]) -> bytes:
        """The bytes of a tables file with these facts, checked by `parse_tables`."""

        def rounded(x: torch.Tensor, bits: int, most: int, dtype: type) -> np.ndarray:
            return np.ascontiguousarray(
                (x * 2**bits).round().clamp(-most, most).numpy().astype(dtype)
            )

        steps = np.arange(int((EXPONENTIAL_BITS + 1) * math.log(2) * 2**LOGIT_BITS) + 1)
        exponentials = 2.0**EXPONENTIAL_BITS * np.exp(-steps / 2**LOGIT_BITS)
        arrays = {
            "past": rounded(self.past, PAST_BITS, PAST_MAX, np.int16),
            "current": rounded(
                (self.current * self.known).flatten(1), PAST_BITS, PAST_MAX, np.int16
            ),
            "output": rounded(self.output, OUTPUT_BITS, OUTPUT_MAX, np.int16),
            "bias": rounded(self.bias, HIDDEN_BITS + OUTPUT_BITS, 1 << 20, np.int32),
            "exponentials": np.maximum(exponentials.round(), 1).astype(np.int32),
        }
        if order is not None:
            arrays["order"] = order.astype(np.int32)
        data = _with_metadata(save(arrays), facts)
        parse_tables(data)
        return data


def _with_metadata(data: bytes, metadata: dict[str, str]) -> bytes:
    """A safetensors file with metadata, in their order.

    The library writes metadata in any order, another one each time; a tables file is known by its
    hash.
    """
    size = int.from_bytes(data[:8], "little")
    entries = {"__metadata__": metadata, **json.loads(data[8 : 8 + size])}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def code_length(coder: TokenCoder, sequences: Sequence[np.ndarray]) -> float:
    """Bits per token that a coder needs for recordings or images, each coded as one block."""
    n_bytes = 0
    for tokens in (np.asarray(s, np.int64) for s in sequences if s.size):
        columns = tokens.shape[1] if tokens.ndim == 2 else None
        n_bytes += len(coder.pack(tokens.reshape(-1, 1), columns))
    return 8 * n_bytes / sum(s.size for s in sequences)


def add_tables(
    folder: Path,
    data: Path,
    *,
    hours: float = 6.0,
    hidden: int = 128,
    steps: int = 3000,
    seed: int = 0,
    progress: Progress | None = None,
) -> float:
    """Fit tables to the tokens of recordings or images, and add them to a model folder as its
    newest.

    Each image counts three times: as it is, mirrored, and without its first half hop, which moves
    the grid of tokens.

    Args:
        folder: model folder; its config.json is written last.
        data: folder of recordings or images, preferably those that the model was trained on.
        hours: hours of audio to use, from files drawn at random; of images, all are used.
        hidden, steps, seed: see `fit_tables`.
        progress: called with "encoding" and with "fitting".

    Returns:
        Bits per token on the data themselves.

    Raises:
        TableError: no audio files or images, or tokens that no tables can be fitted to.
        AudioError, ImageError: a file cannot be read.
        ModelError: the model folder is missing or damaged.
    """
    model = read_folder(folder)
    codec = Codec.from_pretrained(folder)
    is_audio = isinstance(codec, AudioCodec)
    paths = find_audio(data) if is_audio else find_images(data)
    if not paths:
        raise TableError(f"{data}: no {'audio files' if is_audio else 'images'}")
    if is_audio:
        paths = [paths[i] for i in np.random.default_rng(seed).permutation(len(paths))]
    sequences, seconds = [], 0.0
    for i, path in enumerate(paths):
        if isinstance(codec, ImageCodec):
            for view in _views(load_image(data / path), codec.hop_length):
                sequences += list(codec.encode(view))
        elif isinstance(codec, AudioCodec):
            samples, rate = load(data / path)
            sequences += list(codec.encode(samples, rate))
            seconds += samples.size / rate
        if progress:
            progress("encoding", i + 1, len(paths))
        if seconds >= 3600 * hours:
            break
    if progress:
        progress("encoding", 1, 1)
    codes = None
    if not isinstance(model.config.quantizer, GridConfig):
        codes = _codebook(model)
    tables = fit_tables(
        sequences,
        model.config,
        codes=codes,
        hidden=hidden,
        steps=steps,
        seed=seed,
        progress=progress,
    )
    _add_newest(model, tables)
    return code_length(parse_tables(tables), sequences[:100])


def _views(pixels: np.ndarray, hop: int) -> list[np.ndarray]:
    """An image (H, W, C) as it is, mirrored, and with the grid of tokens moved by half a hop."""
    views = [pixels, pixels[:, ::-1]]
    moved = pixels[hop // 2 :, hop // 2 :]
    height, width = (side // hop * hop for side in moved.shape[:2])
    return [*views, moved[:height, :width]] if height and width else views


def _add_newest(model: ModelFolder, tables: bytes) -> None:
    """Write a tables file, then list it last in config.json, which is what makes it take effect."""
    digest = hashlib.sha256(tables).hexdigest()
    same = [name for name in model.tables if model.files[name] == digest]
    name = same[0] if same else f"entropy-{digest[:8]}.safetensors" if model.tables else TABLES
    others = [other for other in model.files if other != name]
    if any(model.files[other][:4] == digest[:4] for other in model.tables if other != name):
        raise TableError(f"{model.path}: the id of these tables is taken; use another seed")
    with atomic_output(model.path / name) as file:
        file.write(tables)
    write_folder_config(
        model.path,
        model.config,
        model.fingerprint,
        [*others, name],
        source=model.source,
        space=model.stated_space,
        earlier=model.earlier,
        revisions=model.revisions,
    )


def _codebook(model: ModelFolder) -> np.ndarray:
    """Codes of a model's codebook, float32 (K, D)."""
    tokens = torch.arange(model.config.codebook_size)
    return load_model(model).quantizer.tokens_to_latents(tokens).detach().float().numpy()
