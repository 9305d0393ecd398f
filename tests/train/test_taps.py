"""Taps: the recorded states are those that Hugging Face's modules compute, and recording changes nothing."""

import pytest
import torch
from hf_reference import projected_states, rotated_states
from tiny_families import families

from bitdistill.model import TernarySpec
from bitdistill.train.surgery import refine
from bitdistill.train.taps import attention_layers, capture, matched_layers

REFERENCES = {"pre_rope": projected_states, "post_rope": rotated_states}


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two sequences, the second padded."""
    input_ids = torch.randint(2, 300, (2, 9))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 5:] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@pytest.fixture(params=["dense", "ternary"])
def model(request, family, make_model):
    dense = make_model(family)
    return dense if request.param == "dense" else refine(dense, TernarySpec())[0]


@families
@pytest.mark.parametrize("states", ["pre_rope", "post_rope"])
def test_states_equal_those_of_the_hugging_face_modules(model, family, states, batch):
    expected = {layer: REFERENCES[states](model, layer, **batch) for layer in (0, 1)}
    with torch.no_grad(), capture(model, (0, 1), states) as captured:
        model(**batch)
    assert set(captured) == {0, 1}
    for layer in (0, 1):
        shapes = [tuple(state.shape) for state in captured[layer]]
        assert shapes == [(2, 4, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8)]
        for state, reference in zip(captured[layer], expected[layer], strict=True):
            torch.testing.assert_close(state, reference, rtol=1e-5, atol=1e-5)


@families
def test_the_two_kinds_of_states_differ_in_queries_and_keys_only(model, family, batch):
    kinds = {}
    for states in ("pre_rope", "post_rope"):
        with torch.no_grad(), capture(model, (0,), states) as captured:
            model(**batch)
        kinds[states] = captured[0]
    differs = [not torch.equal(a, b) for a, b in zip(kinds["pre_rope"], kinds["post_rope"], strict=True)]
    assert differs == [True, True, False]


@families
@pytest.mark.parametrize("states", ["pre_rope", "post_rope"])
def test_capturing_changes_no_logit(model, family, states, batch):
    with torch.no_grad():
        before = model(**batch).logits
        with capture(model, (0, 1), states):
            during = model(**batch).logits
        after = model(**batch).logits
    assert torch.equal(during, before)
    assert torch.equal(after, before)


@families
@pytest.mark.parametrize("states", ["pre_rope", "post_rope"])
def test_only_the_wanted_layers_are_recorded_and_only_inside_the_context(model, family, states, batch):
    with torch.no_grad(), capture(model, (1,), states) as captured:
        model(**batch)
    assert set(captured) == {1}
    recorded = captured[1]
    with torch.no_grad():
        model(input_ids=batch["input_ids"][:, :3])
    assert captured[1] is recorded
    assert recorded[0].shape[2] == 9


@families
def test_taps_are_removed_after_an_error(model, family, batch):
    for states in ("pre_rope", "post_rope"):
        with pytest.raises(ZeroDivisionError), capture(model, (0,), states):
            raise ZeroDivisionError
        for module in model.modules():
            assert not hasattr(module, "relation_sink")
            assert not module._forward_hooks


@families
@pytest.mark.parametrize("states", ["pre_rope", "post_rope"])
def test_gradients_flow_through_the_states(model, family, states, batch):
    """To the projections of the layer and to everything below it, but not above."""
    with capture(model, (0,), states) as captured:
        model(**batch)
    sum(state.square().sum() for state in captured[0]).backward()
    below = model.model.layers[0].self_attn
    for projection in (below.q_proj, below.k_proj, below.v_proj):
        assert projection.weight.grad.abs().sum() > 0
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0
    assert below.o_proj.weight.grad is None
    assert model.model.layers[1].self_attn.q_proj.weight.grad is None


@families
def test_padding_is_masked_while_capturing(model, family, batch):
    """The tapped attention keeps the mask: ids under padding change no real state."""
    other = batch | {"input_ids": torch.where(batch["attention_mask"] == 0, 7, batch["input_ids"])}
    assert not torch.equal(other["input_ids"], batch["input_ids"])
    real = batch["attention_mask"].bool()
    results = []
    for inputs in (batch, other):
        with torch.no_grad(), capture(model, (1,), "post_rope") as captured:
            model(**inputs)
        results.append([state.transpose(1, 2)[real] for state in captured[1]])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


@families
def test_attention_layers_are_in_order(family, make_model):
    model = make_model(family, num_hidden_layers=3)
    assert attention_layers(model) == [layer.self_attn for layer in model.model.layers]


@pytest.mark.parametrize(
    ("depths", "layers", "teacher_layers", "pairs"),
    [
        ((4, 4), (-1,), (), [(3, 3)]),
        ((4, 4), (0, 2), (), [(0, 0), (2, 2)]),
        ((2, 6), (-1,), (), [(1, 5)]),
        ((2, 6), (0,), (), [(0, 2)]),
        ((6, 2), (0, 1, 2, 3, 4, 5), (), [(0, 0), (1, 0), (2, 0), (3, 0), (4, 1), (5, 1)]),
        ((12, 24), (-1, -2, 0), (), [(11, 23), (10, 21), (0, 1)]),
        ((4, 8), (-1,), (-2,), [(3, 6)]),
        ((4, 8), (0, -1), (5, 0), [(0, 5), (3, 0)]),
    ],
)
def test_layers_are_matched_at_the_same_relative_depth_or_as_named(depths, layers, teacher_layers, pairs):
    assert matched_layers(*depths, layers, teacher_layers) == pairs


@pytest.mark.parametrize("student_depth", range(1, 9))
@pytest.mark.parametrize("teacher_depth", range(1, 9))
def test_matched_layers_exist_keep_their_order_and_end_together(student_depth, teacher_depth):
    pairs = matched_layers(student_depth, teacher_depth, tuple(range(student_depth)), ())
    teachers = [teacher for _, teacher in pairs]
    assert teachers == sorted(teachers)
    assert all(0 <= teacher < teacher_depth for teacher in teachers)
    assert pairs[-1] == (student_depth - 1, teacher_depth - 1)
    if student_depth == teacher_depth:
        assert all(student == teacher for student, teacher in pairs)


@pytest.mark.parametrize(("layers", "teacher_layers"), [((4,), ()), ((-5,), ()), ((0,), (8,)), ((0,), (-9,))])
def test_a_layer_that_does_not_exist_is_an_error(layers, teacher_layers):
    with pytest.raises(ValueError, match="there is no layer"):
        matched_layers(4, 8, layers, teacher_layers)
