"""Makes golden/: token files of the models that ship, with what is in them and decoded of them.

python tests/resources/make_golden.py

Nothing that is there is ever changed: users have such files. Run it when a model gets a new encoder
(which adds a file), a new decoder (which adds samples), or new tables or another version of the
format (--again and the names of models add a file each).

The files are made of speech.wav, or of a picture that is computed here. golden.json says for each
file which version made it, the identity in its header, and the SHA-256 of its tokens (int64,
little-endian, channels first), which never change. Samples are those of one decoder, found by its
model's fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from vpcodec import Codec, __version__, read_tokens
from vpcodec.hub import bundled_folders
from vpcodec.media.image import save_image

HERE = Path(__file__).resolve().parent
FOLDER = HERE / "golden"
INDEX = FOLDER / "golden.json"
EVERY = 97  # of the decoded samples that are kept


def source(modality: str, folder: Path) -> Path:
    """The file that token files are made of."""
    if modality == "audio":
        return HERE / "speech.wav"
    y, x, c = np.mgrid[:75, :110, :3]
    pixels = 128 + 90 * np.sin((x + 2 * c) / 17) * np.cos(y / (11 + 3 * c))
    save_image(folder / "picture.png", pixels.astype(np.uint8))
    return folder / "picture.png"


def tokens_facts(file: Path) -> dict[str, object]:
    """What golden.json says of a file's contents."""
    tokens, header = read_tokens(file)
    return {
        "model": header.model,
        "identity": header.fingerprint.hex(),
        "shape": list(tokens.shape),
        "tokens": hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest(),
    }


def samples(codec: Codec, file: Path) -> np.ndarray:
    """Some of the samples, at the model's rate, or pixels that are decoded of a file."""
    tokens, header = read_tokens(file)
    if codec.modality == "audio":
        decoded = codec.decode(tokens, header.model_samples)
    else:
        tokens = tokens.reshape(-1, header.rows, header.columns)
        decoded = codec.decode(tokens, (header.height, header.width))
    return decoded.ravel()[::EVERY].astype(float)


def main(again: list[str]) -> None:
    index = {"files": {}, "decoded": {}}
    if INDEX.exists():
        index = json.loads(INDEX.read_text())
    FOLDER.mkdir(exist_ok=True)
    for name in bundled_folders():
        codec = Codec.from_pretrained(name, threads=1)
        space = codec.space.hex()
        files = index["files"].items()
        own = [file for file, facts in files if space.startswith(facts["identity"])]
        if not own or name in again:
            file = f"{name}-{len([x for x in index['files'] if x.startswith(name)]) + 1}.tok"
            with tempfile.TemporaryDirectory() as folder:
                codec.encode_file(source(codec.modality, Path(folder)), FOLDER / file)
            index["files"][file] = {"made_by": __version__, **tokens_facts(FOLDER / file)}
            own.append(file)
        mark = codec.fingerprint.hex()
        if mark not in index["decoded"]:
            values = " ".join(f"{value:.5g}" for value in samples(codec, FOLDER / own[0]))
            index["decoded"][mark] = {"model": name, "file": own[0], "values": values}
    INDEX.write_text(json.dumps(index, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[2:] if sys.argv[1:2] == ["--again"] else [])
