"""Entropy coding of tokens: an rANS coder driven by a small integer network.

A token is split into digits (the levels of FSP and FSQ, or the path to a code in a tree over the
codebook). The probabilities of each digit come from one hidden layer that sees the digits of
earlier frames, two running averages of older ones, and the digits of the frame that are already
known. All of it is integer arithmetic on tables that belong to the model, so encoder and decoder
agree on every machine: matrix products run in float32 on integers whose sums stay below 2^24, where
float32 is exact in any order of summation. docs/token-format.md specifies the coding.

A block of audio is cut into lanes of `lane` frames that do not see each other, a block of an image
into tiles, in which a token sees those around it that come before it. The network runs on all lanes
at once, or on the rows of all tiles, and one rANS state codes their digits in turn.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .threads import one_blas_thread

# The first tables of a model; the names of later ones contain the beginning of their hash.
TABLES = "entropy.safetensors"
MAX_TABLES_BYTES = 1 << 26
FORMAT, IMAGE_FORMAT = "1", "2"  # of the tables
TABLES_ID_BYTES = 2  # of the tables' SHA-256, in front of each payload

PRECISION = 15  # bits of a probability
LOW = 1 << 16  # of the rANS state, which stays below 2^32 and moves 16 bits at a time
EXACT = 1 << 24  # integers below it are exact in float32
ONE = 128  # value of an input that is present
AVERAGE_BITS = 14  # of the running averages
AVERAGE_SHIFT = AVERAGE_BITS - ONE.bit_length() + 1  # from running averages to inputs
HIDDEN_SHIFT = 11  # from sums to hidden units
HIDDEN_MAX = 127
ROWS = 512  # frames that go through the network at once when all are known
LOGIT_SHIFT = 5  # from sums to indices into the exponentials
REACH = 8  # of a neighbour, in rows and in columns


class EntropyError(ValueError):
    """Damaged tables, or a payload that was not coded with them; the message is one line."""


class TokenCoder:
    """Codes blocks of tokens with the entropy tables of one model.

    Args:
        levels: number of values of each digit; their product is the codebook size K.
        past: int16 (I, D * H), rows for the inputs from earlier frames: for each lag the one-hot
            digits and a flag that the frame exists, then the averages, then a constant.
        current: int16 (S, D * H), rows for the digits of the same frame; S is sum(levels).
        output: int16 (D, H, max(levels)), from hidden units to the digit's values.
        bias: int32 (D, max(levels)).
        exponentials: int32 (E,), decreasing, from about 2^16 to at least 1.
        lags: number of earlier frames that are inputs.
        averages: shifts of the running averages, in order.
        lane: frames per lane.
        order: int32 (K,), a permutation applied to tokens before they are split; None: identity.
        tables_id: first bytes of the SHA-256 of the tables file.

    Raises:
        EntropyError: shapes that do not fit, or numbers too large for exact float32.
    """

    def __init__(
        self,
        *,
        levels: tuple[int, ...],
        past: np.ndarray,
        current: np.ndarray,
        output: np.ndarray,
        bias: np.ndarray,
        exponentials: np.ndarray,
        lags: int,
        averages: tuple[int, ...],
        lane: int,
        order: np.ndarray | None = None,
        tables_id: bytes = bytes(TABLES_ID_BYTES),
    ) -> None:
        self.levels = np.array(levels, np.int64)
        self.lags, self.averages, self.lane, self.tables_id = lags, averages, lane, tables_id
        self.size = int(self.levels.sum())
        self.offsets = np.cumsum(self.levels) - self.levels
        self.codebook_size = int(np.prod(self.levels))
        self.radix = np.cumprod(self.levels) // self.levels
        self.depth, self.hidden, _ = output.shape
        self.inputs = lags * (self.size + 1) + len(averages) * self.size + 1
        self._check(past, current, output, bias, exponentials, order)
        self.order = None if order is None else order.astype(np.int64)
        # Scaled by powers of two, which is exact, in place of the shifts.
        self.past = past.astype(np.float32) * 2.0**-HIDDEN_SHIFT
        known = current.astype(np.float32) * (ONE * 2.0**-HIDDEN_SHIFT)
        self.current = [  # for each digit, the units of the digits after it
            np.ascontiguousarray(known[first : first + n, (k + 1) * self.hidden :])
            for k, (first, n) in enumerate(zip(self.offsets, levels))
        ]
        scaled = output.astype(np.float32) * 2.0**-LOGIT_SHIFT, bias * 2.0**-LOGIT_SHIFT
        self.output = [np.ascontiguousarray(scaled[0][k, :, :n].T) for k, n in enumerate(levels)]
        self.bias = [scaled[1][k, :n, None].astype(np.float32) for k, n in enumerate(levels)]
        self.exponentials = exponentials.astype(np.int64)
        self._spread = [(1 << PRECISION) - n for n in levels]
        self._least = [np.arange(1, n + 1)[:, None] for n in levels]

    def _check(
        self,
        past: np.ndarray,
        current: np.ndarray,
        output: np.ndarray,
        bias: np.ndarray,
        exponentials: np.ndarray,
        order: np.ndarray | None,
    ) -> None:
        if not (self.levels >= 2).all() or (self.levels > 1 << 10).any():
            raise EntropyError("levels must be 2 to 1024")
        if min(self.lags, self.lane) < 1 or self.lane > 1 << 12 or self.lags > 64:
            raise EntropyError("lags and lane must be positive")
        if len(self.averages) > 8 or any(not 1 <= shift <= 12 for shift in self.averages):
            raise EntropyError("averages must be shifts of 1 to 12")
        units = self.depth * self.hidden
        shapes = {
            "past": (past, (self.inputs, units)),
            "current": (current, (self.size, units)),
            "output": (output, (len(self.levels), self.hidden, int(self.levels.max()))),
            "bias": (bias, (len(self.levels), int(self.levels.max()))),
        }
        for name, (array, shape) in shapes.items():
            if array.shape != shape or array.dtype.kind != "i":
                raise EntropyError(f"{name} has shape {array.shape}, not {shape}")
        if exponentials.ndim != 1 or not exponentials.size or exponentials.dtype.kind != "i":
            raise EntropyError("exponentials are not a list of integers")
        if exponentials.min() < 1 or exponentials.max() > 1 << 17:
            raise EntropyError("exponentials must be 1 to 2^17")
        if order is not None and not np.array_equal(np.sort(order), np.arange(self.codebook_size)):
            raise EntropyError("order is not a permutation of the codebook")
        # One row of each group of one-hot digits counts; averages sum to at most one row.
        wide = np.abs(past.astype(np.int64))

        def flags(rows: np.ndarray) -> np.ndarray:
            return np.maximum.reduceat(rows, self.offsets).sum(0)

        reach = wide[-1] + flags(np.abs(current.astype(np.int64)))
        step = self.size + 1
        for lag in range(self.lags):
            group = wide[lag * step : (lag + 1) * step]
            reach = reach + flags(group[:-1]) + group[-1]
        for start in range(self.lags * step, self.inputs - 1, self.size):
            reach = reach + flags(wide[start : start + self.size])
        sums = HIDDEN_MAX * np.abs(output.astype(np.int64)).sum(1) + np.abs(bias.astype(np.int64))
        if max(ONE * reach.max(), 2 * sums.max()) >= EXACT:
            raise EntropyError("numbers too large to be exact")

    # --------------------------------------------------------------------------- public

    def pack(self, tokens: np.ndarray, columns: int | None = None) -> bytes:
        """Code a block.

        Args:
            tokens: int64 (n_frames, channels) in [0, codebook_size).
            columns: of an image, whose frames go row by row; None: audio.

        Returns:
            The payload.
        """
        with one_blas_thread():
            starts, widths = self._symbols(tokens, columns or len(tokens))
        return self.tables_id + _push(starts, widths)

    def unpack(
        self, payload: bytes, n_frames: int, channels: int, columns: int | None = None
    ) -> np.ndarray:
        """Decode a block.

        Args:
            payload: from `pack` with the same tables.
            n_frames: of the block.
            channels: of the block.
            columns: as for `pack`.

        Returns:
            int64 (n_frames, channels).

        Raises:
            EntropyError: coded with other entropy tables, or damaged.
        """
        if payload[:TABLES_ID_BYTES] != self.tables_id:
            raise EntropyError("coded with other entropy tables")
        source = _Source(payload[TABLES_ID_BYTES:])
        with one_blas_thread():
            tokens = self._read(source, n_frames, channels, columns or n_frames)
        source.close()
        return tokens if self.order is None else self._inverse[tokens]

    # --------------------------------------------------------------------------- blocks

    def _symbols(self, tokens: np.ndarray, columns: int) -> tuple[list[int], list[int]]:
        """Where the intervals of a block's digits start, and their widths, in coding order."""
        lanes, lengths = self._lanes(tokens.T)
        digits = self._digits(lanes)  # (G, T, D)
        starts, frequencies = self._intervals(digits)
        alive = np.arange(lanes.shape[1])[:, None] < lengths
        alive = np.broadcast_to(alive[:, None], (lanes.shape[1], self.depth, len(lanes)))
        starts = starts.transpose(1, 2, 0)[alive].tolist()
        frequencies = frequencies.transpose(1, 2, 0)[alive].tolist()
        return starts, frequencies

    def _read(self, source: _Source, n_frames: int, channels: int, columns: int) -> np.ndarray:
        """The tokens of a block, (n_frames, channels), before `order` is undone."""
        lanes, lengths = self._lanes(np.zeros((channels, n_frames), np.int64))
        context = _Context(self, len(lanes))
        shortest = int(lengths.min())
        keep = np.arange(len(lanes))
        for step in range(lanes.shape[1]):
            if step == shortest:
                keep = np.flatnonzero(lengths > step)
                context.keep(keep)
            digits = self._take(source, context.sums())
            lanes[keep, step] = digits @ self.radix
            context.push(digits)
        return lanes.reshape(channels, -1)[:, :n_frames].T

    def predict(self, tokens: np.ndarray, n_frames: int) -> np.ndarray:
        """Continue tokens with what the network expects.

        Digits are the medians of their distributions where they are ordered, as those of FSP are,
        and the likeliest otherwise.

        Args:
            tokens: int64 (channels, N) in [0, codebook_size); N may be 0.
            n_frames: how many to add.

        Returns:
            int64 (channels, n_frames).
        """
        context = _Context(self, len(tokens))
        for known in self._digits(tokens).swapaxes(0, 1):
            context.push(known)
        digits = np.empty((n_frames, len(tokens), self.depth), np.int64)
        for frame in digits:
            with one_blas_thread():
                sums = context.sums()
            for k in range(self.depth):
                cumulative = self._cumulative(sums, k)
                if self.order is None:
                    frame[:, k] = (2 * cumulative[1:] < cumulative[-1]).sum(0)
                else:
                    frame[:, k] = np.diff(cumulative, axis=0).argmax(0)
                if k + 1 < self.depth:
                    self._add(sums, k, frame[:, k])
            context.push(frame)
        found = (digits @ self.radix).T
        return found if self.order is None else self._inverse[found]

    # --------------------------------------------------------------------------- the network

    def _take(self, source: _Source, sums: np.ndarray) -> np.ndarray:
        """(N, D * H) sums of N frames -> their digits, (N, D)."""
        digits = np.empty((len(sums), self.depth), np.int64)
        for k in range(self.depth):
            digits[:, k] = source.take(self._cumulative(sums, k).T.tolist())
            if k + 1 < self.depth:
                self._add(sums, k, digits[:, k])
        return digits

    @cached_property
    def _inverse(self) -> np.ndarray:
        inverse = np.empty_like(self.order)
        inverse[self.order] = np.arange(self.codebook_size)
        return inverse

    def _lanes(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(C, N) -> (C * ceil(N / lane), lane), filled up with 0, and the length of each lane."""
        channels, n = tokens.shape
        lane = min(self.lane, n)
        per_channel = -(-n // lane)
        padded = np.zeros((channels, per_channel * lane), np.int64)
        padded[:, :n] = tokens
        lengths = np.full((channels, per_channel), lane)
        lengths[:, -1] = n - (per_channel - 1) * lane
        return padded.reshape(-1, lane), lengths.ravel()

    def _digits(self, tokens: np.ndarray) -> np.ndarray:
        """(...) tokens -> (..., D) digits."""
        if self.order is not None:
            tokens = self.order[tokens]
        return tokens[..., None] // self.radix % self.levels

    def _intervals(self, digits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(G, T, D) digits -> where each one's interval starts, and its width; both (G, T, D)."""
        lanes, steps, depth = digits.shape
        context = _Context(self, lanes)
        flat = digits.transpose(1, 0, 2).reshape(-1, depth)
        starts, widths = np.empty_like(flat), np.empty_like(flat)
        # Few rows at a time, in memory that is reused: fresh pages would take as long as the sums.
        group = max(1, ROWS // lanes)
        inputs = np.empty((group, lanes, self.inputs), np.float32)
        buffer = np.empty((group * lanes, depth * self.hidden), np.float32)
        for first in range(0, steps, group):
            last = min(first + group, steps)
            for step in range(first, last):
                inputs[step - first] = context.inputs
                context.push(digits[:, step])
            here = slice(first * lanes, last * lanes)
            known = flat[here]
            sums = buffer[: len(known)]
            np.matmul(inputs[: last - first].reshape(len(known), -1), self.past, out=sums)
            starts[here], widths[here] = self._known(sums, known)
        shape = (steps, lanes, depth)
        starts, widths = (x.reshape(shape).transpose(1, 0, 2) for x in (starts, widths))
        return starts, widths

    def _known(self, sums: np.ndarray, digits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sums (N, D * H) of frames, and their digits (N, D) -> starts and widths, (N, D)."""
        starts, widths = np.empty_like(digits), np.empty_like(digits)
        rows = np.arange(len(digits))
        for k in range(self.depth):
            cumulative = self._cumulative(sums, k)
            starts[:, k] = cumulative[digits[:, k], rows]
            widths[:, k] = cumulative[digits[:, k] + 1, rows] - starts[:, k]
            if k + 1 < self.depth:
                self._add(sums, k, digits[:, k])
        return starts, widths

    def _add(self, sums: np.ndarray, k: int, digits: np.ndarray) -> None:
        """Add the contribution of digit k to the sums of the digits after it."""
        later = sums[:, (k + 1) * self.hidden :]
        np.add(later, self.current[k].take(digits, 0), out=later)

    def _cumulative(self, sums: np.ndarray, k: int) -> np.ndarray:
        """(N, D * H) sums -> (levels[k] + 1, N) int64, 0 to 2^PRECISION, strictly increasing."""
        units = np.clip(sums[:, k * self.hidden : (k + 1) * self.hidden], 0, HIDDEN_MAX)
        np.floor(units, out=units)
        logits = self.output[k] @ units.T
        logits += self.bias[k]
        below = (np.maximum.reduce(logits, 0) - logits).astype(np.int64)
        cumulative = np.zeros((len(logits) + 1, len(sums)), np.int64)
        rising = cumulative[1:]
        np.add.accumulate(self.exponentials.take(below, mode="clip"), 0, out=rising)
        total = rising[-1].copy()
        rising *= self._spread[k]
        rising //= total
        rising += self._least[k]
        return cumulative


class ImageCoder(TokenCoder):
    """Codes blocks of an image's tokens with the entropy tables of one model; see `TokenCoder`.

    A block is cut into tiles, and a token sees its neighbours in its tile. The tiles are coded side
    by side, and so are their rows, each `slope` tokens behind the one above it: then all neighbours
    of a token are known in time.

    Args:
        tile: rows and columns of a tile, of those that the block has.
        neighbours: what a token sees, as rows above it and columns to the right; none of them comes
            after it in the order of the rows.
        tables: as for `TokenCoder`, with a group of inputs for each neighbour in the place of the
            lags, and no averages.

    Raises:
        EntropyError: as `TokenCoder`, and neighbours that are none.
    """

    def __init__(
        self,
        *,
        tile: tuple[int, int],
        neighbours: tuple[tuple[int, int], ...],
        **tables: Any,
    ) -> None:
        if not (1 <= tile[0] <= 1 << 12 and 1 <= tile[1] <= 1 << 12):
            raise EntropyError("tiles must have 1 to 4096 rows and columns")
        if any(
            not 0 <= up <= REACH or abs(right) > REACH or (up == 0 and right >= 0)
            for up, right in neighbours
        ):
            raise EntropyError("neighbours must be near, and earlier")
        super().__init__(lags=len(neighbours), averages=(), lane=1, **tables)
        self.tile, self.neighbours = tile, np.array(neighbours, np.int64)
        self.slope = max([1, *(right // up + 1 for up, right in neighbours if up)])
        self.past = np.concatenate([self.past, np.zeros_like(self.past[:1])])  # of what is absent

    def _symbols(self, tokens: np.ndarray, columns: int) -> tuple[list[int], list[int]]:
        grid = _Grid(self, len(tokens), tokens.shape[1], columns)
        digits = self._digits(tokens.T).reshape(-1, self.depth)
        places = np.concatenate(list(grid.fronts()))
        digits = digits[grid.frames[places]]
        grid.put(places, digits)
        starts, widths = np.empty_like(digits), np.empty_like(digits)
        for first in range(0, len(places), ROWS):
            here = slice(first, first + ROWS)
            sums = grid.inputs(places[here]) @ self.past
            starts[here], widths[here] = self._known(sums, digits[here])
        ends = np.cumsum([len(front) for front in grid.fronts()])[:-1]
        return tuple(  # type: ignore[return-value]
            np.concatenate([part.T.ravel() for part in np.split(x, ends)]).tolist()
            for x in (starts, widths)
        )

    def _read(self, source: _Source, n_frames: int, channels: int, columns: int) -> np.ndarray:
        grid = _Grid(self, n_frames, channels, columns)
        tokens = np.empty(channels * n_frames, np.int64)
        for places in grid.fronts():
            digits = self._take(source, grid.inputs(places) @ self.past)
            grid.put(places, digits)
            tokens[grid.frames[places]] = digits @ self.radix
        return tokens.reshape(channels, n_frames).T


class _Grid:
    """The digits of a block of an image that are known, in tiles with margins around them.

    Args:
        coder: of the block.
        n_frames, channels: of the block.
        columns: of the image.

    Attributes:
        frames: place in the grid -> number of the frame, those of the first channel first; -1 where
            there is none.
    """

    def __init__(self, coder: ImageCoder, n_frames: int, channels: int, columns: int) -> None:
        self.coder = coder
        columns = min(columns, n_frames)
        rows = -(-n_frames // columns)
        self.tile = height, width = min(coder.tile[0], rows), min(coder.tile[1], columns)
        down, across = -(-rows // height), -(-columns // width)
        reach_up, reach_right = np.abs(coder.neighbours).max(0)
        self.stride = width + 2 * reach_right  # from row to row
        area = (height + reach_up) * self.stride  # of a tile
        corners = np.arange(channels * down * across) * area + reach_up * self.stride + reach_right
        frame = np.arange(n_frames)
        row, column = frame // columns, frame % columns
        place = corners.reshape(channels, -1)[:, row // height * across + column // width]
        place += row % height * self.stride + column % width
        self.corners = corners[:, None]
        self.frames = np.full(len(corners) * area, -1)
        self.frames[place] = np.arange(channels * n_frames).reshape(channels, n_frames)
        # For each place, the inputs of a neighbour there that are not 0; of none, `coder.inputs`.
        self.hot = np.full((len(self.frames), coder.depth + 1), coder.inputs, np.int32)
        up, right = coder.neighbours.T
        self.around = right - up * self.stride
        self.groups = (np.arange(len(up)) * (coder.size + 1))[:, None]

    def fronts(self) -> Iterator[np.ndarray]:
        """The places that are coded together, in turn: of all tiles those with one number, which is
        the column plus `slope` times the row."""
        (height, width), slope = self.tile, self.coder.slope
        for step in range(width + slope * (height - 1)):
            first = max(0, -((width - 1 - step) // slope))
            row = np.arange(first, min(height - 1, step // slope) + 1)
            places = (self.corners + row * self.stride + step - slope * row).ravel()
            places = places[self.frames[places] >= 0]
            if places.size:
                yield places

    def inputs(self, places: np.ndarray) -> np.ndarray:
        """What the network sees at some places, float32 (N, inputs + 1)."""
        hot = self.hot[places[:, None] + self.around]
        absent = hot == self.coder.inputs
        hot += self.groups
        hot[absent] = self.coder.inputs
        inputs = np.zeros((len(places), self.coder.inputs + 1), np.float32)
        inputs[:, -2] = ONE
        inputs[np.arange(len(places))[:, None], hot.reshape(len(places), -1)] = ONE
        return inputs

    def put(self, places: np.ndarray, digits: np.ndarray) -> None:
        """Note digits (N, D)."""
        self.hot[places, :-1] = digits + self.coder.offsets
        self.hot[places, -1] = self.coder.size


class _Context:
    """What the network sees of earlier frames, for G lanes side by side."""

    def __init__(self, coder: TokenCoder, lanes: int) -> None:
        self.coder = coder
        self.inputs = np.zeros((lanes, coder.inputs), np.float32)
        self.inputs[:, -1] = ONE
        self.averages = np.zeros((len(coder.averages), lanes, coder.size), np.int32)
        self._rows = np.arange(lanes)[:, None]

    def keep(self, lanes: np.ndarray) -> None:
        """Continue with some of the lanes."""
        self.inputs, self.averages = self.inputs[lanes], self.averages[:, lanes]
        self._rows = self._rows[: len(lanes)]

    def sums(self) -> np.ndarray:
        return self.inputs @ self.coder.past

    def push(self, digits: np.ndarray) -> None:
        """Append a frame: (G, D) digits."""
        coder = self.coder
        step, end = coder.size + 1, coder.lags * (coder.size + 1)
        self.inputs[:, step:end] = self.inputs[:, : end - step].copy()
        newest = self.inputs[:, :step]
        newest[:] = 0
        newest[self._rows, digits + coder.offsets] = ONE
        newest[:, -1] = ONE
        seen = newest[:, :-1].astype(np.int32) << AVERAGE_SHIFT
        for i, shift in enumerate(coder.averages):
            average = self.averages[i]
            average += (seen - average) >> shift
            place = end + i * coder.size
            self.inputs[:, place : place + coder.size] = average >> AVERAGE_SHIFT


class _Source:
    """rANS: a payload without its tables id to digits.

    Raises:
        EntropyError: here or later, a damaged payload.
    """

    def __init__(self, payload: bytes) -> None:
        if len(payload) % 2 or len(payload) < 4:
            raise EntropyError("the payload is not a whole number of words")
        self._words = np.frombuffer(payload, "<u2").tolist()
        self._state, self._place = self._words[0] << 16 | self._words[1], 2

    def take(self, rows: list[list[int]]) -> list[int]:
        """The next digits, one for each row of cumulative frequencies."""
        state, place, words = self._state, self._place, self._words
        mask, found = (1 << PRECISION) - 1, []
        for row in rows:
            slot = state & mask
            digit = bisect_right(row, slot) - 1
            start = row[digit]
            state = (row[digit + 1] - start) * (state >> PRECISION) + slot - start
            if state < LOW:
                if place == len(words):
                    raise EntropyError("the payload ends too early")
                state = state << 16 | words[place]
                place += 1
            found.append(digit)
        self._state, self._place = state, place
        return found

    def close(self) -> None:
        """Check that the payload ends here."""
        if self._state != LOW or self._place != len(self._words):
            raise EntropyError("the payload does not end where it should")


def _push(starts: list[int], widths: list[int]) -> bytes:
    """rANS: intervals in the order of decoding to bytes."""
    state, words = LOW, []
    spare = 32 - PRECISION
    for start, width in zip(reversed(starts), reversed(widths), strict=True):
        if state >= width << spare:
            words.append(state & 0xFFFF)
            state >>= 16
        quotient, rest = divmod(state, width)
        state = (quotient << PRECISION) + rest + start
    words += [state & 0xFFFF, state >> 16]
    return np.array(words[::-1], "<u2").tobytes()


# ------------------------------------------------------------------------------- sets of tables


class CoderSet:
    """The entropy coders of a model: one for each set of tables that its files were coded with.

    Args:
        codebook_size: of all of them.
        loaders: tables id (hex) -> loads the coder with those tables, when it is needed; the last
            is the newest.
    """

    def __init__(self, codebook_size: int, loaders: Mapping[str, Callable[[], TokenCoder]]) -> None:
        self.codebook_size = codebook_size
        self._loaders = dict(loaders)
        self._loaded: dict[str, TokenCoder] = {}

    @property
    def newest(self) -> TokenCoder:
        """The coder that packs.

        Raises:
            ValueError: its tables cannot be loaded.
        """
        return self._coder(next(reversed(self._loaders)))

    def pack(self, tokens: np.ndarray, columns: int | None = None) -> bytes:
        """Code a block with the newest tables; see `TokenCoder.pack`."""
        return self.newest.pack(tokens, columns)

    def unpack(
        self, payload: bytes, n_frames: int, channels: int, columns: int | None = None
    ) -> np.ndarray:
        """Decode a block with the tables that it was coded with; see `TokenCoder.unpack`.

        Raises:
            ValueError: no such tables, they cannot be loaded, or the block is damaged.
        """
        name = payload[:TABLES_ID_BYTES].hex()
        if name not in self._loaders:
            known = ", ".join(self._loaders)
            raise EntropyError(f"coded with other entropy tables ({name}; the model has {known})")
        return self._coder(name).unpack(payload, n_frames, channels, columns)

    def predict(self, tokens: np.ndarray, n_frames: int) -> np.ndarray:
        """Continue tokens with the newest tables; see `TokenCoder.predict`."""
        return self.newest.predict(tokens, n_frames)

    def joined(self, other: CoderSet) -> CoderSet:
        """A set that packs as this one does, and also unpacks what `other` can."""
        return CoderSet(self.codebook_size, other._loaders | self._loaders)

    def _coder(self, name: str) -> TokenCoder:
        if name not in self._loaded:
            self._loaded[name] = self._loaders[name]()
        return self._loaded[name]


# ------------------------------------------------------------------------------------- the file


def load_coder(path: Path) -> TokenCoder:
    """Read the coder from a tables file.

    Raises:
        EntropyError: not a tables file, or damaged.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read(MAX_TABLES_BYTES + 1)
    try:
        return parse_tables(data)
    except EntropyError as error:
        raise EntropyError(f"{path}: {error}") from None


def parse_tables(data: bytes) -> TokenCoder:
    """The coder from the bytes of a tables file: safetensors with the settings as metadata.

    Raises:
        EntropyError: not a tables file, or damaged.
    """
    if len(data) > MAX_TABLES_BYTES:
        raise EntropyError(f"more than {MAX_TABLES_BYTES} bytes")
    try:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        facts = header.pop("__metadata__")
        if facts["format"] not in (FORMAT, IMAGE_FORMAT):
            raise EntropyError(f"tables of format {facts['format']!r}, which is not known here")
        fields: dict[str, Any] = {
            name: _array(entry, data[8 + size :]) for name, entry in header.items()
        }
        fields["levels"] = tuple(json.loads(facts["levels"]))
        tables_id = hashlib.sha256(data).digest()[:TABLES_ID_BYTES]
        if facts["format"] == IMAGE_FORMAT:
            places = json.loads(facts["neighbours"])
            neighbours = tuple((int(up), int(right)) for up, right in places)
            rows, columns = json.loads(facts["tile"])
            return ImageCoder(
                **fields, tile=(int(rows), int(columns)), neighbours=neighbours, tables_id=tables_id
            )
        fields |= {
            "averages": tuple(json.loads(facts["averages"])),
            "lags": int(facts["lags"]),
            "lane": int(facts["lane"]),
        }
        return TokenCoder(**fields, tables_id=tables_id)
    except EntropyError:
        raise
    except (ArithmeticError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise EntropyError("not tables of an entropy coder") from None


_DTYPES = {"I16": "<i2", "I32": "<i4"}


def _array(entry: dict[str, Any], data: bytes) -> np.ndarray:
    start, end = entry["data_offsets"]
    if not 0 <= start <= end <= len(data):
        raise EntropyError("the tables end too early")
    return np.frombuffer(data[start:end], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
