"""Surgery: the student keeps every tensor, the report says what happened, sizes are those counted by hand."""

import copy
import json

import pytest
import torch
from tiny_families import families
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from bitdistill.errors import SurgeryError
from bitdistill.model import BitLinear, TernarySpec
from bitdistill.train.size import model_size
from bitdistill.train.surgery import refine

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Small enough to count by hand: 2 query heads and 1 key/value head of width 4.
COUNTED = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
}
EMBEDDING = 11 * 8
MATRICES = 8 * 8 + 4 * 8 + 4 * 8 + 8 * 8 + 3 * 8 * 12
NORMS = 3 * 8
GAINS = 8 + 12  # inputs of o_proj and down_proj
ALL_GAINS = 3 * 8 + 8 + 2 * 8 + 12


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# --- what is kept ---


@families
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sites", ["none", "subln", "all"])
def test_every_tensor_of_the_model_is_in_the_student(make_model, family, tied, sites):
    model = make_model(family, tie_word_embeddings=tied)
    student, _ = refine(model, TernarySpec(norm_sites=sites))
    before, after = tensors(model), tensors(student)
    new = {
        f"{name}.norm.weight" for name, m in student.named_modules() if getattr(m, "norm", None) is not None
    }
    new = {name for name in new if name in after and name not in before}
    assert set(after) == set(before) | new
    assert len(new) == 2 * {"none": 0, "subln": 2, "all": 7}[sites]
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    for name in new:
        assert torch.equal(after[name], torch.ones_like(after[name])), name


@families
def test_every_setting_of_the_model_is_in_the_student(make_model, family, tmp_path):
    """And survives saving: window, layer kinds, RoPE bases, activation and the rest."""
    model = make_model(family)
    student, _ = refine(model, TernarySpec())
    student.save_pretrained(tmp_path)
    own = {"model_type", "architectures", "auto_map", "ternary", "dtype", "_name_or_path"}
    before = {key: value for key, value in model.config.to_dict().items() if key not in own}
    for config in (student.config, AutoConfig.from_pretrained(tmp_path)):
        after = config.to_dict()
        assert {key: after[key] for key in before} == before
        assert set(after) - set(before) <= own


def test_a_config_in_the_hubs_older_words_keeps_its_meaning(make_model, tmp_path):
    """Gemma's checkpoints name RoPE bases, scaling and windows by keys that transformers 5 translates."""
    saved = ("rope_parameters", "layer_types", "sliding_window_pattern")
    make_model("gemma3_text", num_hidden_layers=4).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config = {key: value for key, value in config.items() if key.removeprefix("_") not in saved}
    config |= {
        "rope_theta": 500_000,
        "rope_local_base_freq": 2_000,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window_pattern": 3,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    student, _ = refine(AutoModelForCausalLM.from_pretrained(tmp_path), TernarySpec())
    student.save_pretrained(tmp_path / "student")
    read = AutoConfig.from_pretrained(tmp_path / "student")
    assert read.rope_parameters == {
        "sliding_attention": {"rope_type": "default", "rope_theta": 2_000},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500_000},
    }
    sliding, full = "sliding_attention", "full_attention"
    assert read.layer_types == [sliding, sliding, full, sliding]
    assert read.sliding_window == 4


@families
def test_the_model_is_not_changed_and_shares_no_memory_with_the_student(make_model, family):
    model = make_model(family)
    before, classes = tensors(model), {name: type(m) for name, m in model.named_modules()}
    config = copy.deepcopy(model.config.to_dict())
    calibration = [{"input_ids": torch.randint(2, 300, (2, 6))}]
    student, _ = refine(model, TernarySpec(), calibration)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(7)
    after = tensors(model)
    assert {name: type(m) for name, m in model.named_modules()} == classes
    assert model.config.to_dict() == config
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(module._forward_pre_hooks for module in model.modules())


@families
def test_tied_embeddings_stay_one_tensor(make_model, family, tmp_path):
    student, _ = refine(make_model(family, tie_word_embeddings=True), TernarySpec())
    assert student.lm_head.weight is student.model.embed_tokens.weight
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, student.lm_head.weight)


