"""Makes tok/*.tok and tok/vectors.json from docs/token-format.md alone, without vpcodec.

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


def u(value: int, size: int) -> bytes:
    return value.to_bytes(size, "little")


def crc(data: bytes) -> bytes:
    return u(zlib.crc32(data), 4)


def leb128(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value % 128 + 128]) + leb128(value // 128)


def block(number: int, frames: list[tuple[int, ...]], base: int) -> bytes:
    digits = [token for frame in frames for token in frame]
    value = sum(token * base**i for i, token in enumerate(digits))
    size = 0
    while 256**size < base ** len(digits):
        size += 1
    head = u(0, 1) + u(size, 3) + u(len(frames), 2)
    payload = u(value, size)
    check = zlib.crc32(head + payload) ^ number * 0x9E3779B1 % 2**32
    return head + u(check, 4) + payload


def token_file(v: dict) -> bytes:
    name = v["model"].encode()
    if v["kind"] == "audio":
        kind, total = 1, v["n_samples"]
        own = u(v["sample_rate"], 4) + u(v["original_rate"], 4)
        own += u(total, 8) if v["known"] else b"\xff" * 8
    else:
        kind, total = 2, v["width"] * v["height"]
        own = u(v["width"], 4) + u(v["height"], 4) + u(v["components"], 8)
    header = (
        bytes.fromhex("89 54 4f 4b 0d 0a 1a 0a") + u(1, 1) + u(1, 1) + u(kind, 1)
        + u(v["channels"], 1) + own
        + u(v["hop_length"], 4) + u(v["codebook_size"] - 1, 4) + u(v["block_frames"], 2)
        + bytes.fromhex(v["fingerprint"]) + u(len(name), 1) + name
    )  # fmt: skip
    frames = list(zip(*v["tokens"], strict=True))
    step = v["block_frames"]
    blocks = [
        block(i // step, frames[i : i + step], v["codebook_size"])
        for i in range(0, len(frames), step)
    ]
    index = b"".join(leb128(len(data)) for data in blocks)
    word = u(255, 1) + u(len(index), 3)
    trailer = word + u(len(frames), 8) + u(total, 8) + index + word
    return header + crc(header) + b"".join(blocks) + trailer + crc(trailer)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, vector in VECTORS.items():
        (FOLDER / f"{name}.tok").write_bytes(token_file(vector))
    text = json.dumps(VECTORS, indent=1, ensure_ascii=False)
    (FOLDER / "vectors.json").write_text(text + "\n", encoding="utf-8")
