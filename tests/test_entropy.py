"""The entropy coder: exact, as specified, and shorter than packing."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import RESOURCES

from vpcodec.codec import Codec
from vpcodec.entropy import EntropyError, ImageCoder, TokenCoder, parse_tables
from vpcodec.tokenfile import raw_bytes

GOLDEN = RESOURCES / "entropy"


def make_tables(
    levels: tuple[int, ...] = (3, 4, 2),
    *,
    hidden: int = 5,
    lags: int = 2,
    averages: tuple[int, ...] = (2, 4),
    lane: int = 8,
    seed: int = 0,
    order: bool = False,
    scale: int = 400,
) -> dict:
    """What TokenCoder takes, of random integers."""
    rng = np.random.default_rng(seed)
    size, depth = sum(levels), len(levels)
    inputs = lags * (size + 1) + len(averages) * size + 1
    current = rng.integers(-scale, scale, (size, depth * hidden))
    for k, offset in enumerate(np.cumsum(levels) - levels):
        current[offset:, k * hidden : (k + 1) * hidden] = 0
    past = rng.integers(-scale, scale, (inputs, depth * hidden))
    output = rng.integers(-200, 200, (depth, hidden, max(levels)))
    bias = rng.integers(-500, 500, (depth, max(levels)))
    for k, n in enumerate(levels):
        output[k, :, n:] = bias[k, n:] = 0
    return {
        "levels": levels,
        "past": past.astype(np.int16),
        "current": current.astype(np.int16),
        "output": output.astype(np.int16),
        "bias": bias.astype(np.int32),
        "exponentials": np.maximum(65536 * np.exp(-np.arange(200) / 32), 1).astype(np.int32),
        "lags": lags,
        "averages": averages,
        "lane": lane,
        "order": rng.permutation(int(np.prod(levels))).astype(np.int32) if order else None,
    }


def make_coder(*args, **kwargs) -> TokenCoder:
    return TokenCoder(**make_tables(*args, **kwargs), tables_id=b"ab")


NEIGHBOURS = ((0, -1), (1, 0), (1, -1), (1, 1), (2, 1), (0, -2))


def make_image_tables(
    levels: tuple[int, ...] = (3, 4, 2),
    *,
    neighbours: tuple[tuple[int, int], ...] = NEIGHBOURS,
    tile: tuple[int, int] = (4, 5),
    **options,
) -> dict:
    """What ImageCoder takes, of random integers."""
    tables = make_tables(levels, lags=len(neighbours), averages=(), **options)
    for name in ("lags", "averages", "lane"):
        del tables[name]
    return tables | {"neighbours": neighbours, "tile": tile}


def make_image_coder(*args, **kwargs) -> ImageCoder:
    return ImageCoder(**make_image_tables(*args, **kwargs), tables_id=b"ab")


class Words:
    """rANS as docs/token-format.md has it, in Python's integers alone."""

    def __init__(self, payload: bytes) -> None:
        words = [payload[i] | payload[i + 1] << 8 for i in range(2, len(payload), 2)]
        self.state, self.words = words[0] << 16 | words[1], words[2:]

    def digit(self, bounds: list[int]) -> int:
        slot = self.state & 2**15 - 1
        digit = next(s for s, (a, b) in enumerate(pairwise(bounds)) if a <= slot < b)
        width = bounds[digit + 1] - bounds[digit]
        self.state = width * (self.state >> 15) + slot - bounds[digit]
        if self.state < 2**16:
            self.state = self.state << 16 | self.words.pop(0)
        return digit

    def at_the_end(self) -> bool:
        return self.state == 2**16 and not self.words