@families
def test_untied_heads_stay_apart(make_model, family):
    model = make_model(family, tie_word_embeddings=False)
    student, _ = refine(model, TernarySpec())
    assert student.lm_head.weight is not student.model.embed_tokens.weight
    assert torch.equal(student.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(student.lm_head.weight, student.model.embed_tokens.weight)


def test_biases_are_kept_and_used(make_model):
    model = make_model("llama", attention_bias=True, mlp_bias=True)
    student, _ = refine(model, TernarySpec())
    for layer, original in zip(student.model.layers, model.model.layers, strict=True):
        for part in ("self_attn", "mlp"):
            for name, module in getattr(original, part).named_children():
                if name not in LINEARS:
                    continue
                linear = getattr(getattr(layer, part), name)
                assert isinstance(linear, BitLinear)
                assert torch.equal(linear.bias, module.bias)
                assert linear.bias.abs().sum() > 0
                zero = torch.zeros(1, linear.in_features)
                torch.testing.assert_close(linear(zero)[0], module.bias)  # the norm of zero is zero


@families
def test_a_saved_student_loads_with_the_same_logits(make_model, family, tmp_path):
    calibration = [{"input_ids": torch.randint(2, 300, (2, 6))}]
    student, _ = refine(make_model(family), TernarySpec(norm_sites="all", granularity="channel"), calibration)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(2, 300, (2, 7))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, student(ids).logits)


# --- skip patterns ---


def test_skipped_linears_stay_as_they_were(make_model):
    model = make_model("llama", attention_bias=True)
    skip = ("model.layers.0.*", "*.v_proj")
    student, report = refine(model, TernarySpec(skip=skip))
    ternary = {name for name, m in student.named_modules() if isinstance(m, BitLinear)}
    assert ternary == {
        f"model.layers.1.{'mlp' if name in ('gate_proj', 'up_proj', 'down_proj') else 'self_attn'}.{name}"
        for name in LINEARS
        if name != "v_proj"
    }
    kept = dict(report.skipped)
    assert kept.pop("lm_head") == "output head"
    assert set(kept) == {
        f"model.layers.0.{part}"
        for part in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
        )
    } | {"model.layers.1.self_attn.v_proj"}  # fmt: skip
    assert kept["model.layers.0.mlp.up_proj"] == "matches skip pattern 'model.layers.0.*'"
    assert kept["model.layers.1.self_attn.v_proj"] == "matches skip pattern '*.v_proj'"
    ids = torch.randint(2, 300, (1, 5))
    x = model.model.embed_tokens(ids)
    position = model.model.rotary_emb(x, torch.arange(5)[None])
    expected = model.model.layers[0](x, position_embeddings=position)
    got = student.model.layers[0](x, position_embeddings=position)
    assert torch.equal(got, expected)


def test_skip_patterns_travel_with_the_checkpoint(make_model, tmp_path):
    student, _ = refine(make_model("qwen3"), TernarySpec(skip=("*.down_proj",)))
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [type(loaded.get_submodule(n)) for n, _ in student.named_modules()] == [
        type(m) for _, m in student.named_modules()
    ]


# --- refusals ---


@pytest.mark.parametrize("old", ["o_proj", "down_proj"])
def test_a_model_whose_output_projections_are_renamed_is_refused(make_model, old):
    """A layer without them would lose SubLN without a word."""
    model = make_model("llama")
    for layer in model.model.layers:
        parent = layer.self_attn if old == "o_proj" else layer.mlp
        setattr(parent, f"other_{old}", getattr(parent, old))
        delattr(parent, old)
    with pytest.raises(SurgeryError, match=f"no linear named {old}.*families.py"):
        refine(model, TernarySpec())


def test_a_model_with_tensors_that_the_student_has_no_place_for_is_refused(make_model):
    model = make_model("llama")
    model.model.layers[0].mlp.extra = nn.Linear(3, 3)
    with pytest.raises(SurgeryError, match=r"layers\.0\.mlp\.extra.*Nothing was converted"):
        refine(model, TernarySpec())


def test_an_empty_calibration_is_refused(make_model):
    with pytest.raises(SurgeryError, match="no calibration batch"):
        refine(make_model("llama"), TernarySpec(), [])


# --- the report ---


def test_the_report_lists_every_linear_with_its_shape_and_norm(make_model):
    _, report = refine(make_model("qwen3", **COUNTED), TernarySpec())
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    assert report.family == "qwen3"
    assert report.replaced == (
        (f"{attention}.q_proj", (8, 8), False),
        (f"{attention}.k_proj", (4, 8), False),
        (f"{attention}.v_proj", (4, 8), False),
        (f"{attention}.o_proj", (8, 8), True),
        (f"{mlp}.gate_proj", (12, 8), False),
        (f"{mlp}.up_proj", (12, 8), False),
        (f"{mlp}.down_proj", (8, 12), True),
    )
    assert report.skipped == (("lm_head", "output head"),)
    lines = str(report).splitlines()
    assert lines[0] == "qwen3: 7 linears made ternary, 2 SubLN added, 1 linears left in full precision"
    assert sum("+ SubLN" in line for line in lines) == 2
    assert all(any(path in line for line in lines) for path, _, _ in report.replaced)
    assert any("lm_head" in line and "output head" in line for line in lines)


