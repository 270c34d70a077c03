"""The page of web/ in a headless Chromium, and `vpcodec web`, which serves it."""

from __future__ import annotations

import base64
import http.client
import json
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, find_browser
from helpers import ENOUGH, MODULE, flipped, refuse, run
from paths import RESOURCES, ROOT
from sounds import sound

from vpcodec import Codec, read_tokens
from vpcodec.cli.server import HOST, Server, site
from vpcodec.hub import bundled_folders
from vpcodec.media.audio import load, save
from vpcodec.media.image import load_image, save_image

pytestmark = pytest.mark.slow

READY = "document.documentElement.dataset.ready === 'true'"
DONE = "document.querySelector('#work').hidden && !document.querySelector('#result').hidden"
FAILED = "!document.querySelector('#problem').hidden"
MICROPHONE = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")


def serve() -> tuple[Server, str]:
    server = Server((HOST, 0), site())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://{HOST}:{server.server_port}/"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server, address = serve()
    with server:
        yield address
        server.shutdown()


@pytest.fixture(scope="module")
def open_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if find_browser() is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with Browser(tmp_path_factory.mktemp("browser"), *MICROPHONE) as browser:
        yield browser


@pytest.fixture
def page(open_browser: Browser, address: str) -> Browser:
    """The page, just opened."""
    open_browser.open(address)
    open_browser.wait_for(READY)
    return open_browser


@pytest.fixture
def clip(tmp_path: Path, speech: np.ndarray) -> Path:
    """3 s of speech at the rate of the models, so that no resampler changes it."""
    save(tmp_path / "clip.wav", speech[:, :48_000], 16_000)
    return tmp_path / "clip.wav"


def text(page: Browser, selector: str) -> str:
    return page.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")


def download(page: Browser, selector: str, folder: Path) -> Path:
    """The file that a click on a link downloads."""
    target = folder / "downloads"
    target.mkdir(exist_ok=True)
    page.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(target))
    page.wait_for(f"document.querySelector('{selector}').href.startsWith('blob:')")
    name = page.evaluate(f"document.querySelector('{selector}').download")
    page.evaluate(f"document.querySelector('{selector}').click()")
    end = time.monotonic() + ENOUGH
    while not (target / name).exists() and time.monotonic() < end:
        time.sleep(0.1)
    return target / name


def drop(page: Browser, name: str, data: bytes) -> None:
    """Drop a file on the page."""
    content = base64.b64encode(data).decode()
    page.evaluate(f"""(() => {{
        const bytes = Uint8Array.from(atob('{content}'), (c) => c.charCodeAt(0));
        const dataTransfer = new DataTransfer();
        dataTransfer.items.add(new File([bytes], {json.dumps(name)}));
        const facts = {{bubbles: true, cancelable: true, dataTransfer}};
        document.querySelector('#drop').dispatchEvent(new DragEvent('drop', facts));
    }})()""")


def finish(page: Browser, expected: str = DONE) -> None:
    """Wait for a result, or for a problem where one is expected; nothing else was asked for."""
    page.wait_for(f"({DONE}) || ({FAILED})")
    assert page.evaluate(expected), text(page, "#problem")
    assert page.complaints == []


def test_a_recording_is_encoded_heard_and_downloaded(page, address, clip, tmp_path):
    page.choose_files("#file", clip)
    finish(page)
    assert all(request.startswith((address, f"blob:{address}")) for request in page.requests)
    assert "times smaller" in text(page, "#summary")
    assert "bit/s" in text(page, "#figures") and "speech-3k" in text(page, "#figures")

    position = "Number(document.querySelector('#seek').value)"
    page.evaluate("document.querySelector('#play').click()")
    page.wait_for(f"{position} > 0.2")
    version = "document.querySelector('[name=version]:checked').value"
    assert page.evaluate(version) == "decoded"
    before = page.evaluate(position)
    page.press("x")
    assert page.evaluate(version) == "original"
    assert page.evaluate(position) >= before  # at the same place, and going on
    page.evaluate("document.querySelector('#play').click()")
    assert page.evaluate("document.querySelector('#play').getAttribute('aria-label')") == "Play"
    page.evaluate("document.querySelector('#seek').focus()")
    place = page.evaluate(position)
    page.press("ArrowLeft")
    assert page.evaluate(position) < place

    downloaded = download(page, "#download-tok", tmp_path)
    assert downloaded.name == "clip.tok"
    run("encode", clip, tmp_path / "command.tok")
    assert downloaded.read_bytes() == (tmp_path / "command.tok").read_bytes()
    run("decode", downloaded, tmp_path / "command.wav")
    decoded = download(page, "#download-decoded", tmp_path)
    (heard, rate), (expected, _) = load(decoded), load(tmp_path / "command.wav")
    assert rate == 16_000 and heard.shape == expected.shape
    assert np.abs(heard - expected).max() < 2e-4


