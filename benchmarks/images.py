"""Quality and size of image models on a folder of images, compared with JPEG and WebP.

Every image is encoded to a token file and decoded, as on the command line. Models whose names
differ only in a trailing `-seed0`, `-seed1`, ... share a row, with mean and half of the range.

`--peers` adds JPEG and WebP at fixed qualities; `--equal` adds them, for each image, at the highest
quality whose file is not larger than the first model's (or the lowest there is), and at the lowest
quality whose PSNR is not below the first model's. `--photos` takes photographs that come with
scikit-image and scikit-learn in place of a folder.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import statistics
import sys
from bisect import bisect_left
from collections.abc import Iterable
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
PHOTOS = {  # package -> photographs in it
    "skimage": [
        f"data/{name}"
        for name in (
            "astronaut.png", "coffee.png", "chelsea.png", "motorcycle_left.png", "rocket.jpg",
        )
    ],
    "sklearn": [f"datasets/images/{name}" for name in ("china.jpg", "flower.jpg")],
}  # fmt: skip
METRICS = {"psnr": 2, "ssim": 4, "ms_ssim": 4}  # metric -> decimals
PEERS = {"JPEG": ("JPEG", (1, 3, 5, 10, 20)), "WebP": ("WEBP", (0, 2, 5, 10, 20))}


def compare(reference: np.ndarray, decoded: np.ndarray) -> dict[str, float]:
    """The metrics of (H, W, 3) pixels that need no neural network: all except LPIPS."""
    from vpcodec.metrics import image

    return {name: getattr(image, name)(reference, decoded) for name in METRICS}


def read(paths: Iterable[Path], limit: int | None = None) -> list[np.ndarray]:
    """The first `limit` RGB images, (H, W, 3) uint8 each, without transparent and grey ones."""
    from vpcodec.media.image import load_image

    images = (load_image(path) for path in paths)
    return list(islice((image for image in images if image.shape[2] == 3), limit))


def evaluate(
    model: str, images: list[np.ndarray], backend: str
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Means over the images, with codebook usage over all tokens; and what was found of each."""
    from vpcodec.codec import ImageCodec
    from vpcodec.tokenfile import write_tokens
    from vpcodec.usage import CodebookUsage

    codec = ImageCodec.from_pretrained(model, backend=backend)
    usage = CodebookUsage(codec.codebook_size)
    rows = []
    for image in images:
        height, width, _ = image.shape
        tokens = codec.encode(image)
        usage.update(tokens)
        file = io.BytesIO()
        header = codec.header(*image.shape)
        write_tokens(file, tokens.reshape(1, -1), header, coder=codec.coder)
        row = {"bpp": 8 * len(file.getvalue()) / (height * width)}
        rows.append(row | compare(image, codec.decode(tokens, (height, width))))
    found = means(rows) | {
        "codec": codec.name,
        "codebook_size": codec.codebook_size,
        "nominal_bpp": codec.config.bits_per_pixel,
        "cvu": usage.cvu,
        "entropy": usage.entropy,
        "used": usage.used,
        "tokens": usage.tokens,
    }
    return found, rows


