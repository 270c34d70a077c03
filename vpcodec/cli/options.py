"""Options that several commands share."""

from __future__ import annotations

import typer

from ..hub import DEFAULT_MODELS

OUTPUT = typer.Option(None, "--output", "-o", metavar="PATH", help="Output: a file, a folder or -.")
MODEL = typer.Option(
    None,
    "--model",
    "-m",
    metavar="MODEL",
    help="Bundled name, folder, owner/name[@revision] on the Hub, or owner/name:model from "
    "`vpcodec models`; default: "
    + ", ".join(f"{name} for {modality}" for modality, name in DEFAULT_MODELS.items())
    + ".",
)
BACKEND = typer.Option("onnx", metavar="NAME", help="Runtime: onnx or torch.")
DEVICE = typer.Option("auto", metavar="NAME", help="cpu, cuda or auto.")
THREADS = typer.Option(
    None,
    min=1,
    metavar="N",
    help="CPU threads per file; default: 1 with a pipe or -j, else the allowed cores, at most 4.",
)
JOBS = typer.Option(1, "--jobs", "-j", min=1, metavar="N", help="Files processed in parallel.")
FORCE = typer.Option(False, "--force", "-f", help="Replace existing outputs.")
FAIL_FAST = typer.Option(
    False, "--fail-fast/--keep-going", help="Stop at the first failure, or process the other files."
)
TRUNCATED = typer.Option(
    "refuse", metavar="refuse|keep", help="Audio that ends early: refuse it, or keep what is there."
)
JSON = typer.Option(False, "--json", help="Print the results as JSON.")
