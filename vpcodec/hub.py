"""Names of models to folders: bundled, on disk, on the Hugging Face Hub, or of a registered source.

`open_model` is the only place where a name is resolved; `push` publishes a folder.
"""

from __future__ import annotations

import glob
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial, wraps
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar

from .config import ModelConfig
from .entropy import CoderSet
from .model_folder import CARD, CONFIG, ModelError, ModelFolder, read_folder
from .tokenfile import TokenHeader

DEFAULT_MODEL = "speech-3k"
DEFAULT_MODELS = {"audio": DEFAULT_MODEL, "image": "image-fsp"}  # modality -> name
MAX_DOWNLOAD_BYTES = 4 << 30  # of all files of a model together
SHOWN_BYTES = 1 << 20  # downloads of at least this size show their progress
PIPELINE_TAGS = {
    "audio": "audio-to-audio",
    "image": "image-to-image",
}  # modality -> the Hub's name for the task
LOG_IN = "`hf auth login`, or HF_TOKEN"

_PACKAGE = Path(__file__).parent
_FRONT_MATTER = re.compile(r"---[ \t]*(\r?\n)(.*?\r?\n)(?=---[ \t]*(\r?\n|$))", re.DOTALL)
_NAME = re.compile(r"(?!\.+$)[\w.+=-]{1,200}", re.ASCII)  # of a file, by a server
_T = TypeVar("_T")

Note = Callable[[str], None]  # called with a line of text before a step that takes a while


class Source(Protocol):
    """A source of models with names of their own, such as those that others published."""

    def owns(self, name: str) -> bool:
        """Whether a name belongs to this source; names of bundled models must not."""

    def open(self, name: str, *, note: Note | None = None) -> ModelFolder:
        """The folder of a model.

        Raises:
            ModelError: unknown model, or it cannot be had.
        """

    def catalog(self) -> Sequence[tuple[str, ModelConfig]]:
        """All models: the name that `open` takes, and the configuration."""

    def is_local(self, name: str) -> bool:
        """Whether `open` needs neither network nor conversion."""


_sources: list[Source] = []


def register_source(source: Source) -> None:
    """Let `open_model` ask a source for the names that it owns."""
    _sources.append(source)


def registered_models() -> list[tuple[str, ModelConfig]]:
    """The catalogs of all registered sources."""
    return [model for source in _sources for model in source.catalog()]


def bundled_folders() -> dict[str, Path]:
    """The folders of the models that ship with the package, by name."""
    for root in (_PACKAGE / "checkpoints", _PACKAGE.parent / "checkpoints"):
        folders = sorted(path.parent for path in root.glob(f"*/{CONFIG}"))
        if folders:
            return {folder.name: folder for folder in folders}
    return {}


def open_model(name: str | Path = DEFAULT_MODEL, *, note: Note | None = None) -> ModelFolder:
    """Find a model by a name that `--model` and `Codec.from_pretrained` take.

    The Hub is asked last; HF_HOME and HF_HUB_OFFLINE are honoured. All files of a model from the
    Hub are checked against their hashes; one that is damaged in the cache is fetched once more.

    Args:
        name: a bundled model, of which the newest revision is meant unless the name ends in `@1`,
            `@2` and so on; a folder; `owner/name[@revision]` on the Hugging Face Hub; or a name of
            a registered source, such as `owner/name:model[@revision]` for a model that others
            published, which is converted on first use.
        note: called with a line of text before a step that takes a while.

    Returns:
        The model folder.

    Raises:
        ModelError: unknown name, unreadable folder, bad config.json, no network, damaged files.
    """
    for source in _sources:
        if source.owns(str(name)):
            return source.open(str(name), note=note)
    bundled = bundled_folders()
    if str(name) in bundled:
        return read_folder(bundled[str(name)])
    path = Path(name)
    if str(name) and path.is_dir():
        return read_folder(path)
    if str(name).startswith((".", "/", "~")) or path.is_absolute():
        raise ModelError(f"{name}: no such folder")
    repo, _, revision = str(name).partition("@")
    if repo in bundled:
        return _open_revision(read_folder(bundled[repo]), repo, revision)
    if repo.count("/") == 1:
        return _open_repository(repo, revision or None)
    known = ", ".join(bundled) or "none"
    raise ModelError(
        f"unknown model {str(name)!r} (bundled: {known}; or a folder, or owner/name on the Hub)"
    )


