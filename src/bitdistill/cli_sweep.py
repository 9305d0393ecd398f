"""The verb that runs a recipe at many points."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .cli_output import JsonFile, Overrides, RecipeFile, console, stderr, write_json_to
from .errors import ConfigError

if TYPE_CHECKING:
    from .config import Recipe
    from .sweep import Point


def add_verbs(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(sweep)


def sweep(
    recipe: RecipeFile,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SECTION.KEY=A,B,C",
            help="Values of a recipe key; repeatable, all combinations are run. The first is the reference.",
        ),
    ] = None,
    point: Annotated[
        list[str] | None,
        typer.Option(
            metavar="'KEY=A KEY=B'",
            help="Values that go together, '' for the recipe as it is; repeatable, each with the whole grid.",
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Runs of every point, with seeds from the recipe's on.")
    ] = 1,
    tune_once: Annotated[
        bool,
        typer.Option("--tune-once", help="Learning rates that a grid chose at the first seed serve all."),
    ] = False,
    name: Annotated[str, typer.Option(help="Name of the study; the recipe's if not given.")] = "",
    title: Annotated[str, typer.Option(help="Its question, for the report.")] = "",
    records: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the records, one JSON a run; `records` in the study's folder if not given."
        ),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Print the points; run nothing.")] = False,
    set_: Overrides = None,
    json_path: JsonFile = None,
) -> None:
    """Run a recipe at every point of a grid and every seed; a killed sweep continues, several share the work."""
    from .recipe import load_recipe, split_grid

    keys = [split_grid(text) for text in grid or ()]
    repeated = {key for key, _ in keys if [k for k, _ in keys].count(key) > 1}
    if repeated:
        raise ConfigError(f"--grid {', '.join(sorted(repeated))}: given twice; write all values in one")
    choices = [_choice(text) for text in point or ()]
    for choice in choices:
        if both := choice.keys() & {key for key, _ in keys}:
            raise ConfigError(f"--point and --grid both set {', '.join(sorted(both))}; leave it out of one")
    varied = {key for key, _ in keys} | {key for choice in choices for key in choice}
    if own := varied & {"seed", "name", "output_dir", "steps_dir"}:
        raise ConfigError(
            f"{', '.join(sorted(own))}: a sweep sets it itself; give --seeds, or --set for all points"
        )
    plain = load_recipe(recipe, set_ or ())
    if tune_once and (seeds == 1 or not plain.run.learning_rates):
        raise ConfigError("--tune-once needs run.learning_rates in the recipe and more than one of --seeds")
    # The points import torch only when they run; here every recipe is built, so that a bad value costs no training.
    from .sweep import Sweep, point_recipe, points

    wanted = points(dict(keys), choices, range(plain.seed, plain.seed + seeds))
    study = name or plain.name
    folder = Path(plain.output_dir) / study

    def at(p: "Point") -> "Recipe":
        """The recipe of a point, whose values win over those of --set."""
        rest = [text for text in set_ or () if text.partition("=")[0].strip() not in p.values]
        return point_recipe(load_recipe(recipe, rest, p.values), p, folder)

    runs = [(p, at(p)) for p in wanted]
    _check_distinct(runs)
    if list_:
        for _, r in runs:
            console.print(r.name, highlight=False, soft_wrap=True)
        write_json_to(json_path, [{"name": r.name, "seed": p.seed, "point": dict(p.values)} for p, r in runs])
        return
    found = Sweep(study, title or study, runs, records or folder / "records", tune_once).run()
    _print(found, json_path)


def _choice(text: str) -> dict[str, Any]:
    from .recipe import split_grid

    values = {}
    for part in text.split():
        key, options = split_grid(part)
        if len(options) != 1:
            raise ConfigError(f"--point {text!r}: {key} has {len(options)} values; a point has one of each")
        values[key] = options[0]
    return values


def _check_distinct(runs: "list[tuple[Point, Recipe]]") -> None:
    seen: dict[str, str] = {}
    for _, recipe in runs:
        for what in (recipe.name, repr(dataclasses.replace(recipe, name="any"))):
            if what in seen:
                both = f"{seen[what]} and {recipe.name}"
                raise ConfigError(f"{both} are the same run, or have the same name; leave one out")
            seen[what] = recipe.name


def _print(found: dict[str, dict[str, Any]], json_path: Path | None) -> None:
    from .processes import is_main_process

    if not is_main_process():
        return
    methods = list(dict.fromkeys(key for record in found.values() for key in record["rows"]))
    table = Table("run", *methods)
    for name, record in found.items():
        rows, other = record["rows"], "failed" if "failed" in record else ""
        cells = (f"{100 * rows[key][record['metric']]:.2f} %" if key in rows else other for key in methods)
        table.add_row(name, *cells)
    console.print(table)
    failed = {name: record["failed"] for name, record in found.items() if "failed" in record}
    for name, reason in failed.items():
        stderr.print(f"{name} failed: {reason}", highlight=False, soft_wrap=True, markup=False)
    write_json_to(json_path, found)
    if failed:
        raise typer.Exit(1)
