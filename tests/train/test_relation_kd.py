"""The attention-relation loss against plain loops in float64, with gradcheck for its gradient."""

import itertools

import numpy as np
import pytest
import torch
from parts import SPLITS, assert_splits_add_up, normal
from saved_tensors import saved_elements
from scipy.special import rel_entr, softmax
from torch import Tensor
from torch.nn import functional as F

from bitdistill.train import losses
from bitdistill.train.losses import relation_kd

IGNORE_INDEX = -100  # the Hugging Face convention for labels that are not to be predicted
FORMS = ("scaled_dot", "cosine")
forms = pytest.mark.parametrize("form", FORMS)


def qkv(
    batch: int, tokens: int, *, heads: int, kv_heads: int, width: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Random Q, K, V states ``[B, heads, T, E]`` of one layer."""
    return tuple(  # type: ignore[return-value]
        normal(batch, count, tokens, width, seed=10 * seed + index)
        for index, count in enumerate((heads, kv_heads, kv_heads))
    )


def small_qkv(batch: int = 2, tokens: int = 5) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Student and teacher whose widths and head counts differ; four relation heads divide all."""
    student = qkv(batch, tokens, heads=4, kv_heads=2, width=6, seed=1)
    teacher = qkv(batch, tokens, heads=6, kv_heads=3, width=8, seed=2)
    return student, teacher


def relation_head(state: np.ndarray, row: int, head: int, heads: int, token: int) -> np.ndarray:
    """The features of one token in one relation head: all heads in line, cut into ``heads`` pieces."""
    line = np.concatenate([state[row, own, token] for own in range(state.shape[1])])
    return np.split(line, heads or state.shape[1])[head]


def reference_relation_kd(
    student: tuple[Tensor, ...],
    teacher: tuple[Tensor, ...],
    *,
    heads: int,
    form: str,
    temperature: float = 1.0,
    query_mask_BT: Tensor | None = None,
    key_mask_BT: Tensor | None = None,
    causal: bool = False,
) -> float:
    """The definition, one pair of tokens at a time."""

    def relation(state: np.ndarray, row: int, head: int, query: int, keys: list[int]) -> np.ndarray:
        scores = []
        a = relation_head(state, row, head, heads, query)
        for key in keys:
            b = relation_head(state, row, head, heads, key)
            if form == "cosine":
                scores.append(a @ b / (np.sqrt(a @ a) * np.sqrt(b @ b)))
            else:
                scores.append(a @ b / np.sqrt(len(a)))
        return softmax(np.array(scores) / temperature)

    total = 0.0
    for state_s, state_t in zip(student, teacher, strict=True):
        array_s, array_t = state_s.detach().double().numpy(), state_t.detach().double().numpy()
        batch, own_heads, tokens, _ = array_s.shape
        for row, query in itertools.product(range(batch), range(tokens)):
            if query_mask_BT is not None and not query_mask_BT[row, query]:
                continue
            keys = [
                key
                for key in range(tokens)
                if key == query
                or ((key_mask_BT is None or bool(key_mask_BT[row, key])) and (not causal or key <= query))
            ]
            divergences = [
                rel_entr(
                    relation(array_t, row, head, query, keys), relation(array_s, row, head, query, keys)
                ).sum()
                for head in range(heads or own_heads)
            ]
            total += float(np.mean(divergences))
    return total


QUERY_MASK = torch.tensor([[False, True, True, False, True], [True, True, False, False, False]])
KEY_MASK = torch.tensor([[True, True, True, True, False], [True, True, False, False, False]])
MASKS = {
    "none": {},
    "queries": {"query_mask_BT": QUERY_MASK},
    "keys": {"key_mask_BT": KEY_MASK},
    "causal": {"causal": True},
    "all": {"query_mask_BT": QUERY_MASK, "key_mask_BT": KEY_MASK, "causal": True},
}
masks = pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS.keys())


@forms
@masks
def test_relation_kd_follows_the_loop_reference(form, masks):
    student, teacher = small_qkv()
    options = {"heads": 4, "form": form, "temperature": 0.7, **masks}
    expected = reference_relation_kd(student, teacher, **options)
    assert relation_kd(student, teacher, **options).item() == pytest.approx(expected, rel=1e-10)