def test_another_model_encodes_it_again(page, clip, tmp_path):
    page.choose_files("#file", clip)
    finish(page)
    page.evaluate("document.querySelector('[value=speech-1k]').click()")
    page.wait_for(f"({DONE}) && document.querySelector('#figures').innerText.includes('speech-1k')")
    tokens, header = read_tokens(download(page, "#download-tok", tmp_path))
    assert header.model == "speech-1k"
    assert np.array_equal(tokens, Codec.from_pretrained("speech-1k", threads=1).encode(*load(clip)))


def test_a_compressed_recording_keeps_its_rate_length_and_channels(page, tmp_path):
    drop(page, "a.flac", sound("FLAC", 36_000, channels=2, rate=24_000))
    finish(page)
    _, header = read_tokens(download(page, "#download-tok", tmp_path))
    assert (header.channels, header.original_rate, header.n_samples) == (2, 24_000, 36_000)


def test_a_picture_is_encoded_and_compared(page, picture, tmp_path):
    pixels = picture(70, 100)
    save_image(tmp_path / "a.png", pixels)
    page.choose_files("#file", tmp_path / "a.png")
    finish(page)
    run("encode", tmp_path / "a.png", tmp_path / "command.tok")
    downloaded = download(page, "#download-tok", tmp_path)
    assert downloaded.read_bytes() == (tmp_path / "command.tok").read_bytes()
    run("decode", downloaded, tmp_path / "command.png")
    found = load_image(download(page, "#download-decoded", tmp_path))
    expected = load_image(tmp_path / "command.png")
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= 1
    page.evaluate("document.querySelector('#divide').focus()")
    shown = "getComputedStyle(document.querySelector('#compare')).getPropertyValue('--at')"
    before = float(page.evaluate(shown).rstrip("%"))
    page.press("ArrowRight")
    assert float(page.evaluate(shown).rstrip("%")) > before


@pytest.mark.parametrize("name", ["speech-3k-1", "image-fsp-1"])
def test_token_files_of_any_age_are_heard_or_seen(page, name, tmp_path):
    file = RESOURCES / "golden" / f"{name}.tok"
    drop(page, file.name, file.read_bytes())
    finish(page)
    audio = name.startswith("speech")
    found = download(page, "#download-decoded", tmp_path)
    expected = tmp_path / found.name
    run("decode", file, expected)
    if audio:
        (heard, rate), (same, same_rate) = load(found), load(expected)
        assert rate == same_rate and heard.shape == same.shape
        assert 10 * np.log10((same**2).sum() / ((heard - same) ** 2).sum()) > 35  # two resamplers
        assert page.evaluate("document.querySelector('#versions').hidden")
    else:
        difference = load_image(found).astype(int) - load_image(expected)
        assert np.abs(difference).max() <= 1


def test_what_cannot_be_read_is_said(page):
    file = (RESOURCES / "golden" / "speech-3k-3.tok").read_bytes()
    drop(page, "damaged.tok", flipped(file, 500))
    finish(page, FAILED)
    assert text(page, "#problem") == (
        "damaged.tok: block 0: the checksum is wrong. vpcodec decode --recover saves the rest."
    )
    drop(page, "stranger.tok", (RESOURCES / "tok" / "mono.tok").read_bytes())
    page.wait_for("document.querySelector('#problem').innerText.startsWith('stranger')")
    assert "made by the model 'speech-3k', which is not among those here" in text(page, "#problem")
    drop(page, "notes.txt", b"nothing to hear")
    page.wait_for("document.querySelector('#problem').innerText.startsWith('notes.txt: neither')")
    assert page.evaluate("document.querySelector('#result').hidden")
    assert page.complaints == []


