"""Options that several commands share."""

from __future__ import annotations

import typer

from ..hub import DEFAULT_MODELS

OUTPUT = typer.Option(None, "--output", "-o", help="Result: a file, a folder or -.")
MODEL = typer.Option(
    None,
    "--model",
    "-m",
    help="Model: bundled name, folder, owner/name[@revision], or owner/name:model as of "
    "`vpcodec models`; default: "
    + ", ".join(f"{name} for {kind}" for kind, name in DEFAULT_MODELS.items())
    + ".",
)
BACKEND = typer.Option("onnx", help="What runs the model: onnx or torch.")
DEVICE = typer.Option("auto", help="cpu, cuda or auto.")
THREADS = typer.Option(None, min=1, help="CPU threads per file; default: the backend's choice.")
JOBS = typer.Option(1, "--jobs", "-j", min=1, help="Files at the same time.")
FORCE = typer.Option(False, "--force", "-f", help="Replace existing results.")
FAIL_FAST = typer.Option(
    False, "--fail-fast/--keep-going", help="Stop at the first file that fails."
)
TRUNCATED = typer.Option("refuse", help="Audio that ends early: refuse it, or keep what is there.")
JSON = typer.Option(False, "--json", help="Print a JSON document of the results.")
