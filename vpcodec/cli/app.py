"""The commands, assembled."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand

from .. import published as _published  # noqa: F401  registers itself
from . import (
    convert,
    decode,
    encode,
    export,
    generate,
    info,
    models,
    prune,
    score,
    tables,
    tokenize,
    tokens,
    train,
    web,
)


class Command(TyperCommand):
    """A command whose usage and help show its arguments as they are written, without types."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        for parameter in self.params:
            if parameter.param_type_name == "argument":
                vars(parameter)["display_type"] = lambda ctx: ""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        arguments = [p for p in self.get_params(ctx) if p.param_type_name == "argument"]
        return ["[OPTIONS]", *(str(p.metavar or p.name).upper() for p in arguments)]


app = typer.Typer(
    name="vpcodec",
    help="A neural codec: audio or images to tokens and back.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("encode", cls=Command)(encode.encode)
app.command("decode", cls=Command)(decode.decode)
app.command("info", cls=Command)(info.info)
app.command("tokenize", cls=Command)(tokenize.tokenize)
app.command("tokens", cls=Command)(tokens.tokens)
app.command("score", cls=Command)(score.score)
app.command("train", cls=Command)(train.train)
app.command("export", cls=Command)(export.export)
app.command("generate", cls=Command)(generate.generate)
app.command("web", cls=Command)(web.web)

models_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
models_app.callback()(models.models)
models_app.command("push", cls=Command)(models.push)
models_app.command("convert", cls=Command)(convert.convert)
models_app.command("tables", cls=Command)(tables.tables)
models_app.command("prune", cls=Command)(prune.prune)
app.add_typer(models_app, name="models")


def _version(value: bool) -> None:
    if value:
        from .. import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False,
        "--version",
        "-V",
        callback=_version,
        is_eager=True,
        help="Show the version and exit.",
    ),
) -> None:
    pass
