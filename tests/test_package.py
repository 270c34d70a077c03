"""The wheel: complete, with the bundled model, usable away from the repository."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from paths import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the unpacked wheel."""
    pytest.importorskip("hatchling", reason="needs the dev extra")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(installed: Path, *arguments: str) -> subprocess.CompletedProcess:
    code = (
        f"import sys; sys.path.insert(0, {str(installed)!r}); import vpcodec; "
        f"assert vpcodec.__file__.startswith({str(installed)!r}); "
        "from vpcodec.cli import main; main()"
    )
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=installed, check=True, capture_output=True, text=True)


def test_wheel_encodes_and_decodes_with_its_own_model(installed, speech_wav, tmp_path):
    run(installed, "encode", str(speech_wav), str(tmp_path / "a.tok"))
    run(installed, "decode", str(tmp_path / "a.tok"), str(tmp_path / "a.wav"))
    assert (tmp_path / "a.wav").stat().st_size > 200_000
    assert str(installed) in run(installed, "models", "--json").stdout


def test_wheel_holds_no_strangers(installed):
    tops = {path.name for path in installed.iterdir()}
    assert tops == {"vpcodec", next(iter(t for t in tops if t.endswith(".dist-info")))}
    assert (installed / "vpcodec" / "py.typed").exists()
    names = [str(path) for path in installed.rglob("*")]
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pt")]


def test_wheel_holds_the_page_and_its_runtime(installed):
    def files(folder: Path) -> dict[str, int]:
        found = (path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.stat().st_size for path in found}

    assert files(installed / "vpcodec" / "web") == files(ROOT / "web")
    command = [sys.executable, "-c", "from vpcodec.cli.server import site; print(*site().values())"]
    served = subprocess.run(command, cwd=installed, check=True, capture_output=True, text=True)
    assert all(path.startswith(str(installed)) for path in served.stdout.split())