@pytest.mark.parametrize(
    ("spec", "scales", "gains"),
    [
        ({}, 7, GAINS),
        ({"norm_sites": "none"}, 7, 0),
        ({"norm_sites": "all"}, 7, ALL_GAINS),
        ({"granularity": "channel"}, 8 + 4 + 4 + 8 + 12 + 12 + 8, GAINS),
        # ceil(8 / 5) = 2 blocks a row, ceil(12 / 5) = 3 for down_proj
        ({"granularity": "block", "block_size": 5}, 2 * (8 + 4 + 4 + 8 + 12 + 12) + 3 * 8, GAINS),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_and_bytes_are_those_counted_by_hand(make_model, spec, scales, gains, tied):
    model = make_model("llama", **COUNTED, tie_word_embeddings=tied)
    student, report = refine(model, TernarySpec(**spec))
    full = (1 if tied else 2) * EMBEDDING + NORMS
    assert MATRICES == 480
    assert report.before.parameters == full + MATRICES
    assert report.before.ternary_parameters == 0
    assert report.before.bytes == 2 * (full + MATRICES)
    assert report.after.parameters == full + MATRICES + gains
    assert report.after.ternary_parameters == MATRICES
    # Five trits to a byte, fp32 scales, 16 bits for the rest.
    assert report.after.bytes == MATRICES // 5 + 4 * scales + 2 * (full + gains)
    assert model_size(student) == report.after
    assert f"bytes      {report.before.bytes:,} -> {report.after.bytes:,}" in str(report)


# --- gains ---


def reference_gains(model: nn.Module, batches: list[dict], names: tuple[str, ...]) -> dict[str, float]:
    """Mean over real tokens of the RMS of what each linear receives, in float64, one sequence at a time."""
    sums: dict[str, float] = {}
    tokens = 0
    handles = []
    for name in names:

        def record(module, args, name=name):
            rms = args[0].double().square().mean(dim=-1).sqrt()
            sums[name] = sums.get(name, 0.0) + rms.sum().item()

        handles.append(model.get_submodule(name).register_forward_pre_hook(record))
    with torch.no_grad():
        for batch in batches:
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            for ids, real in zip(batch["input_ids"], mask, strict=True):
                length = int(real.sum())
                model(input_ids=ids[None, :length])
                tokens += length
    for handle in handles:
        handle.remove()
    return {name: total / tokens for name, total in sums.items()}


def calibration_batches() -> list[dict[str, torch.Tensor]]:
    """Unequal batches, one padded, one without a mask."""
    padded = torch.randint(2, 300, (3, 10))
    mask = torch.ones_like(padded)
    mask[1, 4:] = 0
    mask[2, 1:] = 0
    return [{"input_ids": padded, "attention_mask": mask}, {"input_ids": torch.randint(2, 300, (1, 6))}]


@families
@pytest.mark.parametrize("sites", ["subln", "all"])
def test_calibrated_gains_are_the_mean_rms_over_real_tokens(make_model, family, sites):
    model = make_model(family)
    batches = calibration_batches()
    student, report = refine(model, TernarySpec(norm_sites=sites), batches)
    names = tuple(path for path, _, norm in report.replaced if norm)
    assert len(names) == {"subln": 4, "all": 14}[sites]
    expected = reference_gains(model, batches, names)
    for name in names:
        gain = student.get_submodule(name).norm.weight
        assert gain.unique().numel() == 1
        assert gain[0].item() == pytest.approx(expected[name], rel=1e-5), name


def test_padding_does_not_reach_the_gains(make_model):
    model = make_model("llama")
    batches = calibration_batches()
    other = [dict(batch) for batch in batches]
    other[0]["input_ids"] = torch.where(other[0]["attention_mask"] == 0, 5, other[0]["input_ids"])
    gains = []
    for calibration in (batches, other):
        student, _ = refine(model, TernarySpec(), calibration)
        gains.append(
            [
                m.norm.weight[0].item()
                for m in student.modules()
                if getattr(m, "norm", None) is not None and isinstance(m, BitLinear)
            ]
        )
    assert gains[0] == pytest.approx(gains[1], rel=1e-6)
    assert gains[0] != pytest.approx([1.0] * len(gains[0]), rel=0.01)
