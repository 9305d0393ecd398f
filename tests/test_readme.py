"""The README says what is true: its recipe parses, its commands exist, its tree is the tree."""

import re
import tomllib
from pathlib import Path

import pytest
from engine_tables import read_records, with_tables

from bitdistill.cli import app
from bitdistill.recipe import build_recipe, load_recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def fenced(language: str) -> list[str]:
    blocks = [block.partition("\n") for block in README.split("```")[1::2]]
    return [text for name, _, text in blocks if name == language]


def test_the_example_recipe_is_a_valid_recipe():
    text, native = fenced("toml")
    assert build_recipe(tomllib.loads(native)).base.ternary
    recipe = build_recipe(tomllib.loads(text))
    assert recipe.task.labels == (" no", " yes")
    assert recipe.run.learning_rates == (5e-6, 2e-5, 5e-5)


def test_every_command_it_names_is_a_verb():
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands}
    code = README.split("`")[1::2] + [
        text for block in README.split("```")[1::2] for text in block.splitlines()
    ]
    named = {match for text in code for match in re.findall(r"^bitdistill ([a-z-]+)", text)}
    assert named
    assert named <= verbs


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_two_commands_are_targets_of_the_makefile(target):
    assert f"make {target}" in README
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_the_annotated_tree_names_files_that_exist():
    tree = next(block for block in fenced("") if "cli.py" in block)
    base = ROOT
    checked = 0
    for line in tree.splitlines():
        path = line.split("  ")[0 if not line.startswith(" ") else 1].strip()
        if line.startswith("src/"):
            base = ROOT / "src" / "bitdistill"
            assert base.is_dir()
            continue
        first, *siblings = [part.strip() for part in path.split(",")]
        folder = base if line.startswith("  ") else ROOT
        assert (folder / first).exists(), first
        for sibling in siblings:
            assert (folder / first).with_name(sibling).exists(), sibling
        checked += 1
    assert checked > 15


@pytest.mark.parametrize(
    "path",
    [*(ROOT / "recipes").rglob("*.toml"), ROOT / "src/bitdistill/recipes/demo.toml"],
    ids=lambda p: p.stem,
)
def test_every_recipe_in_the_tree_is_valid(path):
    assert load_recipe(path).name


def test_the_engine_s_tables_are_those_of_the_records():
    assert with_tables(README, read_records()) == README
