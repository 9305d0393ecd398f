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
    ],
)
def test_a_wrong_setting_is_named(cli, project, override, fragments):
    refused(cli("run", project, "--set", override), *fragments)


def test_a_missing_recipe_is_named(cli, tmp_path):
    refused(cli("run", tmp_path / "none.toml"), tmp_path / "none.toml", "check the path")


def test_a_recipe_that_is_not_toml_is_named(cli, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text("[sft\n")
    refused(cli("run", path), path, "not valid TOML", "line 1")


def test_pretraining_without_a_source_or_a_base_is_refused(cli, project, tmp_path):
    refused(cli("pretrain", project, "--output", tmp_path / "new"), "--source is missing", "[base]")


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
