"""vpcodec generate: audio or a picture from a language model on tokens."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..lm import LMFolder


def generate(
    model: Path = typer.Option(
        ..., "--model", "-m", metavar="LM", help="Folder of a language model, of `vpcodec export`."
    ),
    output: str = typer.Option(
        ...,
        "--output",
        "-o",
        metavar="PATH",
        help="Audio or image file, token file (.tok), or - (stdout).",
    ),
    prompt: str = typer.Option(
        None,
        metavar="PATH",
        help="What to continue: audio, whose channels are mixed, a picture, whose upper half is "
        "kept, their token file, or -; default: nothing.",
    ),
    seconds: float = typer.Option(
        None, min=0.01, max=3600, metavar="S", help="Most seconds of audio to add; default: 10."
    ),
    seed: int = typer.Option(0, min=0, max=2**63 - 1, metavar="N", help="Seed of the sampling."),
    temperature: float = typer.Option(
        1.0, min=0, max=100, metavar="T", help="Divides the logits; 0: always the likeliest digit."
    ),
    top_p: float = typer.Option(
        1.0, min=1e-6, max=1, metavar="P", help="Draw each digit from the likeliest, of this share."
    ),
    codec: str = typer.Option(
        None, metavar="MODEL", help="The codec, where it is not under the name that the LM has."
    ),
) -> None:
    """Generate audio or a picture with a language model, from nothing or as a continuation.

    The prompt is a part of the output. The same seed gives the same tokens.

    \b
    vpcodec generate -m my-lm --prompt in.wav -o out.wav
    vpcodec generate -m my-lm --seconds 5 --seed 3 -o - | aplay
    """
    from . import common, modalities

    common.need_extra("lm", "torch", "transformers", "safetensors")
    import numpy as np

    from ..codec import Codec
    from ..lm import continue_tokens, load_lm, read_lm
    from ..media.files import is_device
    from ..tokenfile import write_tokens

    folder = read_lm(model)
    with common.status() as note:
        coder: Any = Codec.from_pretrained(codec or folder.config.codec, note=note)
    folder.check_codec(coder.model)
    modality, grid = modalities.MODALITIES[coder.modality], folder.config.grid
    suffix = Path(output).suffix.lower()
    if output != "-" and not is_device(output) and suffix not in (".tok", *modality.outputs):
        known = " ".join(sorted({".tok", *modality.outputs}))
        raise common.UsageError(f"{output}: the suffix of the output must be one of {known}")
    if grid is not None:
        modalities.check_options(str(model), modality, seconds=seconds)
    given = np.empty(0, np.int64) if prompt is None else _tokens_of(prompt, coder, folder)
    rate = 1.0 if grid else coder.frame_rate
    length = folder.config.context - len(given) if grid else round((seconds or 10.0) * rate)
    network = load_lm(folder)
    bar = common.ProgressBar("generating", 1)
    try:
        found = continue_tokens(
            network,
            given,
            max(1, length),
            seed=seed,
            temperature=temperature,
            top_p=top_p,
            may_end=grid is None,
            progress=bar.report,
        )
    finally:
        bar.close()
    tokens = np.concatenate([given, found])[None]
    header = coder.token_header(tokens.reshape(1, *grid) if grid else tokens)
    target = common.pipe_out() if output == "-" else output
    if suffix == ".tok":
        write_tokens(target, tokens, header, coder=coder.coder)
    else:
        file = io.BytesIO()
        write_tokens(file, tokens, header)
        file.seek(0)
        coder.decode_file(file, target)
    size = f"{len(found)} tokens" if grid else f"{len(found) / rate:.2f} s, {len(found)} tokens"
    after = f" after {len(given)} of the prompt" if prompt is not None else ""
    typer.echo(f"{output}: {size}{after}, seed {seed}", err=True)


def _tokens_of(prompt: str, codec: Any, folder: LMFolder) -> NDArray[np.int64]:
    """(T,) tokens of a prompt: those of audio that are whole, or the upper rows of a picture."""
    from ..codec import read_tokens
    from ..tokenfile import TokenReader
    from . import common

    grid, file = folder.config.grid, io.BytesIO()
    header: Any
    if prompt != "-" and Path(prompt).suffix.lower() == ".tok":
        with open(prompt, "rb") as stream:
            reader = TokenReader(stream)
            if not codec.model.knows(reader.header.fingerprint):
                raise common.UsageError(f"{prompt}: not the tokens of {codec.name!r}")
            reader.coder = codec.coder
            tokens, header = reader.read_all()
    else:
        source = common.pipe_in() if prompt == "-" else prompt
        codec.encode_file(source, file, **({} if grid else {"mono": True}))
        file.seek(0)
        tokens, header = read_tokens(file, coder=codec.coder)
    if grid is None:
        if header.channels > 1:
            raise common.UsageError(f"{prompt}: tokens of {header.channels} channels, not of one")
        whole = header.model_samples // header.hop_length
        if not whole:
            raise common.UsageError(f"{prompt}: too short for a token")
        return tokens[0, :whole]
    rows, columns = grid[0] // 2, grid[1]
    if header.rows < rows or header.columns < columns:
        hop = codec.hop_length
        raise common.UsageError(f"{prompt}: smaller than {columns * hop} x {rows * hop} pixels")
    return tokens[0].reshape(header.rows, header.columns)[:rows, :columns].ravel()
