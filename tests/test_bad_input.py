"""What a user can get wrong: one clear message that names thing and remedy, exit status 1, nothing lost.

The command line runs in this process: an exception that its entry point lets through fails the test, so every
test here also says "no traceback". A few run the real command.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bitdistill.train import sft, stage2_pretrain
from bitdistill.train.trainer import StudentTrainer

PROGRESS = re.compile(r"  \d+/\d+  .* left \d+ s")
WEIGHT = "model.layers.1.mlp.up_proj.weight"


def refused(outcome, *fragments: object) -> str:
    """The message of a command that ended with one, with nothing but progress lines before it."""
    assert outcome.status == 1, outcome.err
    lines = [line for line in outcome.err.splitlines() if line.strip() and not PROGRESS.search(line)]
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("error: ")
    for fragment in fragments:
        assert str(fragment) in lines[0]
    return lines[0]


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def weights_digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def damaged(llama, tmp_path) -> Path:
    """A copy of the small Llama, to be damaged."""
    return Path(shutil.copytree(llama, tmp_path / "damaged"))


@pytest.fixture
def data(project, tmp_path) -> Path:
    """A copy of the project's task data, to be damaged."""
    return Path(shutil.copytree(project.parent / "task", tmp_path / "data"))


# --- models that cannot be converted ---