def _open_revision(newest: ModelFolder, name: str, revision: str) -> ModelFolder:
    """A revision of the bundled model `newest`, whose plain name is `name`."""
    if revision == str(newest.config.revision):
        return newest
    known = {str(number): other.model for number, other in newest.revisions.items()}
    if revision not in known:
        listed = ", ".join(sorted({*known, str(newest.config.revision)}))
        raise ModelError(f"{name} has no revision {revision!r} (known: {listed})")
    return open_model(known[revision])


def model_of(header: TokenHeader) -> str | None:
    """The name by which `open_model` finds a model with the token space of a file.

    That is a bundled model, whatever its name; or another revision of the bundled model that the
    file names, from where the bundled one says. None if there is none.

    Raises:
        ModelError: a bundled model cannot be read.
    """
    bundled = {name: _bundled(path) for name, path in bundled_folders().items()}
    own = header.model.partition("@")[0]
    for name in sorted(bundled, key=lambda name: name != own):
        if bundled[name].knows(header.fingerprint):
            return name
    if own in bundled and (revision := bundled[own].revision_of(header.fingerprint)):
        return revision.model
    return None


def name_of_model(label: str) -> str | None:
    """The name by which `open_model` finds the model that token files call `label`.

    None if it is neither bundled nor from a registered source.
    """
    if label in bundled_folders():
        return label
    return next((name for name, config in registered_models() if config.name == label), None)


def is_local(name: str) -> bool:
    """Whether a name from `name_of_model` can be opened without network or conversion."""
    return all(source.is_local(name) for source in _sources if source.owns(name))


def bundled_coder(header: TokenHeader) -> CoderSet | None:
    """The entropy coders of the bundled model with the token space of a file; None if there is
    none."""
    for path in bundled_folders().values():
        with suppress(ModelError):
            model = _bundled(path)
            fits = header.codebook_size == model.config.codebook_size
            if fits and model.knows(header.fingerprint):
                return model.coder
    return None


def _bundled(path: Path) -> ModelFolder:
    """The bundled model in a folder, read once in a process unless its config.json changes.

    Raises:
        ModelError: as `read_folder`.
    """
    try:
        changed = (path / CONFIG).stat().st_mtime_ns
    except OSError:
        return read_folder(path)  # which says why it cannot
    return _read_version(path, changed)


@lru_cache(maxsize=64)
def _read_version(path: Path, changed: int) -> ModelFolder:
    return read_folder(path)


@dataclass(frozen=True)
class Download:
    """Files of a repository on the Hub.

    Attributes:
        folder: where they are, under their names in the repository.
        commit: the commit that they belong to.
        sha256: name -> SHA-256 (hex) that the Hub states, which it does for large files.
    """

    folder: Path
    commit: str
    sha256: dict[str, str] = field(default_factory=dict)


def download(repo: str, *, patterns: list[str], revision: str | None = None) -> Download:
    """Fetch the files of a repository that match a pattern, unless they are in the cache.

    If the Hub cannot be asked, the contents of the cache are used as they are.

    Args:
        repo: owner/name.
        patterns: shell patterns; "*" also matches "/".
        revision: branch, tag or commit; None: the main branch.

    Returns:
        The files.

    Raises:
        ModelError: one line that says why they cannot be had.
    """
    label = f"{repo}@{revision}" if revision else repo
    with _hub_for(f"{label}: cannot be fetched from the Hub"):
        from huggingface_hub import HfApi, constants, snapshot_download
        from huggingface_hub.errors import (
            HFValidationError,
            LocalEntryNotFoundError,
            RevisionNotFoundError,
        )
        from huggingface_hub.utils import disable_progress_bars

        _check_names()
        _check_cache(repo)
        wanted: dict[str, Any] = {"revision": revision, "allow_patterns": patterns}
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        try:
            info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=timeout)
        except (HFValidationError, RevisionNotFoundError):
            raise
        except Exception:  # no network, or no answer that helps
            with suppress(LocalEntryNotFoundError):
                folder = Path(snapshot_download(repo, **wanted, local_files_only=True))
                return Download(folder, folder.name)
            raise
        if _check_listing(label, info.siblings or [], patterns) < SHOWN_BYTES:
            disable_progress_bars()
        folder = Path(snapshot_download(repo, **wanted))
        stated = {file.rfilename: file.lfs.sha256 for file in info.siblings or [] if file.lfs}
        return Download(folder, folder.name, stated)


