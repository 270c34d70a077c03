"""Packets: round trips, the documented layout, changed bytes, and links that lose and reorder."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import RESOURCES, ROOT

from vpcodec import Codec
from vpcodec.packets import PacketError, PacketFormat, PacketReceiver, PacketSender

SPACE = bytes(range(16))
VECTORS = json.loads((RESOURCES / "packets.json").read_text())


def tokens(format: PacketFormat, n_packets: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, format.codebook_size, (format.channels, n_packets * format.frames))


formats = st.builds(
    PacketFormat,
    st.binary(min_size=16, max_size=16),
    st.integers(2, 2**32),
    st.integers(1, 3),
    st.integers(1, 20),
    st.integers(0, 4),
)


@settings(max_examples=200, deadline=None)
@given(format=formats, seed=st.integers(0, 99), sequence=st.integers(0, 2**17))
def test_a_packet_comes_back(format, seed, sequence):
    groups = np.split(tokens(format, 1 + format.redundancy, seed), 1 + format.redundancy, 1)
    data = format.pack(sequence, *groups)
    packet = format.unpack(data)
    assert len(data) == format.n_bytes
    assert packet.sequence == sequence % 2**16
    assert all(np.array_equal(a, b) for a, b in zip(packet.groups, groups, strict=True))
    assert all(group.dtype == np.int64 for group in packet.groups)


def test_sizes_are_those_that_a_radio_plans_with():
    codec = Codec.from_pretrained("speech-3k")
    assert codec.packet_format().n_bytes == 13  # 18 ms: 54 bits and 6 bytes
    assert codec.packet_format(4).n_bytes == 15  # 24 ms
    assert codec.packet_format(redundancy=1).n_bytes == 20
    assert codec.packet_format(10).n_bytes == 29  # 60 ms: 3.9 kbit/s


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_the_documented_packets(vector):
    fields = {**vector["format"], "space": bytes.fromhex(vector["format"]["space"])}
    format = PacketFormat(**fields)
    groups = [np.array(group) for group in vector["groups"]]
    assert format.pack(vector["sequence"], *groups).hex() == vector["packet"]
    assert vector["packet"] in (ROOT / "docs" / "packets.md").read_text().replace(" ", "")
    packet = format.unpack(bytes.fromhex(vector["packet"]))
    assert packet.sequence == vector["sequence"]
    assert all(np.array_equal(a, b) for a, b in zip(packet.groups, groups, strict=True))


@pytest.mark.parametrize("redundancy", [0, 1])
def test_no_changed_bit_goes_unnoticed(redundancy):
    format = PacketFormat(SPACE, 250_047, redundancy=redundancy)
    data = format.pack(77, *np.split(tokens(format, 1 + redundancy), 1 + redundancy, 1))
    for bit in range(8 * len(data)):
        for other in range(bit + 1):  # also any two bits, and bit alone
            changed = int.from_bytes(data) ^ 1 << bit ^ (1 << other if other < bit else 0)
            with pytest.raises(PacketError):
                format.unpack(changed.to_bytes(len(data)))


def test_what_is_not_a_packet_is_refused():
    format = PacketFormat(SPACE, 250_047)
    data = format.pack(1, tokens(format, 1))
    for wrong, words in (
        (data[:-1], "has 13 bytes, got 12"),
        (b"", "got 0"),
        (data + b"\0", "got 14"),
        (bytes(13), "wrong checksum, or made by another model|wrong checksum"),
    ):
        with pytest.raises(PacketError, match=words):
            format.unpack(wrong)
    with pytest.raises(PacketError, match="another model"):
        replace(format, space=bytes(range(1, 17))).unpack(data)
    with pytest.raises(PacketError, match="checksum"):  # the same first byte
        replace(format, space=bytes([0, *range(2, 17)])).unpack(data)
    # A valid packet of a larger codebook with the same bits
    large = replace(format, codebook_size=2**18)
    with pytest.raises(PacketError, match="token 262143 is outside"):
        format.unpack(large.pack(0, np.full((1, 3), 2**18 - 1)))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=40))
def test_any_bytes_are_a_packet_or_an_error(data):
    format = PacketFormat(SPACE, 250_047, redundancy=1)
    try:
        assert format.pack(0, *format.unpack(data).groups)
    except PacketError:
        pass


def test_hardly_any_of_20000_packets_with_changed_bits_passes():
    """One in 65,536 may: the checksum has 16 bits."""
    format = PacketFormat(SPACE, 250_047, redundancy=1)
    data = int.from_bytes(format.pack(77, *np.split(tokens(format, 2), 2, 1)))
    rng = random.Random(5)
    passed = 0
    for _ in range(20_000):
        bits = rng.sample(range(8 * format.n_bytes), rng.randint(3, 40))
        changed = data ^ sum(1 << bit for bit in bits)
        try:
            format.unpack(changed.to_bytes(format.n_bytes))
            passed += 1
        except PacketError:
            pass
    assert passed <= 4


@pytest.mark.parametrize(
    "fields", [{"channels": 0}, {"frames": 256}, {"redundancy": 16}, {"codebook_size": 1}]
)
def test_impossible_formats_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        PacketFormat(**{"space": SPACE, "codebook_size": 9, **fields})


def test_a_sender_is_given_pieces_of_any_length():
    format = PacketFormat(SPACE, 117_649, channels=2, frames=4, redundancy=1)
    all_tokens = tokens(format, 25)
    sender, packets = PacketSender(format), []
    rng = random.Random(3)
    rest = all_tokens[:, :-2]  # the last packet is half full
    while rest.shape[1]:
        n = rng.randrange(12)
        packets += sender.push(rest[:, :n])
        rest = rest[:, n:]
    assert len(packets) == 24
    packets += sender.flush()
    assert sender.flush() == []
    found = [format.unpack(packet) for packet in packets]
    assert [packet.sequence for packet in found] == list(range(25))
    joined = np.concatenate([packet.groups[0] for packet in found], 1)
    assert np.array_equal(joined[:, :-2], all_tokens[:, :-2])
    assert (joined[:, -2:] == joined[:, -3:-2]).all()
    for one, two in zip(found, found[1:]):
        assert np.array_equal(one.groups[0], two.groups[1])


def link(n: int, redundancy: int, *, lost=(), order=None, first=0, depth=4):
    """What comes out of a link of n packets, one pulled for each that is sent."""
    format = PacketFormat(SPACE, 250_047, redundancy=redundancy)
    sent = tokens(format, n)
    packets = PacketSender(format, sequence=first).push(sent)
    receiver = PacketReceiver(format, depth=depth)
    out = []
    for i in order or range(n):
        if i not in lost:
            receiver.push(packets[i])
        out.append(receiver.pull())
    while receiver.waiting:
        out.append(receiver.pull())
    out = [group for group in out if group is None or group.shape[1]]
    return np.split(sent, n, 1), out


def assert_received(sent, out, lost):
    assert len(out) == len(sent)
    for i, (a, b) in enumerate(zip(sent, out)):
        assert b is None if i in lost else np.array_equal(a, b)


@pytest.mark.parametrize("first", [0, 65_530, 65_535])
def test_a_link_without_losses(first):
    sent, out = link(30, 0, first=first)
    assert_received(sent, out, ())


def test_lost_packets_are_lost_and_nothing_else():
    sent, out = link(40, 0, lost={5, 6, 20})
    assert_received(sent, out, {5, 6, 20})


def test_redundancy_makes_up_for_single_losses_and_for_bursts_as_long_as_it_is():
    sent, out = link(40, 1, lost={5, 20, 21})
    assert_received(sent, out, {20})
    sent, out = link(40, 2, lost={5, 20, 21})
    assert_received(sent, out, ())


def test_packets_out_of_order_and_twice():
    order = [1, 0, 0, 3, 2, 2, 5, 4, *range(6, 30)]
    sent, out = link(30, 0, order=order, first=65_534)
    assert_received(sent, out, ())


def test_a_packet_that_is_too_late_is_lost():
    sent, out = link(30, 0, order=[*range(5), *range(6, 20), 5, *range(20, 30)], depth=2)
    assert_received(sent, out, {5})


def test_a_sender_that_begins_anew_is_followed():
    format = PacketFormat(SPACE, 250_047)
    receiver = PacketReceiver(format, depth=1)
    for sequence in (40_000, 40_001, 7, 8):
        group = tokens(format, 1, sequence)
        receiver.push(format.pack(sequence, group))
        assert np.array_equal(receiver.pull(), group)


def test_a_damaged_packet_changes_nothing():
    format = PacketFormat(SPACE, 250_047)
    receiver = PacketReceiver(format, depth=1)
    packets = PacketSender(format).push(tokens(format, 3))
    receiver.push(packets[0])
    receiver.pull()
    with pytest.raises(PacketError):
        receiver.push(bytes([packets[1][0] ^ 1]) + packets[1][1:])
    receiver.push(packets[2])
    assert receiver.pull() is None
    assert receiver.pull() is not None
    assert receiver.waiting == 0
