"""Recipes and command lines that make no sense: one message that names the key and what it takes.

The command line runs in this process: an exception that its entry point lets through fails the test, so every
test of bad input also says "no traceback". A few run the real command.
"""

import pytest
from refusals import WEIGHT, change_tensors, refused

# --- recipes and command lines ---


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("sft.epoch=3", ("sft.epoch: unknown key", "Did you mean epochs?")),
        ("sftt.epochs=3", ("sftt: unknown key", "Did you mean sft?")),
        ("sft.learning_rate=-1", ("sft.learning_rate = -1.0", "positive")),
        ("sft.epochs=many", ("sft.epochs = 'many'", "float")),
        ("distill.relation_form=dot", ("distill.relation_form = 'dot'", "scaled_dot, cosine")),
        ("distill.preset=mine", ("distill.preset = 'mine'", "paper, authors")),
        ("run.methods=['bitnet']", ("run.methods = 'bitnet'", "fp16_sft")),
        ("sft.epochs", ("--set sft.epochs", "section.key=value")),
        ("corpus.source=", ("model.source is empty", "[base]")),
        ("base.hidden_size=0", ("base.hidden_size = 0", "from 1 to 2147483647")),
        ("base.vocab_size=1099511627776", ("base.vocab_size = 1099511627776", "from 1 to 2147483647")),
        ("base.num_key_value_heads=3", ("base.num_key_value_heads = 3", "divide num_attention_heads = 8")),
    ],
)
def test_a_wrong_setting_is_named(cli, project, override, fragments):
    refused(cli("run", project, "--set", override), *fragments)


@pytest.mark.parametrize("size", [2**30, 2**31 - 1], ids=["too large", "overflowing"])
def test_a_base_that_no_memory_holds_is_refused(cli, project, tmp_path, size):
    sizes = [f"base.{key}={size}" for key in ("hidden_size", "intermediate_size")]
    overrides = [argument for setting in sizes for argument in ("--set", setting)]
    outcome = cli("base", project, "--output", tmp_path / "new", *overrides)
    refused(outcome, "not enough memory", "--dry-run", "smaller model")
    assert not (tmp_path / "new").exists()


def test_options_of_a_dry_run_are_refused_without_one(cli, project):
    refused(cli("run", project, "--processes", "8"), "--processes 8", "add --dry-run")


@pytest.mark.parametrize(
    ("option", "value", "fragment"),
    [
        ("--processes", "0", "use 1 or more"),
        ("--flops", "-1", "positive"),
        ("--flops", "inf", "positive"),
        ("--utilisation", "40", "(0, 1]"),
        ("--device-memory", "0", "positive"),
    ],
)
def test_an_impossible_machine_is_refused(cli, project, option, value, fragment):
    refused(cli("run", project, "--dry-run", option, value), option, fragment)


# --- recipes that extend others ---


def test_a_recipe_that_extends_a_missing_one_names_both(cli, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('extends = "none.toml"\n')
    refused(cli("run", path), tmp_path / "none.toml", f"which {path} extends", "check the path")


def test_recipes_that_extend_each_other_are_refused(cli, tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.toml").write_text(f'extends = "{other}.toml"\n')
    refused(cli("run", tmp_path / "a.toml"), tmp_path / "b.toml", "'a.toml' leads back to itself")


@pytest.mark.parametrize("value", ["3", "{ file = 'a.toml' }", "[1]"])
def test_extends_that_names_no_file_is_refused(cli, tmp_path, value):
    path = tmp_path / "recipe.toml"
    path.write_text(f"extends = {value}\n")
    refused(cli("run", path), path, "extends = ", "a list of them")


def test_a_key_is_checked_where_it_was_inherited_too(cli, tmp_path):
    (tmp_path / "a.toml").write_text("[sft]\nepoch = 1\n")
    (tmp_path / "b.toml").write_text('extends = "a.toml"\n')
    refused(cli("run", tmp_path / "b.toml"), "sft.epoch: unknown key")


def test_a_missing_recipe_is_named(cli, tmp_path):
    refused(cli("run", tmp_path / "none.toml"), tmp_path / "none.toml", "check the path")


def test_a_recipe_that_is_not_toml_is_named(cli, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text("[sft\n")
    refused(cli("run", path), path, "not valid TOML", "line 1")


def test_a_base_that_no_recipe_describes_is_refused(cli, project, tmp_path):
    refused(cli("base", project, "--output", tmp_path / "new"), "no [base] section")


def test_an_unknown_split_is_named(cli, project, llama):
    refused(cli("eval", project, llama, "--split", "dev"), "--split dev", "test or validation")


def test_a_run_that_is_not_there_is_named(cli, tmp_path):
    refused(cli("report", tmp_path / "none"), tmp_path / "none", "bitdistill run")


# --- the real command ---


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("run", "none.toml"), "none.toml: cannot read the recipe"),
        (("run", "{project}", "--set", "sft.epochs"), "write section.key=value"),
        (("run", "{project}", "--set", "sft.epoch=1"), "Did you mean epochs?"),
    ],
)
def test_the_real_command_ends_with_one_message(python, project, arguments, fragment):
    done = python("-m", "bitdistill", *(argument.format(project=project) for argument in arguments))
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert fragment in done.stderr


def test_the_real_command_prints_nothing_of_the_libraries_beside_its_message(python, damaged):
    change_tensors(damaged, lambda tensors: tensors.pop(WEIGHT))
    done = python("-m", "bitdistill", "inspect", damaged)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"error: {damaged}: the checkpoint lacks {WEIGHT}")