def test_unknown_family_is_named_beside_the_known_ones(cli, project, tokenizer, tmp_path):
    source = tmp_path / "gpt2"
    config = transformers.GPT2Config(
        vocab_size=300, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(source)
    tokenizer.save_pretrained(source)
    before = contents(source)
    outcome = cli("refine", project, "--source", source, "--output", tmp_path / "new")
    refused(outcome, "'gpt2' is not supported", "llama, qwen3", "families.py")
    assert contents(source) == before
    assert not (tmp_path / "new").exists()


def test_renamed_projections_are_named(cli, project, damaged, tmp_path):
    def rename(tensors):
        for name in [n for n in tensors if "o_proj" in n or "down_proj" in n]:
            tensors[name.replace("o_proj", "out_proj").replace("down_proj", "shrink")] = tensors.pop(name)

    change_tensors(damaged, rename)
    outcome = cli("refine", project, "--source", damaged, "--output", tmp_path / "new")
    refused(
        outcome, damaged, "lacks model.layers.0.mlp.down_proj.weight", "mlp.shrink.weight", "make it again"
    )


def test_skipping_every_linear_is_refused(cli, project, llama, tmp_path):
    outcome = cli(
        "refine", project, "--source", llama, "--output", tmp_path / "new", "--set", 'refine.skip=["model.*"]'
    )
    refused(outcome, "nothing would change", "skip patterns ['model.*']")
    assert not (tmp_path / "new").exists()


def test_refining_a_student_again_is_refused(cli, project, student, tmp_path):
    before = contents(student)
    outcome = cli("refine", project, "--source", student, "--output", tmp_path / "new")
    refused(outcome, "ternary student already (bit_llama)", "refine its base instead")
    assert contents(student) == before


@pytest.mark.parametrize("damage", ["another family", "a student", "a corrupted config"])
def test_a_run_refuses_such_a_model_before_it_trains_anything(
    cli, project, damaged, student, tmp_path, damage
):
    source, fragments = damaged, ("does not load",)
    if damage == "another family":
        change_config(damaged, model_type="gpt2", architectures=["GPT2LMHeadModel"])
        fragments = ("'gpt2' is not supported", "llama, qwen3")
    elif damage == "a student":
        source, fragments = student, ("ternary student already", "refine its base")
    else:
        change_config(damaged, hidden_size="wide")
    outcome = cli(
        "run", project, "--set", f"model.source={source}", "--set", f"output_dir={tmp_path / 'runs'}"
    )
    refused(outcome, *fragments)
    assert not (tmp_path / "runs").exists()


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


# --- data ---


GOOD_ROW = '{"text": "the soup was good .", "label": 1}\n'


@pytest.mark.parametrize(
    ("file", "content", "fragments"),
    [
        ("train.jsonl", "", ("train.jsonl: no rows", "empty")),
        ("eval.jsonl", "\n\n", ("eval.jsonl: no rows", "empty")),
        ("train.jsonl", GOOD_ROW + '{"text": "x", "label": 2}\n', ("training row 2", "label 2", "bad, good")),
        ("train.jsonl", GOOD_ROW + '{"text": "x", "label": "²"}\n', ("training row 2", "label '²'")),
        ("eval.jsonl", GOOD_ROW + '{"text": "x", "label": "fine"}\n', ("evaluation row 2", "'fine'")),
        ("train.jsonl", GOOD_ROW + '{"text": "x"}\n', ("training row 2", "no column 'label'", "text")),
        ("train.jsonl", GOOD_ROW + '{"text": "x", "label"\n', ("train.jsonl:2", "not valid JSON")),
        ("train.jsonl", GOOD_ROW + "[1]\n", ("train.jsonl:2", "JSON object")),
        ("train.jsonl", GOOD_ROW * 9, ("same label", "task.label_column")),
        ("train.jsonl", GOOD_ROW, ("too few", "validation_share")),
    ],
)
def test_bad_task_rows_are_named(cli, project, llama, data, tmp_path, file, content, fragments):
    (data / file).write_text(content, encoding="utf-8")
    outcome = cli(
        "sft", project, "--source", llama, "--output", tmp_path / "new", "--set", f"task.data_dir={data}"
    )
    refused(outcome, *fragments)
    assert not (tmp_path / "new").exists()


def test_task_data_in_another_encoding_is_named(cli, project, llama, data, tmp_path):
    (data / "train.jsonl").write_bytes('{"text": "café", "label": 1}\n'.encode("latin-1"))
    outcome = cli(
        "sft", project, "--source", llama, "--output", tmp_path / "new", "--set", f"task.data_dir={data}"
    )
    refused(outcome, data / "train.jsonl", "not UTF-8", "convert")


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("task.data_dir=nowhere", ("nowhere/train.jsonl", "task.data_dir")),
        ("task.name=sst3", ("task.name = 'sst3'", "sst2, grammar, jsonl")),
        ("task.template=It was", ("task.template = 'It was'", "no {column}")),
        ("task.template=", ("task.template is empty", "{column}")),
        ("task.template={txt} It was", ("no column 'txt'", "text, label", "task.template")),
        ("task.template={text", ("task.template = '{text'", "}")),
        ("task.template={text.size} It", ("task.template = '{text.size} It'", "{column}")),
        ("task.labels=[' a', 'a']", ("task.labels", "two labels are the same")),
        ("task.label_column=class", ("no column 'class'", "task.label_column")),
        ("task.labels=[]", ("task.labels is empty",)),
        ("task.labels=['', 'x']", ("''", "no tokens")),
        ("task.max_length=8", ("no room for a prompt", "task.max_length", "now 8")),
    ],
)
def test_a_task_section_that_does_not_fit_the_data_is_named(cli, project, llama, override, fragments):
    settings = ["--set", override]
    if "max_length" in override:
        settings += ["--set", "task.labels=['ABCDEFGH', 'IJKLMNOP']"]
    refused(cli("eval", project, llama, *settings), *fragments)


def test_a_prompt_without_tokens_is_refused(cli, project, llama, data):
    (data / "eval.jsonl").write_text('{"text": "", "label": 1}\n')
    outcome = cli("eval", project, llama, "--set", f"task.data_dir={data}", "--set", "task.template={text}")
    refused(outcome, "prompt '' has no tokens", "task.template")


def test_generation_that_leaves_no_room_for_a_prompt_is_refused(cli, project, llama):
    outcome = cli("eval", project, llama, "--set", "task.kind=generation", "--set", "task.max_new_tokens=48")
    refused(outcome, "48 tokens leave no room", "task.max_length (now 48)", "task.max_new_tokens")


