"""Packets of fixed size for live links: tokens with a sequence number, a model and a checksum.

The layout, byte by byte and with examples, is in docs/packets.md. A packet has 6 bytes besides its
tokens; packets do not depend on each other.
"""

from __future__ import annotations

import binascii
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .checks import check_channels, check_tokens

VERSION = 0
HEADER_BYTES, CHECKSUM_BYTES = 4, 2
MAX_REDUNDANCY = 15
MAX_FRAMES = 255
SEQUENCES = 2**16  # sequence numbers begin again at 0 after as many packets
MAX_AHEAD = 512  # packets; a jump by more is a stream that began anew


class PacketError(ValueError):
    """Bytes that are not a packet of this format, or were changed on the way."""


@dataclass(frozen=True)
class Packet:
    """What one packet holds.

    Attributes:
        sequence: number of the packet, modulo 65,536.
        groups: int64 tokens (channels, frames) of this packet, then of the ones before it, newest
            first, as far as the sender repeats them.
    """

    sequence: int
    groups: tuple[NDArray[np.int64], ...]


@dataclass(frozen=True)
class PacketFormat:
    """The layout that both ends of a link agree on.

    Attributes:
        space: token space of the model (`Codec.space`); packets hold its first byte, and their
            checksums include all of it.
        codebook_size: of the model; tokens take ceil(log2) bits.
        channels: of the audio.
        frames: tokens per channel and packet.
        redundancy: packets before that each packet repeats, 0 to 15.
    """

    space: bytes
    codebook_size: int
    channels: int = 1
    frames: int = 3
    redundancy: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("channels", 1, 255),
            ("frames", 1, MAX_FRAMES),
            ("redundancy", 0, MAX_REDUNDANCY),
            ("codebook_size", 2, 2**32),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be {low} to {high}, not {getattr(self, name)}")

    @property
    def token_bits(self) -> int:
        """Bits of one token."""
        return (self.codebook_size - 1).bit_length()

    @property
    def n_bytes(self) -> int:
        """Size of every packet."""
        groups = 1 + self.redundancy
        bits = groups * self.channels * self.frames * self.token_bits
        return HEADER_BYTES + -(-bits // 8) + CHECKSUM_BYTES

    def pack(self, sequence: int, *groups: NDArray[np.integer]) -> bytes:
        """A packet.

        Args:
            sequence: number of the packet; taken modulo 65,536.
            groups: 1 + redundancy arrays of tokens (channels, frames): of this packet, then of the
                ones before it, newest first.

        Raises:
            ValueError: another number of groups, wrong shapes, or a token out of range.
        """
        if len(groups) != 1 + self.redundancy:
            raise ValueError(f"a packet holds {1 + self.redundancy} groups, got {len(groups)}")
        tokens = []
        for group in groups:
            checked = check_tokens(group, "(C, N)", self.codebook_size)
            check_channels(checked, self.channels)
            if checked.shape[1] != self.frames:
                raise ValueError(f"a packet holds {self.frames} frames, got {checked.shape[1]}")
            tokens.append(checked.T.ravel())  # frame by frame
        shifts = np.arange(self.token_bits)[::-1]
        bits = (np.concatenate(tokens)[:, None] >> shifts) & 1
        body = bytes((VERSION << 4 | self.redundancy, self.space[0]))
        body += (sequence % SEQUENCES).to_bytes(2, "big")
        body += np.packbits(bits.astype(np.uint8).ravel()).tobytes()
        return body + _checksum(self.space, body)

    def unpack(self, data: bytes) -> Packet:
        """A packet that was received.

        Raises:
            PacketError: of another size, version, redundancy or model; changed on the way; or a
                token out of range.
        """
        if len(data) != self.n_bytes:
            raise PacketError(f"a packet has {self.n_bytes} bytes, got {len(data)}")
        body, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
        if _checksum(self.space, body) != checksum:
            other = ", or made by another model" if body[1] != self.space[0] else ""
            raise PacketError(f"wrong checksum{other}")
        if body[0] != VERSION << 4 | self.redundancy:
            raise PacketError(
                f"version {body[0] >> 4} with redundancy {body[0] & 15}, expected {VERSION} with "
                f"{self.redundancy}"
            )
        if body[1] != self.space[0]:
            raise PacketError("its first byte of the token space is wrong")
        groups = 1 + self.redundancy
        shape = (groups, self.frames, self.channels)
        bits = np.unpackbits(np.frombuffer(body, np.uint8, offset=HEADER_BYTES))
        count = groups * self.frames * self.channels * self.token_bits
        if bits[count:].any():
            raise PacketError("its padding is not zero")
        values = bits[:count].reshape(-1, self.token_bits).astype(np.int64)
        tokens = values @ (1 << np.arange(self.token_bits, dtype=np.int64)[::-1])
        if tokens.max() >= self.codebook_size:
            raise PacketError(f"token {tokens.max()} is outside [0, {self.codebook_size})")
        return Packet(
            int.from_bytes(body[2:HEADER_BYTES], "big"),
            tuple(np.ascontiguousarray(group.T) for group in tokens.reshape(shape)),
        )


class PacketSender:
    """Tokens in pieces of any length to packets.

    Args:
        format: of the packets.
        sequence: number of the first packet.
    """

    def __init__(self, format: PacketFormat, *, sequence: int = 0) -> None:
        self.format = format
        self.sequence = sequence
        self._rest = np.zeros((format.channels, 0), np.int64)
        self._sent: list[NDArray[np.int64]] = []  # groups to repeat, newest first

    def push(self, tokens: NDArray[np.integer]) -> list[bytes]:
        """The packets that are now full.

        Args:
            tokens: (N,) or (C, N) integers in [0, codebook_size); N may be 0.

        Raises:
            ValueError: wrong shape, dtype or number of channels, or a token out of range.
        """
        tokens = check_tokens(tokens, "(C, N)", self.format.codebook_size)
        check_channels(tokens, self.format.channels)
        self._rest = np.concatenate([self._rest, tokens], 1)
        packets = []
        while self._rest.shape[1] >= self.format.frames:
            packets.append(self._pack(self._rest[:, : self.format.frames]))
            self._rest = self._rest[:, self.format.frames :]
        return packets

    def flush(self) -> list[bytes]:
        """The last packet, if one is begun, filled by repeating its last token."""
        n = self._rest.shape[1]
        if not n:
            return []
        group = np.pad(self._rest, ((0, 0), (0, self.format.frames - n)), "edge")
        self._rest = self._rest[:, :0]
        return [self._pack(group)]

    def _pack(self, group: NDArray[np.int64]) -> bytes:
        before = [*self._sent, *[group] * self.format.redundancy][: self.format.redundancy]
        packet = self.format.pack(self.sequence, group, *before)
        self._sent = [group, *before][: self.format.redundancy]
        self.sequence += 1
        return packet


class PacketReceiver:
    """Packets in any order, some lost or doubled, to tokens in order: the jitter buffer of a link.

    The caller has the clock: it hands in packets as they come and pulls once per packet's duration.
    A packet that is missing when its turn comes is taken from the repeated tokens of a later one if
    that is there, and is lost otherwise.

    Args:
        format: of the packets.
        depth: packets that must have arrived before the first is given out. More let packets come
            later, and delay the audio by as many durations of a packet.
    """

    def __init__(self, format: PacketFormat, *, depth: int = 2) -> None:
        if depth < 1:
            raise ValueError(f"depth must be at least 1, not {depth}")
        self.format = format
        self.depth = depth
        self._groups: dict[int, NDArray[np.int64]] = {}  # by number since the beginning
        self._next: int | None = None  # the one to give out
        self._started = False
        self._newest = 0

    def push(self, data: bytes) -> None:
        """Take a packet.

        Raises:
            PacketError: see `PacketFormat.unpack`; the packet counts as lost.
        """
        packet = self.format.unpack(data)
        if self._next is None:
            self._next = self._newest = packet.sequence
        number = self._unwrap(packet.sequence)
        if not -MAX_AHEAD < number - self._next < MAX_AHEAD:  # the sender began anew
            self._groups.clear()
            self._started = False
            self._next = self._newest = number
        if not self._started:
            self._next = min(self._next, number)
        self._newest = max(self._newest, number)
        for age, group in enumerate(packet.groups):
            # What a first packet repeats is of the time before, or was never sent.
            if number - age >= self._next:
                self._groups.setdefault(number - age, group)

    def pull(self) -> NDArray[np.int64] | None:
        """The tokens of the next packet.

        Returns:
            int64 (channels, frames); None: they are lost (`DecoderStream.push_lost`). Before the
            first packets have arrived: (channels, 0).
        """
        if not self._started:
            self._started = len(self._groups) >= self.depth
        if not self._started or self._next is None:
            return np.zeros((self.format.channels, 0), np.int64)
        group = self._groups.pop(self._next, None)
        self._next += 1
        return group

    @property
    def waiting(self) -> int:
        """Packets from the next one to the newest that has arrived."""
        return 0 if self._next is None else max(0, self._newest - self._next + 1)

    def _unwrap(self, sequence: int) -> int:
        """The number nearest to the newest packet that has this sequence number."""
        distance = (sequence - self._newest + SEQUENCES // 2) % SEQUENCES - SEQUENCES // 2
        return self._newest + distance


def _checksum(space: bytes, body: bytes) -> bytes:
    """CRC-16 of CCITT (polynomial 0x1021, from 0xFFFF) of token space and body, big-endian."""
    return binascii.crc_hqx(space + body, 0xFFFF).to_bytes(2, "big")
