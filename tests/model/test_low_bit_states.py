"""Low-bit queries, keys and values: codes against float64 numpy, models against Hugging Face's attention on states that
numpy quantised, and one answer whether states come from a cache, behind padding or in one pass.
"""

import json
import sys

import numpy as np
import pytest
import torch
from tiny_families import families, small_model, small_student
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from bitdistill.errors import SurgeryError
from bitdistill.model import TernarySpec, quantize_states
from bitdistill.model.quant import fake_quantize_state, quantize_state
from bitdistill.train.surgery import refine
from bitdistill.train.taps import capture

LOW = {"query_bits": 4, "kv_bits": 3}


def reference_codes(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and steps by the definition, head by head in float64."""
    rows = x.reshape(-1, x.shape[-1]).astype(np.float64)
    codes, steps = np.empty_like(rows), np.empty(len(rows))
    for i, row in enumerate(rows):
        largest = np.abs(row).max()
        steps[i] = largest / (2 ** (bits - 1) - 1) if largest > 0 else 1.0
        codes[i] = np.clip(np.rint(row / steps[i]) + 2 ** (bits - 1), 0, 2**bits - 1)
    return codes.reshape(x.shape), steps.reshape(*x.shape[:-1], 1)


def reference_states(x: torch.Tensor, bits: int, starts: torch.Tensor | None = None) -> torch.Tensor:
    """What states ``[B, H, S, E]`` stand for, of fp32 arithmetic; first tokens, by index of the row, at 8 bits."""
    result = _stand_for(x, bits)
    if starts is not None:
        fine = _stand_for(x, 8)
        for row, start in enumerate(starts.tolist()):
            result[row, :, start] = fine[row, :, start]
    return torch.from_numpy(result).to(x.dtype)


def _stand_for(x: torch.Tensor, bits: int) -> np.ndarray:
    codes, steps = reference_codes(x.float().numpy(), bits)
    return (codes - 2 ** (bits - 1)).astype(np.float32) * steps.astype(np.float32)


# --- the quantiser ---


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_codes_and_steps_are_those_of_the_definition(bits):
    x = torch.randn(3, 2, 5, 64)
    code, step = quantize_state(x, bits)
    expected, steps = reference_codes(x.numpy(), bits)
    np.testing.assert_array_equal(code.numpy(), expected)
    np.testing.assert_allclose(step.numpy(), steps, rtol=1e-6)
    assert code.min() == 1 and code.max() == 2**bits - 1


def test_ties_fall_to_even_and_zero_stays_zero():
    x = torch.tensor([[7.0, 0.5, 1.5, -0.5, -2.5, 0.0], [0.0] * 6])
    code, step = quantize_state(x, 4)
    assert code.tolist() == [[15, 8, 10, 8, 6, 8], [8] * 6]
    assert step.flatten().tolist() == [1, 1]
    assert torch.equal(fake_quantize_state(torch.zeros(2, 4), 3), torch.zeros(2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_straight_through_and_the_dtype_kept(dtype):
    x = torch.randn(2, 8, dtype=dtype, requires_grad=True)
    out = fake_quantize_state(x, 4)
    weights = torch.randn(2, 8, dtype=dtype)
    (out * weights).sum().backward()
    assert out.dtype == dtype and not torch.equal(out, x)
    assert torch.equal(x.grad, weights)


# --- the model ---


def sequences(padding: int) -> dict[str, torch.Tensor]:
    """Two sequences, the first behind padding."""
    input_ids = torch.randint(2, 300, (2, 9))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :padding] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@pytest.fixture
def batch():
    """See ``sequences``."""
    return sequences(4)


# Hugging Face's eager attention in float64 makes NaN of a token that sees nothing, as padding does.
attentions = pytest.mark.parametrize(("attention", "padding"), [("sdpa", 4), ("eager", 0)])


@families
@attentions
def test_logits_are_those_of_attention_on_the_states_of_numpy(family, attention, padding):
    batch = sequences(padding)
    real = batch["attention_mask"].bool()
    starts = batch["attention_mask"].argmax(dim=1)

    def attend(module, query, key, value, *args, **kwargs):
        query = reference_states(query, LOW["query_bits"])
        key, value = (reference_states(states, LOW["kv_bits"], starts) for states in (key, value))
        own = sys.modules[type(module).__module__].eager_attention_forward
        dispatched = own if attention == "eager" else sdpa_attention_forward
        return dispatched(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("test_numpy_states", attend)
    AttentionMaskInterface.register("test_numpy_states", eager_mask if attention == "eager" else sdpa_mask)
    plain = small_student(family).double()
    plain.set_attn_implementation(attention)
    low = small_student(family, LOW).double()
    low.set_attn_implementation(attention)
    with torch.no_grad():
        unquantised = plain(**batch).logits[real]
        plain.set_attn_implementation("test_numpy_states")
        expected, found = plain(**batch).logits[real], low(**batch).logits[real]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - unquantised).abs().max() > 1e-2


@families
@attentions
@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_scores_as_one_pass_does(family, attention, padding, cache):
    model = small_student(family, LOW).double()
    model.set_attn_implementation(attention)
    batch = sequences(padding)
    length = batch["input_ids"].shape[1]
    with torch.inference_mode():
        out = model.generate(
            **batch,
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            cache_implementation=cache,
            output_logits=True,
            return_dict_in_generate=True,
        )
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 8, dtype=torch.int64)], dim=1)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        whole = model(out.sequences, attention_mask=mask, position_ids=positions, use_cache=False).logits
        alone = model(out.sequences[:1, padding:], use_cache=False).logits
    stepwise = torch.stack(out.logits, dim=1)  # fp32, as generate hands them out
    torch.testing.assert_close(stepwise, whole[:, length - 1 : -1].float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole[:1, padding:], alone, rtol=1e-5, atol=1e-5)


def test_the_start_of_every_packed_sequence_has_8_bits(batch):
    model = small_student("qwen3", {"kv_bits": 3})
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    ids = batch["input_ids"][1:]
    with torch.no_grad(), capture(model, (0,), "post_rope") as captured:
        model(ids, position_ids=positions, use_cache=False)
    levels = [len(captured[0][2][0, 0, i].unique()) for i in range(9)]
    assert [i for i, found in enumerate(levels) if found > 7] == [0, 4]


@families
def test_captured_states_are_the_quantised_ones(family, batch):
    states = {}
    for name, ternary in (("plain", {}), ("low", LOW)):
        model = small_student(family, ternary)
        with torch.no_grad(), capture(model, (0,), "post_rope") as captured:
            model(**batch)
        states[name] = captured[0]
    starts = batch["attention_mask"].argmax(dim=1)
    query, key, value = states["plain"]
    for found, expected in zip(
        states["low"],
        (reference_states(query, 4), reference_states(key, 3, starts), reference_states(value, 3, starts)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@families
def test_gradients_pass_and_are_the_same_with_layers_computed_again(family, batch):
    found = {}
    for again in (False, True):
        model = small_student(family, LOW)
        if again:
            model.gradient_checkpointing_enable()
        model.train()
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        found[again] = {n: p.grad for n, p in model.named_parameters() if n.endswith("k_proj.weight")}
    for name, gradient in found[False].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found[True][name], gradient, rtol=1e-5, atol=1e-7)


def test_bits_change_and_end_at_16(batch):
    plain, model = small_model("llama"), small_model("llama")
    with torch.no_grad():
        expected = plain(**batch).logits
        quantize_states(model, 16, 4)
        coarse = (model(**batch).logits - expected).abs().max()
        quantize_states(model, 8, 8)
        fine = (model(**batch).logits - expected).abs().max()
        quantize_states(model, 16, 16)
        assert torch.equal(model(**batch).logits, expected)
    assert coarse > 2 * fine > 0


# --- checkpoints, refusals ---


def test_students_without_low_bits_record_nothing_new():
    assert not {"query_bits", "kv_bits"} & TernarySpec().to_dict().keys()


@pytest.mark.parametrize("bits", [{"kv_bits": 5}, {"query_bits": 3}])
def test_bits_without_a_definition_are_refused(bits):
    with pytest.raises(ValueError, match=next(iter(bits))):
        TernarySpec(**bits)


def test_an_encoder_is_refused(bert):
    from bitdistill.train.loading import load_model

    with pytest.raises(SurgeryError, match="no causal attention"):
        refine(load_model(bert), TernarySpec(kv_bits=4))


def test_an_attention_function_that_was_not_tried_is_refused(batch):
    model = small_student("llama", LOW)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"flash_attention_2.*sdpa, eager"):
        model(**batch)


# --- the command line ---


def test_trained_bits_and_bits_given_to_eval_are_the_same(cli, project, llama, student, tmp_path):
    low = tmp_path / "low"
    bits = ("--set", "refine.kv_bits=3", "--set", "refine.query_bits=4")
    assert cli("refine", project, "--source", llama, "--output", low, *bits).status == 0

    def perplexity(model, *options):
        done = cli("eval", project, model, "--perplexity", *options, "--json", tmp_path / "found.json")
        assert done.status == 0, done.err
        return json.loads((tmp_path / "found.json").read_text())["perplexity"]

    plain = perplexity(student)
    assert perplexity(low) == perplexity(student, "--query-bits", "4", "--kv-bits", "3") != plain
    assert perplexity(low, "--query-bits", "16", "--kv-bits", "16") == plain
    assert cli("export", low, tmp_path / "packed", "--head", "f32").status == 0
    in_engine = perplexity(tmp_path / "packed", "--engine", "--kv-cache", "fp32")
    assert in_engine == pytest.approx(perplexity(low), rel=5e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--kv-bits", "5"), "kv_bits = 5: use one of 16, 8, 4, 3"),
        (("--kv-bits", "4", "--engine"), "leave out --engine"),
        (("--sparsity",), "give it with --perplexity"),
    ],
)
def test_options_of_eval_that_mean_nothing_are_refused(cli, project, student, options, words):
    done = cli("eval", project, student, *options)
    assert done.status == 1
    assert words in done.err
