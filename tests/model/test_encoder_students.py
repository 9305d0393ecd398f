"""BERT's students: Hugging Face's own classes with some linears replaced."""

import json

import pytest
import torch
from test_students import LOAD_WITHOUT_PACKAGE, input_reference, ternary_reference
from tiny_encoders import small_encoder, small_encoder_student, some_batch
from torch import nn
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from bitdistill.model import BitLinear, SubLN

CLASSES = {
    "BertForMaskedLM": AutoModelForMaskedLM,
    "BertForSequenceClassification": AutoModelForSequenceClassification,
}
classes = pytest.mark.parametrize("name", CLASSES)

LAYER = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
TERNARY = [f"bert.encoder.layer.{layer}.{path}" for layer in (0, 1) for path in LAYER]


def inputs() -> dict[str, torch.Tensor]:
    return {key: value for key, value in some_batch().items() if key != "labels"}


@classes
def test_six_linears_of_every_layer_turn_ternary_and_no_head_does(name):
    student = small_encoder_student(name)
    assert [path for path, m in student.named_modules() if isinstance(m, BitLinear)] == TERNARY
    kept = [path for path, m in student.named_modules() if type(m) is nn.Linear]
    heads = {
        "BertForMaskedLM": ["cls.predictions.transform.dense", "cls.predictions.decoder"],
        "BertForSequenceClassification": ["bert.pooler.dense", "classifier"],
    }
    assert kept == heads[name]


@classes
@pytest.mark.parametrize(
    ("norm_sites", "paths"),
    [("none", ()), ("subln", ("attention.output.dense", "output.dense")), ("all", LAYER)],
)
def test_norms_are_children_of_the_linears_that_the_layout_names(name, norm_sites, paths):
    student = small_encoder_student(name, {"norm_sites": norm_sites})
    found = {path for path, m in student.named_modules() if isinstance(m, SubLN)}
    assert found == {f"bert.encoder.layer.{layer}.{path}.norm" for layer in (0, 1) for path in paths}
    assert {m.eps for m in student.modules() if isinstance(m, SubLN)} <= {1e-12}


@classes
@pytest.mark.parametrize("norm_sites", ["none", "subln", "all"])
def test_student_is_the_dense_model_with_quantised_linears(name, norm_sites):
    student, dense = small_encoder_student(name, {"norm_sites": norm_sites}), small_encoder(name)
    with torch.no_grad():
        for path in TERNARY:
            # On a grid of 1/1024 every sum of magnitudes is exact, whatever its order.
            latent = student.get_parameter(f"{path}.weight")
            latent.copy_((latent * 1024).round() / 1024)
    state = student.state_dict()
    latent_logits = dense(**inputs()).logits
    for path in TERNARY:
        module = dense.get_submodule(path)
        module.weight.data = torch.from_numpy(ternary_reference(state[f"{path}.weight"].numpy()))
        gain = state.get(f"{path}.norm.weight")
        module.register_forward_pre_hook(
            lambda _, arguments, gain=gain: input_reference(arguments[0], gain, 1e-12, 8)
        )
    logits = student(**inputs()).logits
    real = inputs()["attention_mask"].bool() if name == "BertForMaskedLM" else slice(None)
    torch.testing.assert_close(logits[real], dense(**inputs()).logits[real], rtol=1e-4, atol=1e-4)
    assert (logits - latent_logits)[real].abs().max() > 0.1


@classes
def test_a_token_sees_those_behind_it(name):
    student = small_encoder_student(name)
    changed = inputs()
    changed["input_ids"][0, 10] = 7
    first = student.bert(**inputs()).last_hidden_state[0, 0]
    assert (student.bert(**changed).last_hidden_state[0, 0] - first).abs().max() > 1e-2


@classes
def test_reloaded_student_gives_the_same_logits_to_the_last_bit(name, tmp_path):
    student = small_encoder_student(name)
    student.save_pretrained(tmp_path)
    reloaded, report = CLASSES[name].from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(reloaded) is type(student)
    assert torch.equal(reloaded(**inputs()).logits, student(**inputs()).logits)


def test_without_the_package_trusted_code_gives_the_same_logits_to_the_last_bit(python, tmp_path):
    script = LOAD_WITHOUT_PACKAGE.partition("import torch")[0] + (
        "import os\n"
        f"os.environ['HF_MODULES_CACHE'] = {str(tmp_path / 'modules')!r}\n"
        "import torch, transformers\n"
        "torch.set_num_threads(1)\n"
        "for folder, auto in zip(sys.argv[1::2], sys.argv[2::2]):\n"
        "    load = getattr(transformers, auto).from_pretrained\n"
        "    try:\n"
        "        load(folder, trust_remote_code=False)\n"
        "        sys.exit('loaded without the code')\n"
        "    except ValueError:\n"
        "        model = load(folder, trust_remote_code=True)\n"
        "    batch = torch.load(f'{folder}/batch.pt')\n"
        "    torch.save(model(**batch).logits.detach(), f'{folder}/logits.pt')\n"
    )
    (tmp_path / "load.py").write_text(script)
    arguments = []
    for name, auto_class in CLASSES.items():
        small_encoder_student(name).save_pretrained(tmp_path / name)
        torch.save(inputs(), tmp_path / name / "batch.pt")
        arguments += [tmp_path / name, auto_class.__name__]
    done = python("-I", tmp_path / "load.py", *arguments)
    assert done.returncode == 0, done.stderr
    for name in CLASSES:
        auto_map = json.loads((tmp_path / name / "config.json").read_text())["auto_map"]
        assert auto_map == {
            "AutoConfig": "students.BitBertConfig",
            f"AutoModel{name[4:]}": f"students.Bit{name}",
        }
        expected = small_encoder_student(name)(**inputs()).logits
        assert torch.equal(torch.load(tmp_path / name / "logits.pt"), expected)
