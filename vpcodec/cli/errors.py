"""Errors that a user sees as one line."""

from __future__ import annotations

from ..config import ConfigError
from ..corpus import CorpusError
from ..media.audio import AudioError, PartialAudioError
from ..media.files import FolderExistsError
from ..media.image import ImageError
from ..model_folder import ModelError
from ..records import RecordError
from ..terminal import escape
from ..tokenfile import GapError, OtherWeightsError, TokenFileError


class UsageError(ValueError):
    """A command line that cannot be carried out."""


class MissingExtra(ImportError):
    """A command whose optional packages are not installed."""


HINTS: dict[type[BaseException], str] = {  # what on the command line helps
    FolderExistsError: " (use --force to replace it)",
    PartialAudioError: "; --truncated keep takes what is there",
    GapError: "; --max-gap allows more",
    OtherWeightsError: "; --model FOLDER names the one that made it",
}
USER_ERRORS = (
    AudioError,
    ConfigError,
    CorpusError,
    ImageError,
    ModelError,
    RecordError,
    TokenFileError,
    UsageError,
    MissingExtra,
    MemoryError,
    OSError,
)


def explain(error: BaseException) -> str:
    """One line for a user."""
    if isinstance(error, MemoryError):
        text = f"out of memory ({error})" if str(error) else "out of memory"
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = f"{error}{HINTS.get(type(error), '')}"
    return one_line(text)


def one_line(text: str) -> str:
    """Text for a message: without line breaks, and without what commands a terminal."""
    return escape(" ".join(text.split()))
