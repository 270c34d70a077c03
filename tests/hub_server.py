"""A Hugging Face Hub in miniature: repositories in memory, behind the HTTP API of the real one.

It answers what huggingface_hub asks to look at, fetch, make and fill the repository of a model,
without Xet. It refuses as the real one does, and on request breaks down.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_right"  # of the user "owner"
LFS_SUFFIXES = (".safetensors", ".onnx", ".pt")


@dataclass
class Repository:
    """Commits are sets of files; branches and tags point to them."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], ref: str = "main", message: str = "") -> str:
        """Add or replace files; the hash of the new commit."""
        files = self.commits.get(self.refs.get(ref, ""), {}) | files
        sums = sorted((name, hashlib.sha1(data).hexdigest()) for name, data in files.items())
        commit = hashlib.sha1(repr((len(self.commits), sums)).encode()).hexdigest()
        self.commits[commit], self.refs[ref] = files, commit
        self.messages.append(message)
        return commit

    @property
    def files(self) -> dict[str, bytes]:
        """Those of the main branch."""
        return self.commits[self.refs["main"]]


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class Fault:
    """What goes wrong with requests whose path has `part`, `times` times."""

    part: str
    times: float
    status: int = 0  # answer with an error
    code: str = ""
    words: str = ""
    cut: int | None = None  # close the connection after so many bytes
    flip: bool = False  # change the first byte