def coded(format: str, quality: int, image: np.ndarray) -> tuple[float, np.ndarray]:
    """Bits per pixel of an image in a format, and the image decoded."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, format, quality=quality)
    size = 8 * len(file.getvalue()) / (image.shape[0] * image.shape[1])
    return size, np.asarray(Image.open(file).convert("RGB"))


def evaluate_equal(
    name: str, images: list[np.ndarray], ours: list[dict[str, float]]
) -> list[dict[str, Any]]:
    """Means over the images where a format takes our bytes, and where it has our PSNR."""
    from vpcodec.metrics.image import psnr

    format = PEERS[name][0]
    lowest = min(PEERS[name][1])
    at_size, at_quality = [], []
    for image, own in zip(images, ours):
        qualities = range(lowest, 101)  # sizes and PSNR rise with them, nearly always

        def too_large(quality: int, image: np.ndarray = image, own: dict = own) -> bool:
            return coded(format, quality, image)[0] > own["bpp"]

        def good(quality: int, image: np.ndarray = image, own: dict = own) -> bool:
            return psnr(image, coded(format, quality, image)[1]) >= own["psnr"]

        for rows, place in (
            (at_size, bisect_left(qualities, True, key=too_large) - 1),
            (at_quality, bisect_left(qualities, True, key=good)),
        ):
            quality = qualities[min(max(0, place), len(qualities) - 1)]
            bpp, decoded = coded(format, quality, image)
            rows.append({"bpp": bpp} | compare(image, decoded))
    return [
        means(at_size) | {"codec": f"{name}, equal size"},
        means(at_quality) | {"codec": f"{name}, equal PSNR"},
    ]


def evaluate_peer(name: str, images: list[np.ndarray]) -> list[dict[str, Any]]:
    """Means over the images at each quality of a format."""
    format, qualities = PEERS[name]
    found = []
    for quality in qualities:
        rows = []
        for image in images:
            bpp, decoded = coded(format, quality, image)
            rows.append({"bpp": bpp} | compare(image, decoded))
        found.append(means(rows) | {"codec": f"{name} {quality}"})
    return found


def folder_of(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"--photos needs {package} (pip install scikit-image scikit-learn)")
    return Path(spec.origin).parent


def means(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.mean(row[name] for row in rows) for name in rows[0]}


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table, with one row for all seeds of a model."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(re.sub(r"-seed\d+$", "", row["codec"]), []).append(row)
    columns = {"nominal_bpp": 3, "bpp": 3, **METRICS, "cvu": 3, "entropy": 2}
    lines = [
        "| codec | K | seeds | nominal bpp | bpp on disk | PSNR | SSIM | MS-SSIM | CVU | "
        "bits/token |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, group in groups.items():
        size = f"{group[0]['codebook_size']:,}" if "codebook_size" in group[0] else ""
        cells = [
            spread([row[column] for row in group], digits) if column in group[0] else ""
            for column, digits in columns.items()
        ]
        seeds = str(len(group)) if size else ""
        lines.append(f"| {name} | {size} | {seeds} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float], digits: int) -> str:
    half = (max(values) - min(values)) / 2
    note = f" ± {half:.{digits}f}" if len(values) > 1 and half >= 0.5 * 10**-digits else ""
    return f"{statistics.mean(values):.{digits}f}{note}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["image-fsp"], help="bundled names or folders")
    parser.add_argument("--images", type=Path, default=DATA / "images_dev", help="folder")
    parser.add_argument("--backend", choices=("onnx", "torch"), default="onnx")
    parser.add_argument("--limit", type=int, help="use only this many RGB images")
    parser.add_argument("--peers", action="store_true", help="JPEG and WebP as well")
    parser.add_argument("--equal", action="store_true", help="JPEG and WebP at equal size and PSNR")
    parser.add_argument("--photos", action="store_true", help="photographs of Python packages")
    parser.add_argument("--json", action="store_true", help="print a JSON document")
    args = parser.parse_args()
    if not (args.photos or args.images.is_dir()):
        raise SystemExit(f"{args.images}: no such folder")
    from vpcodec.media.image import ImageError, find_images
    from vpcodec.model_folder import ModelError

    rows, each = [], []
    try:
        if args.photos:
            paths = [folder_of(package) / name for package in PHOTOS for name in PHOTOS[package]]
        else:
            paths = [args.images / path for path in find_images(args.images)]
        images = read(paths, args.limit)
        if not images:
            raise SystemExit(f"{args.images}: no RGB images")
        for model in args.models:
            row, own = evaluate(model, images, args.backend)
            rows.append(row)
            each.append(own)
            print(f"{model}: PSNR {rows[-1]['psnr']:.2f} dB", file=sys.stderr)
    except (ImageError, ModelError) as error:
        raise SystemExit(str(error)) from None
    for name in PEERS if args.peers else ():
        rows += evaluate_peer(name, images)
    for name in PEERS if args.equal else ():
        rows += evaluate_equal(name, images, each[0])
    if args.json:
        print(json.dumps({"images": len(images), "rows": rows}, indent=2))
    else:
        print(f"{len(images)} images; means over images, CVU over all tokens\n\n{table(rows)}")


if __name__ == "__main__":
    main()