def reference_bounds(tables: dict, inputs: list[int], known: list[int]) -> list[int]:
    """The bounds of the next digit's intervals, as docs/token-format.md has them."""
    levels = tables["levels"]
    offsets = [sum(levels[:k]) for k in range(len(levels))]
    names = ("past", "current", "output", "bias", "exponentials")
    past, current, output, bias, exponentials = (tables[name].tolist() for name in names)
    k, hidden = len(known), len(output[0])
    logits = bias[k][: levels[k]]
    for unit in range(k * hidden, (k + 1) * hidden):
        total = sum(x * past[i][unit] for i, x in enumerate(inputs) if x)
        total += sum(128 * current[offsets[j] + d][unit] for j, d in enumerate(known))
        value = min(max(total >> 11, 0), 127)
        for s in range(levels[k]):
            logits[s] += value * output[k][unit - k * hidden][s]
    top = max(logits)
    weights = [exponentials[min((top - z) >> 5, len(exponentials) - 1)] for z in logits]
    sums = [sum(weights[:s]) for s in range(levels[k] + 1)]
    return [s + sums[s] * (2**15 - levels[k]) // sums[-1] for s in range(levels[k] + 1)]


def reference_token(tables: dict, digits: list[int]) -> int:
    value, radix = 0, 1
    for digit, n in zip(digits, tables["levels"]):
        value, radix = value + digit * radix, radix * n
    return value if tables["order"] is None else tables["order"].tolist().index(value)


def reference_unpack_image(
    tables: dict, payload: bytes, n_frames: int, channels: int, columns: int
) -> np.ndarray:
    """A decoder of images written from docs/token-format.md, in Python's integers alone."""
    levels, (tile_rows, tile_columns) = tables["levels"], tables["tile"]
    size, words = sum(levels), Words(payload)
    columns = min(columns, n_frames)
    slope = max([1, *(right // up + 1 for up, right in tables["neighbours"] if up)])
    order = []
    for channel in range(channels):
        for frame in range(n_frames):
            row, column = frame // columns, frame % columns
            tile = row // tile_rows, column // tile_columns
            row, column = row % tile_rows, column % tile_columns
            order.append((column + slope * row, channel, tile, row, column, frame))
    digits: dict[tuple, list[int]] = {}
    tokens = np.zeros((n_frames, channels), np.int64)
    order.sort()
    for number in sorted({first for first, *_ in order}):
        front = [rest for first, *rest in order if first == number]
        for _ in levels:
            for channel, tile, row, column, _ in front:
                inputs = []
                for up, right in tables["neighbours"]:
                    near, group = (channel, tile, row - up, column + right), [0] * (size + 1)
                    if near in digits:
                        assert len(digits[near]) == len(levels), "not known in time"
                        for k, digit in enumerate(digits[near]):
                            group[sum(levels[:k]) + digit] = 128
                        group[size] = 128
                    inputs += group
                here = digits.setdefault((channel, tile, row, column), [])
                here.append(words.digit(reference_bounds(tables, [*inputs, 128], here)))
        for channel, tile, row, column, frame in front:
            here = digits[channel, tile, row, column]
            tokens[frame, channel] = reference_token(tables, here)
    assert words.at_the_end()
    return tokens


def reference_unpack(tables: dict, payload: bytes, n_frames: int, channels: int) -> np.ndarray:
    """A decoder written from docs/token-format.md, in Python's integers alone."""
    levels, averages = tables["levels"], tables["averages"]
    offsets = [sum(levels[:k]) for k in range(len(levels))]
    size, words = sum(levels), Words(payload)
    lane = min(tables["lane"], n_frames)
    lanes = [
        {"channel": c, "first": first, "frames": min(lane, n_frames - first), "digits": []}
        for c in range(channels)
        for first in range(0, n_frames, lane)
    ]
    for one in lanes:
        one["averages"] = [[0] * size for _ in averages]

    def inputs_of(one: dict) -> list[int]:
        inputs = []
        for lag in range(1, tables["lags"] + 1):
            row = [0] * (size + 1)
            if lag <= len(one["digits"]):
                for offset, digit in zip(offsets, one["digits"][-lag]):
                    row[offset + digit] = 128
                row[size] = 128
            inputs += row
        for average in one["averages"]:
            inputs += [value >> 7 for value in average]
        return [*inputs, 128]

    for step in range(lane):
        alive = [one for one in lanes if one["frames"] > step]
        frames: list[list[int]] = [[] for _ in alive]
        for _ in levels:
            for one, known in zip(alive, frames):
                known.append(words.digit(reference_bounds(tables, inputs_of(one), known)))
        for one, known in zip(alive, frames):
            one["digits"].append(known)
            hot = [0] * size
            for offset, digit in zip(offsets, known):
                hot[offset + digit] = 1 << 14
            for average, shift in zip(one["averages"], averages):
                average[:] = [a + ((x - a) >> shift) for a, x in zip(average, hot)]
    assert words.at_the_end()
    tokens = np.zeros((n_frames, channels), np.int64)
    for one in lanes:
        for i, known in enumerate(one["digits"]):
            tokens[one["first"] + i, one["channel"]] = reference_token(tables, known)
    return tokens


@given(
    n_frames=st.integers(1, 40),
    channels=st.integers(1, 3),
    seed=st.integers(0, 20),
    order=st.booleans(),
    levels=st.sampled_from([(3, 4, 2), (2,), (32, 32, 16), (9, 9, 9, 7, 7, 7)]),
)
@settings(max_examples=60, deadline=None)
def test_every_block_comes_back(n_frames, channels, seed, order, levels):
    coder = make_coder(levels, seed=seed, order=order and np.prod(levels) < 20_000)
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, coder.codebook_size, (n_frames, channels))
    found = coder.unpack(coder.pack(tokens), n_frames, channels)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, tokens)


@pytest.mark.parametrize(
    "levels, n_frames, channels, order",
    [
        ((3, 4, 2), 21, 2, False),
        ((3, 4, 2), 8, 1, True),
        ((2,), 5, 3, False),
        ((9, 7), 17, 1, True),
    ],
)
def test_a_decoder_written_from_the_specification_agrees(levels, n_frames, channels, order):
    tables = make_tables(levels, seed=3, order=order)
    tokens = np.random.default_rng(1).integers(0, np.prod(levels), (n_frames, channels))
    payload = TokenCoder(**tables).pack(tokens)
    np.testing.assert_array_equal(reference_unpack(tables, payload, n_frames, channels), tokens)


@given(
    n_frames=st.integers(1, 60),
    channels=st.integers(1, 2),
    columns=st.integers(1, 70),
    tile=st.sampled_from([(4, 5), (1, 3), (64, 128), (3, 1)]),
    seed=st.integers(0, 20),
    neighbours=st.sampled_from([NEIGHBOURS, ((0, -1),), ((1, 3), (2, -2)), ((1, 0),)]),
)
@settings(max_examples=100, deadline=None)
def test_every_block_of_an_image_comes_back(n_frames, channels, columns, tile, seed, neighbours):
    coder = make_image_coder(seed=seed, tile=tile, neighbours=neighbours, order=bool(seed % 2))
    tokens = np.random.default_rng(seed).integers(0, 24, (n_frames, channels))
    found = coder.unpack(coder.pack(tokens, columns), n_frames, channels, columns)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, tokens)


@pytest.mark.parametrize(
    "levels, n_frames, channels, columns, neighbours, order",
    [
        ((3, 4, 2), 26, 2, 7, NEIGHBOURS, False),
        ((3, 4, 2), 40, 1, 8, ((0, -1), (1, 3), (2, -2)), True),
        ((2,), 9, 1, 20, NEIGHBOURS, False),
        ((9, 7), 11, 1, 1, ((1, 0),), False),
    ],
)
def test_a_decoder_of_images_written_from_the_specification_agrees(
    levels, n_frames, channels, columns, neighbours, order
):
    tables = make_image_tables(levels, seed=3, neighbours=neighbours, order=order)
    tokens = np.random.default_rng(1).integers(0, np.prod(levels), (n_frames, channels))
    payload = ImageCoder(**tables).pack(tokens, columns)
    found = reference_unpack_image(tables, payload, n_frames, channels, columns)
    np.testing.assert_array_equal(found, tokens)


def test_what_is_beside_and_above_makes_a_block_shorter():
    """Rows of one value each, coded by a network that expects the value on the left."""
    tables = make_image_tables((8,), hidden=8, neighbours=((0, -1),), scale=1, tile=(64, 128))
    tables["past"][:], tables["output"][:] = 0, 0
    tables["past"][:8] = 2000 * np.eye(8, dtype=np.int16)
    tables["output"][0] = 20 * np.eye(8, dtype=np.int16)
    tables["bias"][:] = 0
    coder = ImageCoder(**tables)
    tokens = np.repeat(np.arange(64) % 8, 100)[:, None]
    payload = coder.pack(tokens, 100)
    assert len(payload) < 0.25 * raw_bytes(8, tokens.size)
    assert len(coder.pack(tokens.reshape(64, 100).T.reshape(-1, 1), 64)) > 2 * len(payload)


@pytest.mark.parametrize("columns", [1, 65_535])
def test_the_largest_blocks_of_images_are_coded_side_by_side(columns, monkeypatch):
    """Whatever the shape of the image, in about as many steps as a tile needs."""
    coder = make_image_coder(tile=(64, 128))
    steps = []
    take = coder._take
    monkeypatch.setattr(coder, "_take", lambda *args: (steps.append(1), take(*args))[1])
    tokens = np.random.default_rng(0).integers(0, 24, (65_535, 1))
    found = coder.unpack(coder.pack(tokens, columns), 65_535, 1, columns)
    np.testing.assert_array_equal(found, tokens)
    assert len(steps) <= 128 + 2 * 63


@pytest.mark.parametrize(
    "change",
    [
        {"neighbours": ((0, 0),)}, {"neighbours": ((0, 1),)}, {"neighbours": ((-1, 0),)},
        {"neighbours": ((9, 0),)}, {"neighbours": ((1, 9),)}, {"tile": (0, 5)},
        {"tile": (5, 5000)}, {"neighbours": ()},
    ],
)  # fmt: skip
def test_image_tables_of_no_use_are_refused(change):
    with pytest.raises(EntropyError):
        ImageCoder(**make_image_tables(neighbours=((0, -1),)) | change)


@pytest.mark.parametrize("name", ["tables", "image-tables"])
def test_golden_payloads(name):
    """What was written once can be read for ever: see resources/entropy/make_golden.py."""
    coder = parse_tables((GOLDEN / f"{name}.safetensors").read_bytes())
    payloads = GOLDEN / name.replace("tables", "payloads")
    for case in json.loads(payloads.with_suffix(".json").read_text()):
        tokens, columns = np.array(case["tokens"], np.int64), case.get("columns")
        assert coder.pack(tokens, columns).hex() == case["payload"]
        found = coder.unpack(bytes.fromhex(case["payload"]), *tokens.shape, columns)
        np.testing.assert_array_equal(found, tokens)


def test_the_network_knows_no_future_and_no_other_lane():
    """Probabilities of a frame change with nothing but the frames before it in its lane."""
    coder = make_coder(lane=8)
    rng = np.random.default_rng(0)
    digits = rng.integers(0, 2, (3, 8, 3))
    starts, widths = coder._intervals(digits)
    changed = digits.copy()
    changed[1, 5:] = 1 - changed[1, 5:]
    again = coder._intervals(changed)
    np.testing.assert_array_equal(again[0][1, :5], starts[1, :5])
    np.testing.assert_array_equal(again[1][[0, 2]], widths[[0, 2]])
    assert (again[1][1, 6:] != widths[1, 6:]).any()


@pytest.mark.parametrize("make", [make_coder, make_image_coder])
def test_damage_is_an_error_or_other_tokens_but_never_a_crash(make):
    coder = make()
    tokens = np.random.default_rng(0).integers(0, 24, (30, 1))
    payload = coder.pack(tokens)
    for bit in range(16, 8 * len(payload)):
        flipped = bytearray(payload)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            found = coder.unpack(bytes(flipped), 30, 1)
        except EntropyError:
            continue
        assert found.shape == (30, 1) and (found >= 0).all() and (found < 24).all()
        assert (found != tokens).any()
    for size in range(len(payload)):
        with pytest.raises(EntropyError):
            coder.unpack(payload[:size], 30, 1)
    with pytest.raises(EntropyError, match="end"):
        coder.unpack(payload + b"\0\0", 30, 1)
    with pytest.raises(EntropyError, match="other entropy tables"):
        coder.unpack(b"xy" + payload[2:], 30, 1)


def test_tables_whose_sums_could_round_are_refused():
    make_coder(scale=2000)
    with pytest.raises(EntropyError, match="exact"):
        make_coder((9, 9, 9, 7, 7, 7), lags=60, scale=32000)


@pytest.mark.parametrize("size", [0, 7, 8, 40, 300])
def test_tables_cut_short_are_refused(size):
    data = (GOLDEN / "tables.safetensors").read_bytes()
    with pytest.raises(EntropyError):
        parse_tables(data[:size])


def test_huge_or_strange_tables_are_refused():
    data = bytearray((GOLDEN / "tables.safetensors").read_bytes())
    size = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + size])
    for change in (
        lambda h: h["past"].update(data_offsets=[0, 1 << 40]),
        lambda h: h["past"].update(dtype="F32"),
        lambda h: h["past"].update(shape=[1, 1]),
        lambda h: h["__metadata__"].update(format="2"),
        lambda h: h["__metadata__"].update(format="3"),
        lambda h: h["__metadata__"].update(lane="0"),
        lambda h: h["__metadata__"].update(levels="[3, 4, 100000]"),
        lambda h: h.pop("bias"),
    ):
        broken = json.loads(json.dumps(head))
        change(broken)
        text = json.dumps(broken).encode()
        with pytest.raises(EntropyError):
            parse_tables(len(text).to_bytes(8, "little") + text + data[8 + size :])


