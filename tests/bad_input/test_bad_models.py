"""Models and checkpoints that cannot be used: one message that names the thing and the remedy."""

import json
import shutil

import pytest
import torch
import transformers
from refusals import WEIGHT, change_config, change_tensors, contents, distill, refused

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


def test_a_run_refuses_a_missing_teacher_before_it_trains_anything(cli, project, llama, tmp_path):
    outcome = cli(
        "run", project, "--set", f"model.source={llama}", "--set", f"output_dir={tmp_path / 'runs'}",
        "--set", f"distill.teacher={tmp_path / 'teacher'}",
    )  # fmt: skip
    refused(outcome, tmp_path / "teacher", "no such folder")
    assert not (tmp_path / "runs").exists()


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
    [("hidden_size", "wide"), ("hidden_act", "slu")],
)
def test_an_impossible_config_value_is_refused(cli, damaged, key, value):
    change_config(damaged, **{key: value})
    refused(cli("inspect", damaged), damaged, "does not load")


SIZES = {
    "zero": ({"hidden_size": 0}, "hidden_size = 0 in config.json"),
    "negative": ({"intermediate_size": -3}, "intermediate_size = -3 in config.json"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers = 0 in config.json"),
    "no heads": ({"num_key_value_heads": 0}, "num_key_value_heads = 0 in config.json"),
    "overflowing": ({"vocab_size": 2**40}, "vocab_size = 1099511627776 in config.json"),
    "overflowing width": ({"hidden_size": 2**62}, "hidden_size = 4611686018427387904 in config.json"),
    "heads that do not divide": (
        {"num_key_value_heads": 3},
        "num_key_value_heads = 3 in config.json does not divide num_attention_heads = 4",
    ),
    "width that heads do not divide": (
        {"num_attention_heads": 6, "head_dim": None},
        "num_attention_heads = 6 in config.json does not divide hidden_size = 32",
    ),
}


@pytest.mark.parametrize("verb", ["inspect", "run", "dry run"])
@pytest.mark.parametrize("case", SIZES)
def test_a_size_that_no_model_has_is_refused_before_any_weight_is_read(cli, project, damaged, case, verb):
    values, fragment = SIZES[case]
    change_config(damaged, **values)
    (damaged / "model.safetensors").unlink()
    arguments = {
        "inspect": ("inspect", damaged),
        "run": ("run", project, "--set", f"model.source={damaged}"),
        "dry run": ("run", project, "--set", f"model.source={damaged}", "--dry-run"),
    }
    message = refused(cli(*arguments[verb]), damaged)
    # Some combinations transformers refuses by itself when it reads the config.
    assert fragment in message or "does not load" in message
    assert "make the checkpoint again" in message


@pytest.mark.parametrize(
    "ternary",
    [{"norm_sites": "some"}, {"bits": 2}, [1], {"skip": 3}, {"block_size": "x"}, {"dead_zone_bias": "x"}],
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


def test_a_student_whose_config_names_another_norm_layout_is_refused(cli, student, tmp_path):
    folder = shutil.copytree(student, tmp_path / "student")
    config = json.loads((folder / "config.json").read_text())
    config["ternary"]["norm_sites"] = "none"
    (folder / "config.json").write_text(json.dumps(config))
    refused(cli("inspect", folder), ".norm.weight", "do not belong together")


# --- distillation ---


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