def test_the_microphone_records(page, tmp_path):
    page.evaluate("document.querySelector('#record').click()")
    page.wait_for("document.querySelector('#record').innerText.includes('0:01')")
    assert page.evaluate("document.querySelector('#record').getAttribute('aria-pressed')") == "true"
    page.evaluate("document.querySelector('#record').click()")
    finish(page)
    _, header = read_tokens(download(page, "#download-tok", tmp_path))
    assert header.n_samples >= header.original_rate
    assert text(page, "#result-title") == "Recording"


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_and_everything_has_a_name(open_browser, address, clip, dark):
    page = open_browser
    page.open(address, 360, 800, dark=dark)
    page.wait_for(READY)
    page.choose_files("#file", clip)
    finish(page)
    assert page.evaluate("innerWidth") == 360
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper))) < 150) == dark
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    roles: dict[str, list[str]] = {}
    for node in nodes:
        role = node.get("role", {}).get("value", "")
        if not node["ignored"]:
            roles.setdefault(role, []).append(node.get("name", {}).get("value", ""))
    assert {"button", "radio", "slider", "link", "image", "main", "heading"} <= set(roles)
    for role in ("button", "radio", "slider", "link", "image"):
        assert all(roles[role]), (role, roles[role])
    # Everything that can be used is reached with the Tab key.
    page.evaluate("document.querySelector('#choose').focus()")
    reached = []
    for _ in range(12):
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.name"))
        page.press("Tab")
    wanted = ["choose", "record", "audio", "image", "play", "version", "seek", "download-tok"]
    assert [name for name in reached if name in wanted][: len(wanted)] == wanted


def test_it_works_offline_after_the_first_load(tmp_path, clip):
    if find_browser() is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    server, address = serve()
    with Browser(tmp_path / "profile") as page:
        with server:
            page.open(address)
            page.wait_for(READY)
            kept = "caches.open('vpcodec-1').then((c) => c.keys()).then((k) => k.map((r) => r.url))"
            weights = json.dumps(f"{address}models/speech-3k/model.safetensors")
            page.wait_for(f"{kept}.then((urls) => urls.includes({weights}))")
            server.shutdown()
        page.open(address)
        page.wait_for(READY)
        page.choose_files("#file", clip)
        page.wait_for(f"({DONE}) || ({FAILED})")
        assert page.evaluate(DONE), text(page, "#problem")
        Codec.from_pretrained("speech-3k", threads=1).encode_file(clip, tmp_path / "a.tok")
        downloaded = download(page, "#download-tok", tmp_path)
        assert downloaded.read_bytes() == (tmp_path / "a.tok").read_bytes()


# ---- the command


def get(port: int, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(HOST, port, timeout=ENOUGH)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()


def test_the_command_serves_until_ctrl_c_and_ends_in_silence():
    process = subprocess.Popen(
        [*MODULE, "web", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background lets them ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        line = process.stdout.readline()
        port = int(re.fullmatch(rf"http://{HOST}:(\d+)/  \(Ctrl-C ends\)\n", line).group(1))
        assert get(port, "/")[2] == (ROOT / "web" / "index.html").read_bytes()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=ENOUGH)
        assert (process.returncode, out, err) == (130, "", "")
    finally:
        process.kill()


def test_a_port_in_use_is_one_line(address):
    port = address.rstrip("/").rpartition(":")[2]
    assert refuse("web", "--port", port) == f"vpcodec: port {port}: Address already in use"


def test_the_server_gives_the_page_and_the_models_and_nothing_else(address):
    port = int(address.rstrip("/").rpartition(":")[2])
    types = {
        "/": "text/html; charset=utf-8",
        "/app.js": "text/javascript; charset=utf-8",
        "/vendor/ort.wasm.min.mjs": "text/javascript; charset=utf-8",
        "/vendor/ort-wasm-simd-threaded.wasm": "application/wasm",
        "/models.json": "application/json",
        "/models/speech-3k/encoder.onnx": "application/octet-stream",
    }
    for path, expected in types.items():
        status, headers, body = get(port, path)
        assert (status, headers["content-type"]) == (200, expected)
        assert int(headers["content-length"]) == len(body)
        assert headers["cross-origin-opener-policy"] == "same-origin"
        assert headers["cross-origin-embedder-policy"] == "require-corp"
    for name, folder in bundled_folders().items():
        config = json.loads((folder / "config.json").read_text())
        for file in config["files"]:
            assert f"/models/{name}/{file}" in site()
    for path in (
        *("/models", "/models/", "/vendor/", "/../pyproject.toml", "/%2e%2e/pyproject.toml"),
        *("/..%2fpyproject.toml", "//etc/passwd", "/models/../../README.md", "/nothing"),
    ):
        assert get(port, path)[0] == 404


def test_an_unchanged_file_is_not_sent_again(address):
    port = int(address.rstrip("/").rpartition(":")[2])
    _, headers, _ = get(port, "/app.js")
    again: dict[str, Any] = {"If-Modified-Since": headers["last-modified"]}
    assert get(port, "/app.js", **again)[0::2] == (304, b"")
    assert get(port, "/app.js", **{"If-Modified-Since": "yesterday"})[0] == 200
