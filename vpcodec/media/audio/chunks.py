"""Containers made of chunks: the position of the audio in AIFF, AU, CAF and W64.

The parts that they share with WAV are here, too: sizes that the writer did not know, and the check
that every byte after the audio is accounted for.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from .common import READ_WIDTHS, AudioError, PartialAudioError
from .stream import ByteStream

MAX_CHUNKS = 10_000  # before the audio, and after it
_W64_TAIL = bytes.fromhex("f3acd3118cd100c04f8edb8a")  # end of the GUIDs of chunks
_W64_RIFF = b"riff" + bytes.fromhex("2e91cf11a5d628db04c10000")


class Style(NamedTuple):
    """The layout of chunks: a name, a size, data, and zeros up to a multiple of `pad`."""

    name: int  # bytes
    size: str  # format for struct
    pad: int
    counts_head: bool  # whether the size counts name and size
    audio: bytes  # name of the chunk of samples
    known: frozenset[bytes]  # names of other chunks, in lower case and without spaces

    @property
    def head(self) -> int:
        """Bytes of name and size."""
        return self.name + struct.calcsize(self.size)

    def parse(self, head: bytes) -> tuple[bytes, int]:
        """The name, and the size of the data."""
        (size,) = struct.unpack(self.size, head[self.name : self.head])
        return head[: self.name], size - self.head if self.counts_head else size


def _names(text: str) -> frozenset[bytes]:
    return frozenset(text.encode().split())


_ANY = _names("id3 junk fllr pad")
_RIFF = _names(
    "data fmt list fact cue smpl inst bext ixml axml chna peak plst cart disp afsp levl acid strc "
    "_pmx r64m minf elm1 elmo regn umid qlty mext link slnt wavl note ltxt labl chan dbmd ds64 "
    "tlst aswg guan guano wamd clm sauf sndm logic logo lgwv pfmt resu ovwf"
)
_IFF = _names(
    "ssnd comm mark inst comt name auth (c) anno midi aesd appl fver chan basc trns cate peak"
)
_CAF = _names(
    "data desc pakt chan kuki info free uuid strg mark regn inst midi edct ovvw peak umid"
)
RIFF = Style(4, "<I", 2, False, b"data", _ANY | _RIFF)
IFF = Style(4, ">I", 2, False, b"SSND", _ANY | _IFF)
W64 = Style(16, "<Q", 8, True, b"data" + _W64_TAIL, frozenset())
CAF = Style(4, ">q", 1, False, b"data", _ANY | _CAF)
_FILES = (b"RIFF", b"RF64", b"FORM", b"caff", b".snd")  # first bytes of files


class Layout(NamedTuple):
    """The position and coding of the audio in a file."""

    format: str
    coding: str | None  # of linear PCM; None for others
    sample_rate: int
    channels: int
    align: int  # bytes per sample of all channels
    start: int  # position of the first byte
    n_bytes: int  # according to the header
    is_known: bool = True  # whether `n_bytes` is not a placeholder
    style: Style | None = None  # of chunks after the audio; None: there must be none
    order: str = "<"
    is_mpeg: bool = False  # MPEG audio in WAV


_WAV_CODINGS = {  # format tag, bytes per sample
    (1, 1): "PCM_U8",
    (1, 2): "PCM_16",
    (1, 3): "PCM_24",
    (1, 4): "PCM_32",
    (3, 4): "FLOAT",
    (3, 8): "DOUBLE",
    (6, 1): "ALAW",
    (7, 1): "ULAW",
}
_MPEG_TAGS = (0x50, 0x55)


def wav_coding(layout: Layout, tag: int, bits: int) -> Layout:
    """A layout completed with the coding of a WAV format tag."""
    width = (bits + 7) // 8
    coding = _WAV_CODINGS.get((tag, width)) if layout.align == width * layout.channels else None
    if tag == 1 and width == 3 and layout.align == 4 * layout.channels:
        coding = "PCM_24"
    return layout._replace(coding=coding, is_mpeg=tag in _MPEG_TAGS)


def take(stream: ByteStream, n: int) -> bytes:
    """Read `n` bytes of a header; AudioError if they are missing."""
    data = stream.read(n)
    if len(data) < n:
        raise AudioError("not an audio file (its header is not complete)")
    return data


def is_placeholder(size: int) -> bool:
    """Whether a chunk size is a value that programs write if they do not know it."""
    return (
        size == 0
        or 0x7FFFF000 <= size <= 0x80000000
        or 0xFFFFF000 <= size <= 0xFFFFFFFF
        or size >= (1 << 62) - 1
        or size < 0
    )


def is_known_chunk(style: Style, head: bytes) -> bool:
    """Whether bytes start with the name of a known chunk."""
    if style is W64:
        return head[4:16] == _W64_TAIL
    return head[: style.name].lower().strip() in style.known


def parts_behind(stream: ByteStream, style: Style | None, odd: bool) -> list[tuple[int, int]]:
    """Account for everything after a chunk of samples.

    Args:
        stream: at the first byte after the chunk; read to its end.
        style: layout of the chunks.
        odd: whether the chunk has an odd size; some writers omit the padding byte.

    Returns:
        (start, size) of further chunks of samples.

    Raises:
        AudioError: there are bytes that are neither chunks nor tags.
    """
    parts: list[tuple[int, int]] = []
    if odd and stream.peek(1) == b"\0":
        stream.skip(1)
    for _ in range(MAX_CHUNKS):
        head = stream.peek(style.head if style else 8)
        if len(head) < (style.head if style else 8) or _is_tag(head):
            stream.skip(2**62)
            return parts
        if style is None or not is_known_chunk(style, head):
            _check_zeros(stream)
            return parts
        name, size = style.parse(head)
        if name.lower() == b"fmt ":
            raise AudioError("its format changes behind the audio; split it first")
        stream.skip(style.head)
        start = stream.tell()
        if name == style.audio and size:
            parts.append((start, size))
        if size < 0:
            return parts
        stream.skip(size)
        end = stream.tell()
        if style.pad == 2 and size % 2 and stream.peek(1) == b"\0":
            stream.skip(1)
        elif style.pad > 2:
            stream.skip(-size % style.pad)
        if end < start + size:
            return parts
    raise AudioError(f"damaged: more than {MAX_CHUNKS} chunks are behind its audio")


def _is_tag(head: bytes) -> bool:
    return head.startswith((b"TAG", b"APETAGEX", b"LYRICSBE"))


def _check_zeros(stream: ByteStream) -> None:
    """Check that only zeros follow."""
    place = stream.tell()
    magic = stream.peek(4)
    while data := stream.some():
        if any(data):
            what = f"another file ({magic.decode()})" if magic in _FILES else "bytes"
            raise PartialAudioError(
                f"behind its audio, at byte {place:,}, follow {what} that its header does not "
                "account for"
            )


def w64_layout(stream: ByteStream) -> Layout | None:
    """The layout of a Sony Wave64 file; see `wav_layout`."""
    if not stream.peek(40).startswith(_W64_RIFF):
        return None
    stream.skip(40)
    fmt = b""
    for _ in range(MAX_CHUNKS):
        chunk = W64.parse(take(stream, 24))
        if chunk[0] == W64.audio:
            break
        start, size = stream.tell(), chunk[1]
        if size < 0:
            raise AudioError("not an audio file (a chunk of negative size)")
        if chunk[0].startswith(b"fmt "):
            fmt = take(stream, min(size, 40))
        stream.skip(start + size + -size % 8 - stream.tell())
    else:
        raise AudioError(f"not an audio file (more than {MAX_CHUNKS} chunks before its audio)")
    if len(fmt) < 16:
        return None
    tag, channels, sample_rate, _, align, bits = struct.unpack("<HHIIHH", fmt[:16])
    if tag == 0xFFFE:
        tag = int.from_bytes(fmt[24:26], "little")
    known = not is_placeholder(chunk[1] + 24)
    layout = Layout(
        "W64", None, sample_rate, channels, max(1, align), stream.tell(), chunk[1], known, W64
    )
    return wav_coding(layout, tag, bits)._replace(is_mpeg=False)


_AU_CODINGS = {
    1: "ULAW",
    27: "ALAW",
    2: "PCM_S8",
    3: "PCM_16",
    4: "PCM_24",
    5: "PCM_32",
    6: "FLOAT",
    7: "DOUBLE",
}


def au_layout(stream: ByteStream) -> Layout | None:
    """The layout of a Sun or NeXT file; see `wav_layout`."""
    head = stream.peek(24)
    if head[:4] not in (b".snd", b"dns.") or len(head) < 24:
        return None
    order = ">" if head[:4] == b".snd" else "<"
    start, n_bytes, coding, rate, channels = struct.unpack(f"{order}5I", head[4:])
    stream.skip(max(24, start))
    name = _AU_CODINGS.get(coding)
    align = max(1, channels * READ_WIDTHS[name]) if name else 1
    known = not is_placeholder(n_bytes) or not stream.peek(1)
    return Layout("AU", name, rate, channels, align, stream.tell(), n_bytes, known, None, order)


_AIFF_CODINGS = {  # compression, bits: coding, order
    (b"NONE", 8): ("PCM_S8", ">"),
    (b"raw ", 8): ("PCM_U8", ">"),
    **{(b"NONE", bits): (f"PCM_{bits}", ">") for bits in (16, 24, 32)},
    **{(b"twos", bits): (f"PCM_{bits}", ">") for bits in (16, 24, 32)},
    **{(b"sowt", bits): (f"PCM_{bits}", "<") for bits in (16, 24, 32)},
    **{(name, 32): ("FLOAT", ">") for name in (b"fl32", b"FL32")},
    **{(name, 64): ("DOUBLE", ">") for name in (b"fl64", b"FL64")},
    **{(name, bits): ("ULAW", ">") for name in (b"ulaw", b"ULAW") for bits in (8, 16)},
    **{(name, bits): ("ALAW", ">") for name in (b"alaw", b"ALAW") for bits in (8, 16)},
}


def aiff_layout(stream: ByteStream) -> Layout | None:
    """The layout of an AIFF or AIFF-C file; see `wav_layout`.

    It is also None if the format comes after the audio, or the sample rate is not an integer.
    """
    if (head := stream.peek(12))[:4] != b"FORM" or head[8:12] not in (b"AIFF", b"AIFC"):
        return None
    stream.skip(12)
    comm = b""
    for _ in range(MAX_CHUNKS):
        name, n_bytes = IFF.parse(take(stream, 8))
        if name == b"SSND":
            break
        start = stream.tell()
        if name == b"COMM":
            comm = take(stream, min(n_bytes, 26))
        stream.skip(start + n_bytes + n_bytes % 2 - stream.tell())
    else:
        raise AudioError(f"not an audio file (more than {MAX_CHUNKS} chunks before its audio)")
    if len(comm) < 18:
        return None
    channels, n_samples, bits, exponent, mantissa = struct.unpack(">hIhHQ", comm[:18])
    shift = 16383 + 63 - exponent
    rate = mantissa >> shift if 0 <= shift < 64 else 0
    (offset,) = struct.unpack(">I4x", take(stream, 8))
    stream.skip(offset)
    compression = comm[18:22] if len(comm) >= 22 else b"NONE"
    coding, order = _AIFF_CODINGS.get((compression, -(-bits // 8) * 8), (None, ">"))
    align = max(1, channels * READ_WIDTHS[coding]) if coding and channels > 0 else 1
    known = not is_placeholder(n_bytes) or (not n_samples and not stream.peek(1))
    size = max(0, n_bytes - 8 - offset)
    if n_bytes == 0 and not known:
        size = 0
        known = is_known_chunk(IFF, stream.peek(8))
    return Layout("AIFF", coding, rate, channels, align, stream.tell(), size, known, IFF, order)


def caf_layout(stream: ByteStream) -> Layout | None:
    """The layout of a Core Audio file; see `wav_layout`."""
    if not stream.peek(8).startswith(b"caff"):
        return None
    stream.skip(8)
    desc = b""
    for _ in range(MAX_CHUNKS):
        name, n_bytes = CAF.parse(take(stream, 12))
        if name == b"data":
            break
        if n_bytes < 0:
            raise AudioError("not an audio file (a chunk of negative size)")
        start = stream.tell()
        if name == b"desc":
            desc = take(stream, min(n_bytes, 32))
        stream.skip(start + n_bytes - stream.tell())
    else:
        raise AudioError(f"not an audio file (more than {MAX_CHUNKS} chunks before its audio)")
    if len(desc) < 32:
        return None
    take(stream, 4)  # edit count
    rate, coding, flags, align, per_packet, channels, bits = struct.unpack(">d4s5I", desc)
    subtype = None
    if coding == b"lpcm" and per_packet == 1 and align == channels * (bits // 8) and bits % 8 == 0:
        floats = {32: "FLOAT", 64: "DOUBLE"}
        whole = {8: "PCM_S8", 16: "PCM_16", 24: "PCM_24", 32: "PCM_32"}
        subtype = (floats if flags & 1 else whole).get(bits)
    elif coding in (b"ulaw", b"alaw") and per_packet == 1 and align == channels:
        subtype = coding.decode().upper()
    if not (1 <= rate < 2**31 and rate == int(rate)):
        subtype, rate = None, 0
    size, known, order = max(0, n_bytes - 4), n_bytes >= 0, "<" if flags & 2 else ">"
    return Layout(
        "CAF", subtype, int(rate), channels, max(1, align), stream.tell(), size, known, CAF, order
    )