# Of 4 sequences with 4 heads and 5 x 5 relations each.
BLOCKS = {
    "1 sequence": 1 * 4 * 5 * 5,
    "3 sequences": 3 * 4 * 5 * 5,
    "3 heads": 3 * 5 * 5,
    "1 head": 5 * 5,
    "2 rows": 2 * 5 + 4,
    "1 row": 1,
}
blocks = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS.keys())


@forms
@masks
@blocks
def test_relation_kd_in_blocks_is_that_of_the_whole_batch(form, masks, block, monkeypatch):
    student, teacher = small_qkv(batch=4)
    student = tuple(state.requires_grad_() for state in student)
    # Four sequences with masks of their own, so that a block taking another's would show.
    masks = {
        name: torch.cat([mask, mask.flip(0, 1)]) if name != "causal" else mask for name, mask in masks.items()
    }
    options = {"heads": 4, "form": form, **masks}
    whole = relation_kd(student, teacher, **options)
    monkeypatch.setattr(losses, "BLOCK_RELATIONS", block)
    in_blocks = relation_kd(student, teacher, **options)
    assert in_blocks.item() == pytest.approx(reference_relation_kd(student, teacher, **options), rel=1e-10)
    for gradient, expected in zip(
        torch.autograd.grad(in_blocks, student), torch.autograd.grad(whole, student), strict=True
    ):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("block", "shapes"),
    [
        (2 * 4 * 5 * 5, [(2, 4, 5, 5), (2, 4, 5, 5), (1, 4, 5, 5)]),
        (3 * 5 * 5, [(1, 3, 5, 5), (1, 1, 5, 5)] * 5),
        (2 * 5, [(1, 1, 2, 5), (1, 1, 2, 5), (1, 1, 1, 5)] * 4 * 5),
    ],
)
def test_relations_of_at_most_a_block_exist_at_a_time(block, shapes, monkeypatch):
    student, teacher = small_qkv(batch=5)
    student = tuple(state.requires_grad_() for state in student)
    found = []
    log_softmax = F.log_softmax

    def watched(scores: Tensor, dim: int) -> Tensor:
        found.append(tuple(scores.shape))
        return log_softmax(scores, dim=dim)

    monkeypatch.setattr(losses, "BLOCK_RELATIONS", block)
    monkeypatch.setattr(F, "log_softmax", watched)
    loss = relation_kd(student, teacher, heads=4, form="cosine", causal=True)
    # Of Q, K and V, of student and teacher; and once more in the backward pass.
    expected = [shape for shape in shapes * 3 for _ in range(2)]
    assert found == expected
    loss.backward()
    assert sorted(found) == sorted(expected * 2)


def test_no_relations_are_saved_for_the_backward_pass(monkeypatch):
    tokens = 64
    student, teacher = (normal(1, 2, tokens, 4, seed=s) for s in (0, 1))
    student.requires_grad_()
    monkeypatch.setattr(losses, "BLOCK_RELATIONS", 8 * tokens)
    keys = torch.ones(1, tokens, dtype=torch.bool)

    def in_blocks() -> Tensor:
        return relation_kd(
            (student,) * 3, (teacher,) * 3, heads=0, form="scaled_dot", key_mask_BT=keys, causal=True
        )

    def whole() -> Tensor:
        everything = slice(0, tokens)
        return losses._relation_kl(student, teacher, everything, "scaled_dot", 1.0, None, keys, True)

    in_all, largest = saved_elements(whole)
    assert in_all > 3 * largest >= 6 * tokens * tokens
    in_all, _ = saved_elements(in_blocks)
    assert in_all <= student.numel() + teacher.numel() + tokens


@forms
@pytest.mark.parametrize("heads", [1, 2, 3, 6, 12])
def test_relation_heads_cut_the_concatenated_heads_in_order(form, heads):
    student = qkv(1, 4, heads=4, kv_heads=2, width=6, seed=1)
    teacher = qkv(1, 4, heads=6, kv_heads=3, width=8, seed=2)
    expected = reference_relation_kd(student, teacher, heads=heads, form=form)
    actual = relation_kd(student, teacher, heads=heads, form=form)
    assert actual.item() == pytest.approx(expected, rel=1e-10)


@forms
def test_zero_relation_heads_keep_each_states_own(form):
    student = qkv(2, 4, heads=4, kv_heads=2, width=6, seed=1)
    teacher = qkv(2, 4, heads=4, kv_heads=2, width=10, seed=2)
    expected = reference_relation_kd(student, teacher, heads=0, form=form)
    assert relation_kd(student, teacher, heads=0, form=form).item() == pytest.approx(expected, rel=1e-10)