def push(
    folder: Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
) -> str:
    """Publish a model folder on the Hub: its files and its card, nothing else, in one commit.

    The repository and the branch are created if they do not exist. If the card lacks `library_name`
    or `pipeline_tag`, they are added to what is uploaded; the folder is not changed.

    Args:
        folder: the model folder.
        repo: owner/name.
        private: create a private repository; refused if it exists and is public.
        revision: branch; None: the main branch.
        message: commit message; None: a standard one.

    Returns:
        URL of the commit.

    Raises:
        ModelError: damaged folder, no card or one without a licence, no token, no permission, ...
    """
    model = read_folder(folder)
    model.check()
    if CARD in model.files:
        raise ModelError(f"{folder / CONFIG}: lists {CARD}, which may change without the model")
    card = _complete_card(folder / CARD, model.config.modality)
    if not re.fullmatch("[^/]+/[^/]+", repo):
        raise ModelError(f"{repo!r} is not the name of a repository (owner/name)")
    with _hub_for(f"{folder}: cannot be pushed to {repo}"):
        from huggingface_hub import CommitOperationAdd, HfApi, get_token

        if get_token() is None:
            raise ModelError(f"{folder}: pushing to {repo} needs a token: {LOG_IN}")
        api = HfApi()
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise ModelError(f"{repo}: exists and is public; make it private on the Hub first")
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo, branch=revision, exist_ok=True)
        names = sorted({CONFIG, *model.files})
        operations = [CommitOperationAdd(name, folder / name) for name in names]
        commit = api.create_commit(
            repo,
            [*operations, CommitOperationAdd(CARD, card)],
            commit_message=message or f"Upload {model.config.name}",
            revision=revision,
        )
        return str(commit.commit_url)


def _open_repository(repo: str, revision: str | None) -> ModelFolder:
    """A model from the Hub, with all files checked that config.json lists."""
    found = download(repo, patterns=[CONFIG], revision=revision)
    model = read_or_refetch(repo, found, CONFIG, lambda: read_folder(found.folder))
    if not all((found.folder / name).exists() for name in model.files):
        names = [glob.escape(name) for name in (*model.files, CARD)]
        download(repo, patterns=names, revision=found.commit)
    for name in sorted(model.files):
        read_or_refetch(repo, found, name, partial(model.file, name))
    return model


def read_or_refetch(repo: str, found: Download, name: str, read: Callable[[], _T]) -> _T:
    """The result of `read`; a file `name` that it refuses is fetched once more, then read again.

    Raises:
        ModelError: the file is refused again, or cannot be fetched.
    """
    try:
        return read()
    except ModelError as error:
        damage = error
    with _hub_for(f"{damage}; cannot be fetched again"):
        from huggingface_hub import hf_hub_download

        _check_names()
        hf_hub_download(repo, name, revision=found.commit, force_download=True)
    try:
        return read()
    except ModelError as error:
        raise ModelError(f"{error}, fetched twice from {repo}") from None


def _check_names() -> None:
    """Let the Hub's library refuse what a server calls a file or a commit and is a path.

    It makes paths of both, and does not look at them (seen in versions 0.34 and 2.4).
    """
    from huggingface_hub import file_download

    ask: Any = getattr(file_download, "_get_metadata_or_catch_error", None)
    if ask is None or getattr(ask, "checks_names", False):
        return

    @wraps(ask)
    def asked(*arguments: Any, **options: Any) -> Any:
        found = ask(*arguments, **options)
        _, etag, commit, *_ = found
        for what, name in (("etag", etag), ("commit", commit)):
            if name is not None and not _NAME.fullmatch(name):
                raise ValueError(f"the server's {what} {name[:100]!r} is not a name")
        return found

    asked.checks_names = True  # type: ignore[attr-defined]
    file_download._get_metadata_or_catch_error = asked


