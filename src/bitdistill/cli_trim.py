"""The verb that trims a student's vocabulary."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_output import JsonFile, Overrides, console, load, write_json_to
from .errors import ConfigError


def add_verbs(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(trim)


def trim(
    student: Annotated[
        str, typer.Argument(metavar="STUDENT", help="Checkpoint folder or hub id of a decoder.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the new checkpoint.")],
    recipe: Annotated[
        Path | None,
        typer.Option(help="Recipe of the task: its training data choose the tokens, its test split judges."),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="File or folder of .txt, .jsonl or .parquet whose tokens stay too; repeatable."),
    ] = None,
    held_out: Annotated[
        str | None, typer.Option("--held-out", help="The same, to judge on: a line or a row is a text.")
    ] = None,
    text_column: Annotated[
        str | None,
        typer.Option("--text-column", help="Column of the text in .jsonl and .parquet; text by default."),
    ] = None,
    size: Annotated[
        int, typer.Option(help="Fill up to so many rows: with --fill, then with the lowest merges.")
    ] = 0,
    fill: Annotated[
        str | None,
        typer.Option(help="General text like --text, whose most frequent tokens fill up to --size."),
    ] = None,
    skip_models: Annotated[
        bool, typer.Option("--skip-models", help="Judge the tokens alone; run neither model.")
    ] = False,
    set_: Overrides = None,
    json_path: JsonFile = None,
) -> None:
    """Keep only the tokens that a task needs: smaller embedding and head, same answers; then export as ever."""
    if set_ and recipe is None:
        raise ConfigError("--set changes a recipe; give it with --recipe")
    if text_column is not None and not (text or held_out or fill):
        raise ConfigError("--text-column is of the files of --text, --fill and --held-out; give it with them")
    if skip_models and not (recipe or held_out):
        raise ConfigError(
            "--skip-models: there is nothing to judge on; leave it out, or give --recipe or --held-out"
        )
    from . import before_after
    from . import trim as trimming
    from .checkpoint import read_run
    from .config import CorpusConfig
    from .processes import is_main_process

    task = load(recipe, set_) if recipe else None

    def corpus(source: str) -> CorpusConfig:
        return CorpusConfig(source=source, text_column=text_column or "text")

    finished = trimming.run(
        student,
        output,
        recipe=task,
        texts=[corpus(source) for source in text or ()],
        size=size,
        fill=corpus(fill) if fill else None,
    )
    if not is_main_process():
        return
    result: dict[str, Any] = {"output": str(finished), **read_run(finished)["metrics"]}
    _print(
        f"{finished}: {result['rows_before']:,} -> {result['rows']:,} rows, {result['parameters_before']:,} -> "
        f"{result['parameters']:,} parameters, {result['bytes_before']:,} -> {result['bytes']:,} bytes"
    )
    judged = corpus(held_out) if held_out else None
    compared = before_after.compare(student, finished, recipe=task, held_out=judged, models=not skip_models)
    for name, found in compared.items():
        _print(_line("test split" if name == "task" else "held-out texts", found))
    write_json_to(json_path, result | compared)


def _print(line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True)


def _line(name: str, found: dict[str, Any]) -> str:
    line = (
        f"{name}: {100 * found['same_tokens']:.2f} % of {found['examples']:,} come out as the same tokens, "
        f"{found['tokens_before']:.2f} -> {found['tokens']:.2f} tokens each"
    )
    if "metric" in found:
        metric = found["metric"].replace("_", " ")
        line += (
            f", {metric} {found['metric_before']:.4f} -> {found['metric_after']:.4f} "
            f"({found['outcomes_that_differ']} outcomes differ)"
        )
    if "bits_per_byte" in found:
        line += f", {found['bits_per_byte_before']:.4f} -> {found['bits_per_byte']:.4f} bits per byte"
    return line