@pytest.mark.parametrize(
    ("name", "content", "fragments"),
    [
        ("a.jsonl", "", ("every document is empty",)),
        ("a.txt", " \n\n \n", ("every document is empty",)),
        ("a.jsonl", '{"text": \n', ("a.jsonl:1", "not valid JSON")),
        ("a.jsonl", '{"body": "x"}\n', ("a.jsonl:1", "no column 'text'", "body", "corpus.text_column")),
        ("a.parquet", "PAR", ("a.parquet", "parquet")),
        ("a.txt", "the soup", ("do not fill one sequence of 16", "corpus.sequence_length")),
        ("a.csv", "text\nx\n", (".txt, .jsonl, .parquet", "corpus.source")),
        (None, "", ("corpus.source", "hub:NAME")),
    ],
)
def test_a_corpus_that_cannot_be_read_is_named(cli, project, llama, tmp_path, name, content, fragments):
    folder = tmp_path / "corpus"
    folder.mkdir()
    if name is not None:
        (folder / name).write_text(content)
    outcome = cli(
        "pretrain", project, "--source", llama, "--output", tmp_path / "new",
        "--set", f"corpus.source={folder}", "--set", "corpus.pretrain_share=1",
    )  # fmt: skip
    refused(outcome, *fragments)


def test_a_text_column_that_parquet_lacks_is_named(cli, project, llama, tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    outcome = cli(
        "pretrain", project, "--source", llama, "--output", tmp_path / "new",
        "--set", f"corpus.source={tmp_path / 'a.parquet'}",
    )  # fmt: skip
    refused(outcome, "a.parquet", "no column 'text'", "body", "corpus.text_column")


def test_a_mistake_can_be_corrected_in_place(cli, project, llama, tmp_path):
    """A step that stopped before its first checkpoint has nothing to lose, so other settings may follow."""
    command = ("sft", project, "--source", llama, "--output", tmp_path / "new")
    refused(cli(*command, "--set", "task.labels=['', 'x']"), "no tokens")
    outcome = cli(*command)
    assert outcome.status == 0, outcome.err
    assert (tmp_path / "new" / "model.safetensors").is_file()


# --- damaged checkpoints ---


def test_a_missing_checkpoint_folder_is_named(cli, project, tmp_path):
    refused(cli("eval", project, tmp_path / "none"), tmp_path / "none", "no such folder")


def test_a_name_that_is_no_folder_is_said_to_be_taken_for_a_hub_id(cli, project):
    refused(cli("eval", project, "runs/none"), "runs/none (no such folder here", "hub", "check the path")


def test_a_folder_that_holds_no_model_is_named(cli, tmp_path):
    refused(cli("inspect", tmp_path), tmp_path, "no config.json", "not a model folder")


@pytest.mark.parametrize("kept", [0, 100, 40_000])
def test_truncated_weights_are_named(cli, damaged, kept):
    path = damaged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(cli("inspect", damaged), damaged, "does not load", "fetch or make the checkpoint again")


def test_a_missing_tensor_is_named(cli, damaged):
    change_tensors(damaged, lambda tensors: tensors.pop(WEIGHT))
    refused(cli("inspect", damaged), damaged, f"lacks {WEIGHT}", "make it again")


def test_a_missing_norm_of_a_student_is_named(cli, student, tmp_path):
    folder = shutil.copytree(student, tmp_path / "damaged")
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.0.self_attn.o_proj.norm.weight"))
    refused(cli("inspect", folder), "lacks model.layers.0.self_attn.o_proj.norm.weight")


def test_a_tensor_of_another_shape_is_named(cli, damaged):
    change_tensors(damaged, lambda tensors: tensors.update({WEIGHT: torch.zeros(3, 3)}))
    refused(cli("inspect", damaged), damaged, WEIGHT, "[3, 3]", "[48, 32]")


@pytest.mark.parametrize("verb", ["refine", "sft", "eval", "inspect"])
def test_a_nan_weight_is_named_by_every_verb(cli, project, damaged, tmp_path, verb):
    change_tensors(damaged, lambda tensors: tensors[WEIGHT][3].fill_(float("nan")))
    arguments = {
        "eval": (project, damaged),
        "inspect": (damaged,),
    }.get(verb, (project, "--source", damaged, "--output", tmp_path / "new"))
    refused(cli(verb, *arguments), damaged, WEIGHT, "NaN")


@pytest.mark.parametrize(
    "content",
    ['{"model_type": "llama", "hidden', "[]", "{}", '{"model_type": "lama"}'],
    ids=["half", "list", "empty", "unknown"],
)
def test_a_corrupted_config_is_named(cli, damaged, content):
    (damaged / "config.json").write_text(content)
    refused(cli("inspect", damaged), damaged, "does not load", "fetch or make the checkpoint again")


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_size", "wide"), ("hidden_size", -3), ("num_key_value_heads", 0), ("hidden_act", "slu")],
)
def test_an_impossible_config_value_is_refused(cli, damaged, key, value):
    change_config(damaged, **{key: value})
    refused(cli("inspect", damaged), damaged, "does not load")