def _check_cache(repo: str) -> None:
    """Refuse a cache with pipes and devices in the place of files, which would be waited for."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = os.path.join(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"))
    for parent, _, names in os.walk(cache):
        for name in names:
            path = os.path.join(parent, name)
            if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
                raise ModelError(f"{path}: it is not a regular file")


def _check_listing(label: str, files: list[Any], patterns: list[str]) -> int:
    """Bytes of all files that match a pattern.

    Raises:
        ModelError: too many bytes, or a name that leaves the folder.
    """
    from huggingface_hub.utils import filter_repo_objects

    wanted = list(
        filter_repo_objects(files, allow_patterns=patterns, key=lambda file: file.rfilename)
    )
    for file in wanted:
        path = PurePosixPath(file.rfilename)
        if path.is_absolute() or ".." in path.parts or "\\" in file.rfilename:
            raise ModelError(f"{label}: {file.rfilename!r} is not the name of a file in a folder")
    size = sum(file.size or 0 for file in wanted)
    if size > MAX_DOWNLOAD_BYTES:
        raise ModelError(
            f"{label}: its files have {size / 2**30:.1f} GiB; "
            f"a model has at most {MAX_DOWNLOAD_BYTES / 2**30:.0f}"
        )
    return size


def _complete_card(path: Path, modality: str) -> bytes:
    """The card of a model with the fields that the Hub needs added, and nothing else changed.

    Raises:
        ModelError: no card, or without front matter that names a licence.
    """
    import yaml

    try:
        text = path.read_bytes().decode()
        front = _FRONT_MATTER.match(text)
        facts = yaml.safe_load(front[2]) if front else {}
        if front is None or not (isinstance(facts, dict) and facts.get("license")):
            raise ModelError(f"{path}: names no licence (`license: ...` between two lines of ---)")
        needed = {"library_name": "vpcodec", "pipeline_tag": PIPELINE_TAGS[modality]}
        missing = {name: value for name, value in needed.items() if name not in facts}
        lines = "".join(f"{name}: {value}{front[1]}" for name, value in missing.items())
        if yaml.safe_load(front[2] + lines) != facts | missing:
            raise ModelError(f"{path}: add {lines.strip()!r} to its front matter")
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror} (a published model needs a card)") from None
    except (UnicodeDecodeError, yaml.YAMLError):
        raise ModelError(f"{path}: its front matter is not YAML in UTF-8") from None
    return (text[: front.end()] + lines + text[front.end() :]).encode()


@contextmanager
def _hub_for(failure: str) -> Iterator[None]:
    """Turn errors of the Hub's library into a ModelError, one line that begins with `failure`.

    Only progress is printed, and only on a terminal.
    """
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        logging,
    )

    verbosity = logging.get_verbosity()
    hidden = are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        if not (sys.stderr and sys.stderr.isatty()):
            disable_progress_bars()
        try:
            yield
        except ModelError:
            raise
        except Exception as error:  # its own errors, and those of its HTTP client
            raise ModelError(f"{failure} ({_reason(error)})") from None
        finally:
            if not hidden:
                enable_progress_bars()
            logging.set_verbosity(verbosity)


def _reason(error: BaseException) -> str:
    """Why the Hub's library failed, in one line."""
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return "offline mode is on: HF_HUB_OFFLINE is set"
    if isinstance(error, errors.GatedRepoError):
        return f"gated: ask for access on its page on the Hub, then log in: {LOG_IN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such repository, or a private one that needs a valid token: {LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return "no such branch, tag or commit"
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        return _http_reason(error.response.status_code, error.server_message or "")
    if error.__cause__ is not None:  # the error itself is advice to programmers
        return _reason(error.__cause__)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]


def _http_reason(status: int, said: str) -> str:
    reasons = {
        401: f"no valid token: {LOG_IN}",
        403: f"forbidden: it needs a token with more rights: {LOG_IN}",
        404: "not there",
        429: "too many requests: try again later",
    }
    trouble = "trouble on the Hub: try again later" if status >= 500 else "refused"
    said = " ".join(said.split())[:200]
    return f"HTTP {status}, {reasons.get(status, trouble)}" + (f" ({said})" if said else "")
