"""What every verb prints to and writes."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

console = Console(markup=False)  # paths and patterns may hold brackets
stderr = Console(stderr=True)

JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="PATH", help="Also write the result here as JSON.")
]


def write_json_to(path: Path | None, value: Any) -> None:
    """A verb's result as JSON, if it was asked for."""
    if path is None:
        return
    if path.exists() and not path.is_file():  # a pipe or device cannot be renamed over
        path.write_text(json.dumps(value) + "\n", encoding="utf-8")
        return
    from .checkpoint import write_json

    write_json(path, value)
