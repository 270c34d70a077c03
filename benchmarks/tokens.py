"""Facts about the tokens of models for language models, as a table in Markdown.

    python benchmarks/tokens.py speech/ -m speech-3k -m speech-1k

Per channel: tokens per second, nominal bits per token, bits per token under the model's entropy
coder, the entropy of single tokens (a lower bound where there are fewer tokens than codes) and of
their digits, the share of the codebook that occurs, and the share of tokens that stay the same when
the decoded audio is encoded again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from vpcodec import AudioCodec
from vpcodec.media.audio import find_audio, load
from vpcodec.usage import CodebookUsage


def measure(name: str, files: list[Path]) -> list[str]:
    """The cells of a row."""
    codec = AudioCodec.from_pretrained(name, threads=1)
    usage = CodebookUsage(codec.codebook_size)
    digits = [CodebookUsage(level) for level in codec.token_levels]
    coded = same = 0
    for path in files:
        tokens = codec.encode(*load(path))
        usage.update(tokens)
        for count, values in zip(digits, np.moveaxis(codec.split_tokens(tokens), -1, 0)):
            count.update(values)
        if codec.coder is not None:
            coded += 8 * sum(
                len(codec.coder.pack(tokens[:, start : start + 2048].T))
                for start in range(0, tokens.shape[1], 2048)
            )
        same += int((codec.encode(codec.decode(tokens)) == tokens).sum())
    of_coder = f"{coded / usage.tokens:.2f}" if coded else "-"
    return [
        name,
        f"{codec.frame_rate:.2f}",
        f"{codec.codebook_size:,}",
        " x ".join(map(str, codec.token_levels)),
        f"{np.log2(codec.codebook_size):.2f}",
        of_coder,
        f"{usage.entropy:.2f}",
        f"{sum(count.entropy for count in digits):.2f}",
        f"{100 * usage.used:.1f} %",
        f"{100 * same / usage.tokens:.1f} %",
        f"{usage.tokens:,}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="recordings")
    parser.add_argument("-m", "--model", action="append", required=True)
    options = parser.parse_args()
    files = [options.folder / name for name in find_audio(options.folder)]
    heads = [
        *("model", "tokens/s", "codebook", "digits", "nominal bits", "coded bits"),
        *("entropy", "entropy of digits", "codes used", "consistency", "tokens"),
    ]
    print(f"| {' | '.join(heads)} |")
    print(f"|---|{'---:|' * (len(heads) - 1)}")
    for name in options.model:
        print(f"| {' | '.join(measure(name, files))} |")


if __name__ == "__main__":
    main()