@pytest.mark.parametrize(
    "ternary", [{"norm_sites": "some"}, {"bits": 2}, [1], {"skip": 3}, {"block_size": "x"}]
)
def test_a_corrupted_ternary_section_is_refused(cli, student, tmp_path, ternary):
    folder = shutil.copytree(student, tmp_path / "damaged")
    change_config(folder, ternary=ternary)
    refused(cli("inspect", folder), folder, "does not load")


def test_a_missing_tokenizer_is_named(cli, project, damaged):
    for path in damaged.glob("tokenizer*"):
        path.unlink()
    refused(cli("eval", project, damaged), damaged, "tokenizer does not load", "tokenizer.json")


def test_a_corrupted_tokenizer_is_named(cli, project, damaged):
    path = damaged / "tokenizer.json"
    path.write_text(path.read_text()[:500])
    refused(cli("eval", project, damaged), damaged, "tokenizer does not load", "tokenizer.json")


# --- distillation ---


def distill(cli, project, student, teacher, output, *settings):
    overrides = [argument for setting in settings for argument in ("--set", setting)]
    return cli("distill", project, "--source", student, "--teacher", teacher, "--output", output, *overrides)


def test_a_teacher_with_another_tokenizer_is_refused(cli, project, student, teacher, tmp_path):
    other = shutil.copytree(teacher, tmp_path / "other")
    tokenizer = transformers.AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    outcome = distill(cli, project, student, other, tmp_path / "new")
    refused(outcome, "different tokenizers (301 and 300 entries)", "same model family")


@pytest.mark.parametrize(
    ("setting", "fragments"),
    [
        ("distill.relation_layers=[2]", ("distill.relation_layers", "no layer 2", "2 layers")),
        ("distill.relation_layers=[-3]", ("distill.relation_layers", "no layer -3")),
        ("distill.teacher_layers=[5]", ("distill.teacher_layers", "no layer 5")),
        ("distill.relation_heads=3", ("3 relation heads", "set distill.relation_heads to a divisor")),
    ],
)
def test_relations_that_the_models_do_not_have_are_refused(
    cli, project, student, teacher, tmp_path, setting, fragments
):
    refused(distill(cli, project, student, teacher, tmp_path / "new", setting), *fragments)


def test_a_teacher_path_may_hold_quotes_and_spaces(cli, project, student, teacher, tmp_path):
    folder = shutil.copytree(teacher, tmp_path / 'Ann\'s "best" teacher')
    outcome = distill(cli, project, student, folder, tmp_path / "new")
    assert outcome.status == 0, outcome.err


# --- training that cannot go on ---


