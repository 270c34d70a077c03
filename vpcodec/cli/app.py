"""The commands, assembled."""

from __future__ import annotations

import typer

from .. import published as _published  # noqa: F401  registers itself
from . import convert, decode, encode, export, info, models, prune, score, tables, train

app = typer.Typer(
    name="vpcodec",
    help="A neural codec: audio or images to tokens and back.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("encode")(encode.encode)
app.command("decode")(decode.decode)
app.command("info")(info.info)
app.command("score")(score.score)
app.command("train")(train.train)
app.command("export")(export.export)

models_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
models_app.callback()(models.models)
models_app.command("push")(models.push)
models_app.command("convert")(convert.convert)
models_app.command("tables")(tables.tables)
models_app.command("prune")(prune.prune)
app.add_typer(models_app, name="models")


def _version(value: bool) -> None:
    if value:
        from .. import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    pass
