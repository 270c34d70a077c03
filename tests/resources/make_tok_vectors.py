"""Makes tok/*.tok and their lists from docs/token-format.md alone, without vpcodec.

vectors.json lists the files of version 1, vectors-2.json those of version 2, whose names end in -2.
Run it from anywhere; it must reproduce the files that are there byte for byte.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

FOLDER = Path(__file__).parent / "tok"

VECTORS = {
    "mono": dict(
        kind="audio", model="speech-3k", fingerprint="000102030405060708090a0b0c0d0e0f",
        sample_rate=16000, original_rate=16000, channels=1, n_samples=900, hop_length=96,
        codebook_size=117649, block_frames=4, known=True,
        tokens=[[0, 1, 117648, 65536, 58824, 343, 49, 7, 99999, 12345]],
    ),
    "stereo-piped": dict(
        kind="audio", model="größe", fingerprint="ff" * 16, sample_rate=16000, original_rate=44100,
        channels=2, n_samples=3000, hop_length=270, codebook_size=16384, block_frames=3,
        known=False, tokens=[[5, 4, 3, 2, 1], [16383, 0, 8192, 1, 77]],
    ),
    "empty": dict(
        kind="audio", model="m", fingerprint="00" * 16, sample_rate=24000, original_rate=8000,
        channels=1, n_samples=0, hop_length=320, codebook_size=2, block_frames=512, known=True,
        tokens=[[]],
    ),
    "rgba": dict(
        kind="image", model="image-fsp", fingerprint="0f0e0d0c0b0a09080706050403020100", width=20,
        height=11, components=4, channels=2, hop_length=8, codebook_size=1000, block_frames=4,
        tokens=[[10, 11, 12, 20, 21, 22], [999, 0, 999, 1, 500, 2]],
    ),
}  # fmt: skip
VECTORS_2 = {
    "numbered-2": dict(
        kind="audio", model="speech-3k", fingerprint="0001020304050607", sample_rate=16000,
        original_rate=16000, channels=1, n_samples=900, hop_length=96, codebook_size=250047,
        block_frames=2048, known=True,
        tokens=[[0, 1, 250046, 65536, 58824, 343, 49, 7, 99999, 12345]],
    ),
    "short-2": dict(
        kind="audio", model="größe", fingerprint="ff" * 8, sample_rate=16000, original_rate=44100,
        channels=2, n_samples=3000, hop_length=270, codebook_size=16384, block_frames=5,
        known=True, tokens=[[5, 4, 3, 2, 1], [16383, 0, 8192, 1, 77]],
    ),
    "stereo-piped-2": dict(
        kind="audio", model="speech-1k@2", fingerprint="ff" * 8, sample_rate=16000,
        original_rate=44100, channels=2, n_samples=3000, hop_length=270, codebook_size=117649,
        block_frames=3, known=False, tokens=[[5, 4, 3, 2, 1], [16383, 0, 8192, 1, 77]],
    ),
    "empty-2": dict(
        kind="audio", model="m", fingerprint="00" * 8, sample_rate=24000, original_rate=8000,
        channels=1, n_samples=0, hop_length=320, codebook_size=2, block_frames=512, known=True,
        tokens=[[]],
    ),
    "rgba-2": dict(
        kind="image", model="image-fsp", fingerprint="0f0e0d0c0b0a0908", width=20, height=11,
        components=4, channels=2, hop_length=8, codebook_size=15360, block_frames=6,
        tokens=[[10, 11, 12, 20, 21, 22], [999, 0, 999, 1, 500, 2]],
    ),
}  # fmt: skip
NUMBERED = {  # model: number, kind, hop length, codebook size, sample rate
    "speech-3k": (16, "audio", 96, 250047, 16000),
    "speech-vp-16384": (17, "audio", 96, 16384, 16000),
    "speech-1k": (18, "audio", 270, 117649, 16000),
    "image-fsp": (19, "image", 8, 15360, None),
    "speech-6k": (20, "audio", 48, 250047, 16000),
}


def u(value: int, size: int) -> bytes:
    return value.to_bytes(size, "little")


def crc(data: bytes) -> bytes:
    return u(zlib.crc32(data), 4)


def leb128(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value % 128 + 128]) + leb128(value // 128)


def raw(frames: list[tuple[int, ...]], base: int) -> bytes:
    digits = [token for frame in frames for token in frame]
    value = sum(token * base**i for i, token in enumerate(digits))
    size = 0
    while 256**size < base ** len(digits):
        size += 1
    return u(value, size)


def block(number: int, frames: list[tuple[int, ...]], base: int) -> bytes:
    payload = raw(frames, base)
    head = u(0, 1) + u(len(payload), 3) + u(len(frames), 2)
    check = zlib.crc32(head + payload) ^ number * 0x9E3779B1 % 2**32
    return head + u(check, 4) + payload


def token_file(v: dict) -> bytes:
    name = v["model"].encode()
    if v["kind"] == "audio":
        kind = 1
        own = u(v["sample_rate"], 4) + u(v["original_rate"], 4)
        own += u(v["n_samples"], 8) if v["known"] else b"\xff" * 8
    else:
        kind = 2
        own = u(v["width"], 4) + u(v["height"], 4) + u(v["components"], 8)
    header = (
        bytes.fromhex("89 54 4f 4b 0d 0a 1a 0a") + u(1, 1) + u(1, 1) + u(kind, 1)
        + u(v["channels"], 1) + own
        + u(v["hop_length"], 4) + u(v["codebook_size"] - 1, 4) + u(v["block_frames"], 2)
        + bytes.fromhex(v["fingerprint"]) + u(len(name), 1) + name
    )  # fmt: skip
    return header + crc(header) + blocks_and_trailer(v)


def blocks_and_trailer(v: dict) -> bytes:
    frames, total = list(zip(*v["tokens"], strict=True)), n_samples(v)
    step = v["block_frames"]
    blocks = [
        block(i // step, frames[i : i + step], v["codebook_size"])
        for i in range(0, len(frames), step)
    ]
    index = b"".join(leb128(len(data)) for data in blocks)
    word = u(255, 1) + u(len(index), 3)
    trailer = word + u(len(frames), 8) + u(total, 8) + index + word
    return b"".join(blocks) + trailer + crc(trailer)


def n_samples(v: dict) -> int:
    return v["n_samples"] if v["kind"] == "audio" else v["width"] * v["height"]


def token_file_2(v: dict) -> bytes:
    """Version 2."""
    frames = list(zip(*v["tokens"], strict=True))
    one_block = v.get("known", True) and len(frames) <= v["block_frames"]
    header = bytes.fromhex("89 54 4f 4b 0d 0a 1a 0a") + u(1 if one_block else 2, 1) + u(2, 1)
    name, _, revision = v["model"].partition("@")
    shape = v["kind"], v["hop_length"], v["codebook_size"], v.get("sample_rate")
    if name in NUMBERED and NUMBERED[name][1:] == shape:
        header += u(NUMBERED[name][0], 1) + u(int(revision or 1), 1)
    else:
        name = v["model"].encode()
        header += u(1 if v["kind"] == "audio" else 2, 1) + u(len(name), 1) + name
        header += leb128(v["hop_length"]) + leb128(v["codebook_size"] - 1)
        header += leb128(v["sample_rate"]) if v["kind"] == "audio" else b""
    header += bytes.fromhex(v["fingerprint"])
    if v["kind"] == "audio":
        same = v["original_rate"] == v["sample_rate"]
        header += leb128(v["channels"]) + leb128(0 if same else v["original_rate"])
        header += leb128(v["n_samples"] + 1 if v["known"] else 0)
    else:
        header += leb128(v["components"]) + leb128(v["width"]) + leb128(v["height"])
    if not one_block:
        header += leb128(v["block_frames"])
        return header + crc(header) + blocks_and_trailer(v)
    payload = raw(frames, v["codebook_size"])
    data = header + u(0, 1) + leb128(len(payload)) + payload
    return data + crc(data)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for vectors, make, index in (
        (VECTORS, token_file, "vectors.json"),
        (VECTORS_2, token_file_2, "vectors-2.json"),
    ):
        for name, vector in vectors.items():
            (FOLDER / f"{name}.tok").write_bytes(make(vector))
        text = json.dumps(vectors, indent=1, ensure_ascii=False)
        (FOLDER / index).write_text(text + "\n", encoding="utf-8")
