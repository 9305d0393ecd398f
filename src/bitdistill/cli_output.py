"""What every verb reads, prints to and writes."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

if TYPE_CHECKING:
    from .config import Recipe

console = Console(markup=False)  # paths and patterns may hold brackets
stderr = Console(stderr=True)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="TOML recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a value of the recipe; repeatable."),
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="PATH", help="Also write the result here as JSON.")
]
KvCache = Annotated[
    Literal["auto", "fp16", "int8", "int4", "int3", "fp32"],
    typer.Option("--kv-cache", help="How the engine keeps keys and values; auto: as the model was trained."),
]
QueryBits = Annotated[
    int | None, typer.Option("--query-bits", help="Quantise queries, in torch: 8 or 4 bits, or 16 for not.")
]
KvBits = Annotated[
    int | None,
    typer.Option("--kv-bits", help="Quantise keys and values, in torch: 8, 4 or 3 bits, or 16 for not."),
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


def load(path: Path, overrides: list[str] | None, values: dict[str, Any] | None = None) -> "Recipe":
    """The recipe of a verb, with what its command line changes."""
    from .recipe import load_recipe

    return load_recipe(path, overrides or (), values)
