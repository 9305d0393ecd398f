"""BitNet a4.8: hybrid activations by site against float64 numpy, the top-k mask, a base of it, its zeros counted."""

import json

import numpy as np
import pytest
import torch
from tiny_families import families, small_student

from bitdistill.model import BitLinear, TernarySpec
from bitdistill.model.quant import fake_quantize_activation, is_among_largest
from bitdistill.sparsity import counting, sparsity

HYBRID = {"activation_bits": 4, "int4_sites": "inputs"}


def reference_inputs(x: np.ndarray, name: str) -> np.ndarray:
    """Hybrid activations of one linear by the paper's formulas, token by token."""
    result = np.empty_like(x)
    for i, row in enumerate(x):
        if name in ("o_proj", "down_proj"):
            scale = np.abs(row).max() / 127
            result[i] = np.clip(np.rint(row / scale), -128, 127) * scale
            if name == "o_proj":
                result[i, np.argsort(-np.abs(row))[len(row) // 2 :]] = 0
        else:
            scale = np.abs(row).mean() / np.sqrt(7)
            result[i] = np.clip(np.rint(row / scale), -8, 7) * scale
    return result


def test_the_mask_keeps_the_larger_half_and_ties():
    x = torch.tensor([[3.0, -4.0, 1.0, 0.5], [1.0, -1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 2.0]])
    assert is_among_largest(x, 0.5).tolist() == [
        [True, True, False, False],
        [True, True, True, False],
        [True, True, True, True],
    ]
    assert is_among_largest(x, 0.01).sum(dim=-1).tolist() == [1, 3, 1]


def test_the_gradient_passes_the_mask_straight_through():
    x = torch.randn(3, 8, requires_grad=True)
    out = fake_quantize_activation(x, 8, kept_share=0.5)
    assert (out == 0).sum(dim=-1).tolist() == [4, 4, 4]
    weights = torch.randn(3, 8)
    (out * weights).sum().backward()
    assert torch.equal(x.grad, weights)


@families
def test_every_site_has_its_quantiser(family):
    model = small_student(family, HYBRID)
    seen: dict[str, tuple] = {}
    for path, module in model.named_modules():
        if isinstance(module, BitLinear):
            module.register_forward_pre_hook(lambda m, args, path=path: seen.update({path: (m, args[0])}))
    with torch.no_grad():
        model(torch.randint(2, 300, (2, 7)))
        for path, (module, x) in seen.items():
            inputs = module.inputs(x)
            expected = reference_inputs(inputs.flatten(0, 1).double().numpy(), path.rpartition(".")[2])
            found = module.quantized_inputs(x).flatten(0, 1)
            torch.testing.assert_close(found.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)
    assert len(seen) == 14


def test_with_8_bits_the_hybrid_is_the_uniform_student():
    ids = torch.randint(2, 300, (2, 7))
    with torch.no_grad():
        uniform, hybrid = (small_student("llama", t)(ids).logits for t in ({}, {"int4_sites": "inputs"}))
    assert torch.equal(uniform, hybrid)


def test_a_site_without_a_definition_is_refused():
    with pytest.raises(ValueError, match="int4_sites"):
        TernarySpec(int4_sites="outputs")


def test_zeros_are_counted_by_kind_of_linear():
    model = small_student("llama", HYBRID, hidden_act="relu2")
    ids = torch.randint(2, 300, (3, 7))
    zeros: dict[str, list[float]] = {}
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if isinstance(module, BitLinear):
            module.register_forward_pre_hook(
                lambda m, args, name=name: zeros.setdefault(name, []).append(
                    float((m.quantized_inputs(args[0]) == 0).double().mean())
                )
            )
            if name == "gate_proj":
                module.register_forward_hook(
                    lambda m, args, out: zeros.setdefault("gate", []).append(
                        float((out <= 0).double().mean())
                    )
                )
    with torch.no_grad(), counting(model) as count:
        model(ids)
    found = sparsity(model, count)
    assert found["zeros_o_proj"] == pytest.approx(0.5)
    assert found["zeros_q_proj"] == pytest.approx(np.mean(zeros["q_proj"]))
    assert found["zeros_down_proj"] == pytest.approx(np.mean(zeros["down_proj"]))
    by_layer = [1 - (1 - x) * (1 - g) for x, g in zip(zeros["up_proj"], zeros["gate"], strict=True)]
    assert found["zeros_up_proj"] == pytest.approx(np.mean(by_layer))
    sizes = {"q_proj": 1024, "k_proj": 512, "v_proj": 512, "o_proj": 1024}
    sizes |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 32 * 48)
    skipped = sum(found[f"zeros_{name}"] * size for name, size in sizes.items())
    assert found["zeros_overall"] == pytest.approx(skipped / sum(sizes.values()))
    assert found["active_parameters"] == pytest.approx(2 * (sum(sizes.values()) - skipped))
    with torch.no_grad():
        model(ids)
    assert sparsity(model, count) == found  # nothing is counted outside


def test_a_base_trains_with_8_bits_and_ends_hybrid(cli, project, tmp_path):
    settings = (
        "base.architecture=bitnet_a4_8", "base.int4_activations_ratio=0.5", "base.tokens=512", "base.batch_size=4",
        "base.vocab_size=300", "base.hidden_size=32", "base.intermediate_size=48", "base.num_hidden_layers=2",
        "base.num_attention_heads=4", "base.num_key_value_heads=4", "base.head_dim=8", "base.precision=fp32",
        f"output_dir={tmp_path}/runs",
    )  # fmt: skip
    chosen = [part for setting in settings for part in ("--set", setting)]
    out = tmp_path / "base"
    assert cli("base", project, "--output", out, *chosen).status == 0
    config = json.loads((out / "config.json").read_text())
    assert config["hidden_act"] == "relu2"
    assert config["ternary"]["activation_bits"] == 4
    assert config["ternary"]["int4_sites"] == "inputs"
    report = tmp_path / "zeros.json"
    done = cli("eval", project, out, "--perplexity", "--sparsity", *chosen, "--json", report)
    assert done.status == 0, done.stderr
    found = json.loads(report.read_text())
    assert found["zeros_o_proj"] == pytest.approx(0.5, abs=0.01)
    assert 0 < found["zeros_q_proj"] < 0.5 < found["zeros_down_proj"] < 1