def test_a_loss_that_is_not_finite_names_step_and_learning_rate_and_keeps_checkpoints(
    cli, project, llama, tmp_path
):
    outcome = cli(
        "sft", project, "--source", llama, "--output", tmp_path / "new", "--set", "sft.learning_rate=1e30",
        "--set", "sft.warmup_ratio=0", "--set", "sft.max_grad_norm=0", "--set", "sft.save_every=1",
    )  # fmt: skip
    message = refused(outcome, " became ", "Lower the learning rate (now 1e+30)")
    step = int(re.search(r"at step (\d+)", message).group(1))
    assert step > 1
    assert f"the checkpoint of step {step - 1} is kept" in message
    trainer = tmp_path / "new.partial" / "trainer"
    assert (trainer / f"checkpoint-{step - 1}" / "trainer_state.json").is_file()


def test_other_settings_name_the_key_and_both_values_and_touch_nothing(cli, project, teacher, llama):
    before = contents(teacher)
    outcome = cli("sft", project, "--source", llama, "--output", teacher, "--set", "sft.learning_rate=0.5")
    refused(outcome, teacher, "training.learning_rate: 0.001 there, 0.5 now", "another name")
    assert contents(teacher) == before


def test_another_source_names_the_digests_and_touches_nothing(cli, project, teacher, student):
    before = contents(teacher)
    refused(cli("sft", project, "--source", student, "--output", teacher), "source: '", "there, '")
    assert contents(teacher) == before


def test_an_unfinished_step_is_not_continued_with_other_settings(cli, project, llama, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    command = ("sft", project, "--source", llama, "--output", tmp_path / "new")
    with monkeypatch.context() as patch:
        patch.setattr(sft, "save_model", full)
        assert cli(*command).status == 1
    before = contents(tmp_path / "new.partial")
    refused(cli(*command, "--set", "seed=7"), "seed: 0 there, 7 now")
    assert contents(tmp_path / "new.partial") == before


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_output_that_is_something_else_is_refused_before_any_work(cli, project, llama, tmp_path, kind):
    output = tmp_path / "taken"
    if kind == "folder":
        output.mkdir()
        (output / "thesis.txt").write_text("years of work")
    else:
        output.write_text("years of work")
    before = contents(tmp_path)
    refused(cli("sft", project, "--source", llama, "--output", output), output, "another name")
    assert contents(tmp_path) == before


# --- the machine ---


def test_an_output_that_cannot_be_made_is_named(cli, project, llama, tmp_path):
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "new"
    refused(cli("refine", project, "--source", llama, "--output", output), output, "not a directory")


def test_a_json_path_that_is_a_folder_is_named(cli, llama, tmp_path):
    refused(cli("inspect", llama, "--json", tmp_path), tmp_path, "is a directory")


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def pretrained(cli, project, llama, tmp_path_factory) -> str:
    """Digest of what stage 2 makes of the small Llama when nothing goes wrong."""
    output = tmp_path_factory.mktemp("pretrained") / "new"
    assert cli("pretrain", project, "--source", llama, "--output", output).status == 0
    return weights_digest(output)


def test_a_full_disk_at_the_last_save_loses_nothing(cli, project, llama, pretrained, tmp_path, monkeypatch):
    command = ("pretrain", project, "--source", llama, "--output", tmp_path / "new")
    with monkeypatch.context() as patch:
        patch.setattr(stage2_pretrain, "save_model", no_space)
        refused_full(cli(*command))
    assert not (tmp_path / "new").exists()
    assert cli(*command).status == 0
    assert weights_digest(tmp_path / "new") == pretrained
    steps = [json.loads(line)["step"] for line in (tmp_path / "new" / "metrics.jsonl").open()]
    assert steps == list(range(1, 9))


def test_a_full_disk_at_a_checkpoint_loses_what_came_after_the_one_before(
    cli, project, llama, pretrained, tmp_path, monkeypatch
):
    # save_every decides where checkpoints are, not what comes out, but it is one of the settings.
    command = (
        "pretrain", project, "--source", llama, "--output", tmp_path / "new",
        "--set", "pretrain.save_every=3",
    )  # fmt: skip
    save = StudentTrainer._save

    def fail_at_six(self, output_dir=None, state_dict=None):
        if self.state.global_step == 6:
            no_space()
        save(self, output_dir, state_dict)

    with monkeypatch.context() as patch:
        patch.setattr(StudentTrainer, "_save", fail_at_six)
        refused_full(cli(*command))
    assert (tmp_path / "new.partial" / "trainer" / "checkpoint-3" / "trainer_state.json").is_file()
    assert cli(*command).status == 0
    assert weights_digest(tmp_path / "new") == pretrained


@pytest.fixture
def full_disk(tmp_path) -> Path:
    """A path that cannot be written for lack of space.

    A link, because some writers rename a file of their own over the path: that must not hit the device.
    """
    if not Path("/dev/full").is_char_device():
        pytest.skip("no /dev/full here")
    path = tmp_path / "full"
    path.symlink_to("/dev/full")
    return path


def test_a_disk_that_fills_while_torch_saves_is_recognised(
    cli, project, llama, full_disk, tmp_path, monkeypatch
):
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda value, path, *rest, **more: save(value, full_disk))
    refused_full(cli("pretrain", project, "--source", llama, "--output", tmp_path / "new"))