def test_speech_becomes_shorter():
    """The bundled model's tables pay for themselves on a recording that they were not made of."""
    import soundfile

    codec = Codec.from_pretrained("speech-3k", threads=1)
    samples, rate = soundfile.read(RESOURCES / "speech.wav", dtype="float32", always_2d=True)
    tokens = codec.encode(samples.T, rate)
    payload = codec.coder.pack(tokens.T)
    assert len(payload) < 0.85 * raw_bytes(codec.codebook_size, tokens.size)
    np.testing.assert_array_equal(codec.coder.unpack(payload, *tokens.T.shape), tokens.T)


@pytest.mark.parametrize("order", [False, True])
def test_predicted_tokens_are_what_the_coder_expects(order: bool) -> None:
    """Medians of ordered digits, the likeliest of others."""
    coder = make_coder((3, 4, 2), order=order)
    rng = np.random.default_rng(1)
    past = rng.integers(0, 24, (2, 7))
    found = coder.predict(past, 3)
    assert found.shape == (2, 3) and found.dtype == np.int64
    assert ((found >= 0) & (found < 24)).all()
    assert np.array_equal(coder.predict(past[1:], 3), found[1:])  # channels are independent
    longer = coder.predict(np.concatenate([past, found[:, :1]], 1), 2)
    assert np.array_equal(longer, found[:, 1:])  # and so are the calls
    assert coder.predict(past[:, :0], 1).shape == (2, 1)
    digits = coder._digits(np.concatenate([past, found[:, :1]], 1))
    starts, widths = (x[:, -1, 0] for x in coder._intervals(digits))
    if not order:
        half = 2**14
        assert ((starts < half) & (starts + widths >= half)).all()
        return
    for other in range(3):
        digits[:, -1, 0] = other
        assert (coder._intervals(digits)[1][:, -1, 0] <= widths).all()
