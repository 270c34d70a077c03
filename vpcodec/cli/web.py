"""vpcodec web: the page that encodes and decodes in the browser, from this computer."""

from __future__ import annotations

import typer


def web(
    port: int = typer.Option(
        8765, "--port", "-p", min=0, max=65535, help="Port; 0 chooses a free one."
    ),
) -> None:
    """Serve the page that encodes and decodes in the browser, on this computer only.

    It prints its address, and Ctrl-C ends it.
    """
    from .server import HOST, Server, site

    files = site()
    try:
        server = Server((HOST, port), files)
    except OSError as error:
        error.filename = f"port {port}"
        raise
    with server:
        print(f"http://{HOST}:{server.server_port}/  (Ctrl-C ends)", flush=True)
        server.serve_forever()