class Hub:
    """The server; use as a context manager.

    Attributes:
        repositories: by owner/name.
        requests: all that came in.
        listed_sizes: what the Hub says of the size of files, where that is not the truth.
        etag: what the Hub says of every file, where that is not its hash.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.listed_sizes: dict[str, int] = {}
        self.etag: str | None = None
        self.lfs: dict[str, bytes] = {}
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Hub:
        serve = {"poll_interval": 0.01}
        threading.Thread(target=self._server.serve_forever, kwargs=serve, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Nobody answers any more; may be called twice."""
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo: str, files: dict[str, bytes] | Path, **how: str) -> str:
        """Commit files, or those of a folder, to a repository that may be new; the hash."""
        if isinstance(files, Path):
            files = {path.name: path.read_bytes() for path in files.iterdir()}
        return self.repositories.setdefault(repo, Repository()).commit(files, **how)

    def break_down(self, part: str, times: float = float("inf"), **fault: object) -> None:
        """Requests whose path has `part` go wrong as `Fault` says."""
        self._faults.append(Fault(part, times, **fault))

    def repair(self) -> None:
        """Nothing goes wrong any more."""
        self._faults.clear()

    def fault(self, path: str, *, of_data: bool) -> Fault | None:
        """What goes wrong with a request now."""
        with self._lock:
            for fault in self._faults:
                concerns_data = fault.cut is not None or fault.flip
                if fault.part in path and fault.times > 0 and concerns_data == of_data:
                    fault.times -= 1
                    return fault
        return None

    def fetched(self, name: str) -> list[str | None]:
        """The Range of every request for the contents of files whose path ends with `name`."""
        return [
            request.range
            for request in self.requests
            if request.method == "GET" and "/resolve/" in request.path
            if request.path.endswith(name)
        ]

    def settings(self, home: Path, *, token: str | None = TOKEN, offline: bool = False) -> dict:
        """The environment of a process that asks this Hub and keeps what it gets in `home`."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING")) and not name.lower().endswith("_proxy")
        }
        settings = {
            "HF_HOME": str(home),
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "1" if offline else "0",
        }
        return kept | settings | ({"HF_TOKEN": token} if token else {})

    def use(self, monkeypatch: pytest.MonkeyPatch, home: Path, token: str | None = TOKEN) -> None:
        """huggingface_hub in this process asks this Hub and keeps what it gets in `home`."""
        from huggingface_hub import close_session, constants

        values = {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
        }
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value)
        for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
            monkeypatch.delenv(name)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        close_session()  # a client keeps proxies and connections


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", words: str = "") -> None:
        self.status, self.code, self.words = status, code, words


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        body = self._read_body()
        path = urlsplit(self.path).path
        bearer = self.headers.get("Authorization")
        token = bearer.removeprefix("Bearer ") if bearer else None
        self.hub.requests.append(Request(self.command, path, self.headers.get("Range"), token))
        try:
            if fault := self.hub.fault(path, of_data=False):
                raise _Refused(fault.status, fault.code, fault.words)
            if token not in (None, TOKEN):
                raise _Refused(401, words="Invalid credentials in Authorization header")
            for method, pattern, answer in _ROUTES:
                if self.command in method and (match := re.fullmatch(pattern, path)):
                    facts = {name: unquote(text) for name, text in match.groupdict("").items()}
                    return answer(self, body=body, token=token, **facts)
            raise _Refused(404)
        except _Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.words}
            self._answer({"error": refused.words or "no"}, refused.status, headers)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(
        self, content: object, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _repository(self, repo: str, token: str | None) -> Repository:
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and token is None):
            raise _Refused(404 if token else 401, "RepoNotFound", "Repository not found")
        return found

    def _at(self, repo: str, revision: str, token: str | None) -> tuple[str, dict[str, bytes]]:
        """Commit and files of a branch, a tag or a commit."""
        found = self._repository(repo, token)
        commit = found.refs.get(revision or "main", revision)
        if commit not in found.commits:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, found.commits[commit]

    def _may_write(self, repo: str, token: str | None) -> None:
        if token is None:
            raise _Refused(401, words="Invalid username or password.")
        if not repo.startswith("owner/"):
            raise _Refused(403, words=f"You don't have the rights to write to {repo}")

    # ------------------------------------------------------------------------------------- reading

    def model(self, *, body: bytes, token: str | None, repo: str, revision: str = "") -> None:
        commit, files = self._at(repo, revision, token)
        siblings = []
        for entry in self._listing(files):
            siblings.append(
                {"rfilename": entry["path"], "size": entry["size"], "blobId": entry["oid"]}
            )
            if "lfs" in entry:
                siblings[-1]["lfs"] = entry["lfs"] | {"sha256": entry["lfs"]["oid"]}
        private = self.hub.repositories[repo].private
        self._answer({"id": repo, "sha": commit, "private": private, "siblings": siblings})

    def tree(self, *, body: bytes, token: str | None, repo: str, revision: str) -> None:
        self._answer(self._listing(self._at(repo, revision, token)[1]))

    def _listing(self, files: dict[str, bytes]) -> list[dict]:
        listing = []
        for name, data in files.items():
            size = self.hub.listed_sizes.get(name, len(data))
            listing.append({"type": "file", "path": name, "size": size, "oid": _git_hash(data)})
            if _is_lfs(name):
                digest = hashlib.sha256(data).hexdigest()
                listing[-1]["lfs"] = {"oid": digest, "size": size, "pointerSize": 134}
        return listing

    def resolve(
        self, *, body: bytes, token: str | None, repo: str, revision: str, name: str
    ) -> None:
        commit, files = self._at(repo, revision, token)
        if name not in files:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        data = files[name]
        etag = hashlib.sha256(data).hexdigest() if _is_lfs(name) else _git_hash(data)
        if self.hub.etag is not None:
            etag = self.hub.etag
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        status, start = 200, 0
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            status = 206
        fault = None if self.command == "HEAD" else self.hub.fault(self.path, of_data=True)
        if fault and fault.flip:
            data = bytes([data[0] ^ 1]) + data[1:]
        if fault and fault.cut is not None:
            self._answer(data[: fault.cut], 200, headers | {"Content-Length": str(len(data))})
            self.close_connection = True
        else:
            self._answer(data[start:], status, headers)

    # ------------------------------------------------------------------------------------- writing

    def create(self, *, body: bytes, token: str | None) -> None:
        wanted = json.loads(body)
        repo = f"{wanted['organization']}/{wanted['name']}"
        self._may_write(repo, token)
        url = {"url": f"{self.hub.url}/{repo}"}
        if repo in self.hub.repositories:
            return self._answer({"error": "You already created this model repo"} | url, 409)
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.hub.repositories[repo] = Repository(private)
        self.hub.repositories[repo].commit({".gitattributes": b""}, message="initial commit")
        self._answer(url)

    def branch(self, *, body: bytes, token: str | None, repo: str, revision: str) -> None:
        self._may_write(repo, token)
        found = self._repository(repo, token)
        if revision in found.refs:
            raise _Refused(409, words=f"Reference already exists: {revision}")
        found.refs[revision] = found.refs["main"]
        self._answer({})

    def validate(self, *, body: bytes, token: str | None) -> None:
        self._answer({"errors": [], "warnings": []})

    def preupload(self, *, body: bytes, token: str | None, repo: str, revision: str) -> None:
        self._may_write(repo, token)
        files = self._at(repo, revision, token)[1]
        modes = []
        for file in json.loads(body)["files"]:
            name, data = file["path"], files.get(file["path"])
            mode = "lfs" if _is_lfs(name) else "regular"
            oid = None
            if data is not None:
                oid = hashlib.sha256(data).hexdigest() if mode == "lfs" else _git_hash(data)
            modes.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._answer({"files": modes})

    def lfs_batch(self, *, body: bytes, token: str | None, repo: str) -> None:
        self._may_write(repo, token)
        objects = []
        for file in json.loads(body)["objects"]:
            if file["oid"] not in self.hub.lfs:
                href = f"{self.hub.url}/lfs/{file['oid']}"
                file = file | {"actions": {"upload": {"href": href}}}
            objects.append(file)
        self._answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, *, body: bytes, token: str | None, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400, words="hash does not match")
        self.hub.lfs[oid] = body
        self._answer({})

    def commit(self, *, body: bytes, token: str | None, repo: str, revision: str) -> None:
        self._may_write(repo, token)
        self._at(repo, revision, token)
        header, *operations = [json.loads(line) for line in body.splitlines()]
        files = {}
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        found = self.hub.repositories[repo]
        commit = found.commit(files, revision, header["value"]["summary"])
        url = f"{self.hub.url}/{repo}/commit/{commit}"
        self._answer({"success": True, "commitUrl": url, "commitOid": commit})


_REPO = "(?P<repo>[^/]+/[^/]+)"
_REVISION = "(?P<revision>[^/]+)"
_ROUTES = [
    ("GET", f"/api/models/{_REPO}(/revision/{_REVISION})?", _Handler.model),
    ("GET", f"/api/models/{_REPO}/tree/{_REVISION}", _Handler.tree),
    ("GET HEAD", f"/{_REPO}/resolve/{_REVISION}/(?P<name>.+)", _Handler.resolve),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", f"/api/models/{_REPO}/branch/{_REVISION}", _Handler.branch),
    ("POST", f"/api/models/{_REPO}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", f"/{_REPO}\\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]+)", _Handler.lfs_upload),
    ("POST", f"/api/models/{_REPO}/commit/{_REVISION}", _Handler.commit),
]


def _is_lfs(name: str) -> bool:
    return name.endswith(LFS_SUFFIXES)


def _git_hash(data: bytes) -> str:
    """What git calls a file of these contents."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