def test_a_disk_that_fills_while_weights_are_written_is_recognised(
    cli, project, llama, tmp_path, monkeypatch
):
    def save(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", save)
    refused_full(cli("refine", project, "--source", llama, "--output", tmp_path / "new"))


def test_a_disk_that_fills_while_the_corpus_is_written_is_recognised(
    cli, project, llama, full_disk, tmp_path, monkeypatch
):
    save = np.save

    def save_elsewhere(path, array):
        with full_disk.open("wb") as stream:
            save(stream, array)

    monkeypatch.setattr(np, "save", save_elsewhere)
    refused_full(
        cli(
            "pretrain", project, "--source", llama, "--output", tmp_path / "new",
            "--set", f"output_dir={tmp_path}",
        )
    )  # fmt: skip


def test_a_result_that_does_not_fit_on_the_disk_is_an_error(cli, llama, full_disk):
    refused_full(cli("inspect", llama, "--json", full_disk))


def refused_full(outcome) -> None:
    message = refused(outcome)
    assert "disk" in message
    assert "full" in message
    assert "run the same command again" in message


# --- the real command ---


def bitdistill(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "bitdistill", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("run", "none.toml"), "none.toml: cannot read the recipe"),
        (("run", "{project}", "--set", "sft.epochs"), "write section.key=value"),
        (("run", "{project}", "--set", "sft.epoch=1"), "Did you mean epochs?"),
    ],
)
def test_the_real_command_ends_with_one_message(project, arguments, fragment):
    done = bitdistill(*(argument.format(project=project) for argument in arguments))
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert fragment in done.stderr


def test_the_real_command_prints_nothing_of_the_libraries_beside_its_message(damaged):
    change_tensors(damaged, lambda tensors: tensors.pop(WEIGHT))
    done = bitdistill("inspect", damaged)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"error: {damaged}: the checkpoint lacks {WEIGHT}")


def test_a_student_whose_config_names_another_norm_layout_is_refused(cli, student, tmp_path):
    folder = shutil.copytree(student, tmp_path / "student")
    config = json.loads((folder / "config.json").read_text())
    config["ternary"]["norm_sites"] = "none"
    (folder / "config.json").write_text(json.dumps(config))
    refused(cli("inspect", folder), ".norm.weight", "do not belong together")


def test_a_corpus_file_of_another_kind_is_refused(cli, project, llama, tmp_path):
    (tmp_path / "a.csv").write_text("text\nhello\n")
    outcome = cli(
        "pretrain", project, "--source", llama, "--output", tmp_path / "new", "--set",
        f"corpus.source='{tmp_path / 'a.csv'}'",
    )  # fmt: skip
    refused(outcome, "a.csv", ".jsonl")