@forms
@masks
def test_relation_kd_of_equal_states_is_zero(form, masks):
    student, _ = small_qkv()
    loss = relation_kd(student, tuple(s.clone() for s in student), heads=4, form=form, **masks)
    assert loss.item() == pytest.approx(0.0, abs=1e-12)


def test_forms_differ_and_only_cosine_ignores_the_length_of_states():
    student, teacher = small_qkv()
    longer = tuple(state * 3 for state in student)
    value = {form: relation_kd(student, teacher, heads=4, form=form).item() for form in FORMS}
    value_longer = {form: relation_kd(longer, teacher, heads=4, form=form).item() for form in FORMS}
    assert value["cosine"] != pytest.approx(value["scaled_dot"], rel=0.1)
    assert value_longer["cosine"] == pytest.approx(value["cosine"], rel=1e-10)
    assert value_longer["scaled_dot"] != pytest.approx(value["scaled_dot"], rel=0.1)


@forms
def test_relation_kd_does_not_grow_with_the_number_of_equal_heads(form):
    student = qkv(2, 4, heads=1, kv_heads=1, width=6, seed=1)
    teacher = qkv(2, 4, heads=1, kv_heads=1, width=6, seed=2)
    one = relation_kd(student, teacher, heads=0, form=form)
    repeated = [tuple(state.repeat(1, 5, 1, 1) for state in states) for states in (student, teacher)]
    torch.testing.assert_close(relation_kd(*repeated, heads=0, form=form), one)


@forms
def test_a_row_always_relates_to_itself(form):
    student, teacher = small_qkv()
    student = tuple(state.requires_grad_() for state in student)
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    # With no other key left, both relations are 1 on the row itself and there is nothing to learn.
    loss = relation_kd(student, teacher, heads=4, form=form, key_mask_BT=nothing)
    assert loss.item() == 0.0
    for gradient in torch.autograd.grad(loss, student):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@forms
def test_the_first_row_of_a_causal_relation_teaches_nothing(form):
    student, teacher = small_qkv()
    first = torch.zeros(2, 5, dtype=torch.bool)
    first[:, 0] = True
    options = {"heads": 4, "form": form, "query_mask_BT": first}
    assert relation_kd(student, teacher, causal=True, **options).item() == 0.0
    assert relation_kd(student, teacher, **options).item() > 0.0


@forms
@pytest.mark.parametrize("causal", [False, True])
def test_padding_changes_neither_the_loss_nor_gets_a_gradient(form, causal):
    student, teacher = small_qkv()
    real = torch.tensor([[True] * 5, [True, True, True, False, False]])
    options = {
        "heads": 4,
        "form": form,
        "query_mask_BT": real,
        "key_mask_BT": real,
        "causal": causal,
    }
    loss = relation_kd(student, teacher, **options)
    other_s, other_t = (tuple(state.clone() for state in states) for states in (student, teacher))
    for state in other_s + other_t:
        state[1, :, 3:] = normal(2, state.shape[3], seed=9) * 50
    other_s = tuple(state.requires_grad_() for state in other_s)
    loss_other = relation_kd(other_s, other_t, **options)
    torch.testing.assert_close(loss_other, loss, rtol=1e-12, atol=0)
    for gradient in torch.autograd.grad(loss_other, other_s):
        assert not gradient[1, :, 3:].any()
        assert gradient[1, :, :3].any()
    # Without the masks the padding does count, so the equality above is the masks' doing.
    unmasked = {"heads": 4, "form": form, "causal": causal}
    assert relation_kd(other_s, other_t, **unmasked).item() != pytest.approx(
        relation_kd(student, teacher, **unmasked).item(), rel=1e-3
    )


@forms
def test_a_padded_sequence_has_the_loss_of_the_short_one(form):
    student, teacher = small_qkv()
    options = {"heads": 4, "form": form, "causal": True}
    short = relation_kd(
        tuple(state[:, :, :3] for state in student),
        tuple(state[:, :, :3] for state in teacher),
        **options,
    )
    real = torch.tensor([[True, True, True, False, False]] * 2)
    padded = relation_kd(student, teacher, query_mask_BT=real, key_mask_BT=real, **options)
    torch.testing.assert_close(padded, short)


