"""The server of `vpcodec web`: the page and the bundled models, on this computer only."""

from __future__ import annotations

import shutil
import sys
from email.utils import formatdate, parsedate_to_datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ..hub import bundled_folders
from .errors import UsageError

HOST = "127.0.0.1"
TYPES = {  # not those of the system, which may lack or change them
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".wasm": "application/wasm",
    ".webmanifest": "application/manifest+json",
}
HEADERS = {
    "Cache-Control": "no-cache",
    "Cross-Origin-Embedder-Policy": "require-corp",  # both: threads of WebAssembly are allowed
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def site() -> dict[str, Path]:
    """The files that are served, by their addresses: the page, and the bundled models below
    /models/.

    Raises:
        UsageError: the page is not installed.
    """
    package = Path(__file__).resolve().parents[1]
    roots = (package / "web", package.parent / "web")
    root = next((root for root in roots if (root / "index.html").is_file()), None)
    if root is None:
        raise UsageError("the page is not installed")
    folders = {"": root} | {f"models/{name}/": path for name, path in bundled_folders().items()}
    files = {
        f"/{prefix}{path.relative_to(folder).as_posix()}": path
        for prefix, folder in folders.items()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }
    return files | {"/": files["/index.html"]}


class Server(ThreadingHTTPServer):
    """Serves these files and nothing else.

    Args:
        address: host and port.
        files: by their addresses.
    """

    daemon_threads = True

    def __init__(self, address: tuple[str, int], files: dict[str, Path]) -> None:
        self.files = files
        super().__init__(address, Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep quiet about browsers that go away; other errors are printed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        path = self._begin()
        if path is not None:
            with open(path, "rb") as file:
                shutil.copyfileobj(file, self.wfile)

    def do_HEAD(self) -> None:
        self._begin()

    def _begin(self) -> Path | None:
        """Send the head of the answer; return the file that is to follow."""
        path = self.server.files.get(unquote(urlsplit(self.path).path))
        if path is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return None
        facts = path.stat()
        unchanged = self._has(int(facts.st_mtime))
        self.send_response(HTTPStatus.NOT_MODIFIED if unchanged else HTTPStatus.OK)
        self.send_header("Last-Modified", formatdate(facts.st_mtime, usegmt=True))
        if not unchanged:
            self.send_header("Content-Type", TYPES.get(path.suffix, "application/octet-stream"))
            self.send_header("Content-Length", str(facts.st_size))
        self.end_headers()
        return None if unchanged else path

    def _has(self, changed: int) -> bool:
        """Whether the browser has a file that was changed at this time, in seconds."""
        try:
            return parsedate_to_datetime(self.headers["If-Modified-Since"]).timestamp() >= changed
        except (KeyError, TypeError, ValueError):
            return False

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def version_string(self) -> str:
        return "vpcodec"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Keep quiet."""