@forms
@pytest.mark.parametrize("temperature", [0.01, 0.25, 1.0])
def test_masked_columns_stay_finite_at_low_temperature(form, temperature):
    student, teacher = small_qkv()
    student = tuple(state.float().requires_grad_() for state in student)
    teacher = tuple(state.float() for state in teacher)
    options = {"heads": 4, "form": form, "temperature": temperature, **MASKS["all"]}
    loss = relation_kd(student, teacher, **options)
    expected = reference_relation_kd(student, teacher, **options)
    assert loss.item() == pytest.approx(expected, rel=1e-3)
    for gradient in torch.autograd.grad(loss, student):
        assert torch.isfinite(gradient).all()


def test_silent_states_have_a_finite_cosine_gradient():
    student, teacher = small_qkv()
    student = tuple(torch.zeros_like(state).requires_grad_() for state in student)
    loss = relation_kd(student, teacher, heads=4, form="cosine")
    for gradient in torch.autograd.grad(loss, student):
        assert torch.isfinite(gradient).all()


@forms
def test_relation_kd_of_bf16_states_is_computed_in_fp32(form):
    student, teacher = (tuple(state.bfloat16() for state in states) for states in small_qkv())
    loss = relation_kd(student, teacher, heads=4, form=form)
    assert loss.dtype == torch.float32
    expected = reference_relation_kd(
        tuple(state.float() for state in student),
        tuple(state.float() for state in teacher),
        heads=4,
        form=form,
    )
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@forms
@masks
def test_relation_kd_gradient_passes_gradcheck(form, masks):
    # Relation heads of width 4 and 2: a cosine of width 1 would be a sign, without a gradient.
    student = qkv(2, 5, heads=2, kv_heads=1, width=4, seed=1)
    teacher = qkv(2, 5, heads=1, kv_heads=2, width=6, seed=2)
    leaves = tuple(state.requires_grad_() for state in student)

    def loss(*states: Tensor) -> Tensor:
        return relation_kd(states, teacher, heads=2, form=form, temperature=0.7, **masks)

    assert torch.autograd.gradcheck(loss, leaves)


def test_heads_that_do_not_divide_a_width_are_named():
    student, teacher = small_qkv()
    with pytest.raises(
        ValueError, match=r"width 24 do not split into 5 relation heads: set distill\.relation_heads"
    ):
        relation_kd(student, teacher, heads=5, form="cosine")


def test_own_heads_that_differ_between_models_are_named():
    student, teacher = small_qkv()
    with pytest.raises(
        ValueError, match=r"student and teacher have 4 and 6 heads here: set distill\.relation_heads"
    ):
        relation_kd(student, teacher, heads=0, form="cosine")


@forms
@SPLITS
def test_relation_kd_adds_up_over_micro_batches(form, sizes):
    student, teacher = small_qkv(batch=4)
    student = tuple(state.requires_grad_() for state in student)
    keys = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] * 4 + [False], [True] * 5])
    options = {"heads": 4, "form": form, "causal": True}
    whole = relation_kd(student, teacher, key_mask_BT=keys, query_mask_BT=keys, **options)
    parts, start = [], 0
    for size in sizes:
        rows = slice(start, start + size)
        start += size
        parts.append(
            relation_kd(
                tuple(state[rows] for state in student),
                tuple(state[rows] for state in teacher),
                key_mask_BT=keys[rows],
                query_mask_BT=keys[rows],
                **options,
            )
        )
    assert_splits_add_up(whole, parts, list(student))


def test_relation_kd_is_not_rounded_by_autocast():
    """Late in training the relations hardly differ: bf16 products would turn the gradient elsewhere."""
    student = normal(2, 4, 24, 16, dtype=torch.float32).requires_grad_()
    teacher = student.detach() + 0.02 * normal(2, 4, 24, 16, seed=1, dtype=torch.float32)

    def value_and_gradient(state, other):
        loss = losses.relation_kd((state,) * 3, (other,) * 3, heads=0, form="cosine")
        return loss, torch.autograd.grad(loss, state)[0]

    exact, exact_gradient = value_and_gradient(student.detach().double().requires_grad_(), teacher.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, gradient = value_and_gradient(student, teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-3, atol=0)
    assert torch.cosine_similarity(gradient.double().flatten(), exact_gradient.flatten(), dim=0) > 0.9999
