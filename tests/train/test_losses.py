"""Losses against float64 references: plain loops for the relations, scipy for the divergences, gradcheck
for every gradient, and sums that do not depend on how a batch is split.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from saved_tensors import saved_elements
from scipy.special import log_softmax, rel_entr, softmax
from torch import Tensor
from torch.nn import functional as F

from bitdistill.train import head_loss, losses
from bitdistill.train.losses import cross_entropy, logits_kd, relation_kd, shifted_labels

IGNORE_INDEX = -100  # the Hugging Face convention for labels that are not to be predicted
FORMS = ("scaled_dot", "cosine")
forms = pytest.mark.parametrize("form", FORMS)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


# --- labels and cross-entropy ---


def test_labels_shift_to_the_position_that_predicts_them():
    labels = torch.tensor([[5, 6, 7, 8], [IGNORE_INDEX, IGNORE_INDEX, 3, IGNORE_INDEX]])
    assert shifted_labels(labels).tolist() == [
        [6, 7, 8, IGNORE_INDEX],
        [IGNORE_INDEX, 3, IGNORE_INDEX, IGNORE_INDEX],
    ]


def test_cross_entropy_is_the_sum_that_torch_gives_on_whole_logits():
    hidden, labels = normal(700, 6, dtype=torch.float32), torch.arange(700) % 11
    head = torch.nn.Linear(6, 11)
    whole = F.cross_entropy(head(hidden), labels, reduction="sum")
    torch.testing.assert_close(cross_entropy(hidden, head, labels), whole)


def test_cross_entropy_follows_the_float64_reference():
    hidden, labels = normal(300, 6), torch.arange(300) % 11
    head = torch.nn.Linear(6, 11).double()
    logits = hidden.numpy() @ head.weight.detach().numpy().T + head.bias.detach().numpy()
    expected = -log_softmax(logits, axis=-1)[np.arange(300), labels.numpy()].sum()
    assert cross_entropy(hidden, head, labels).item() == pytest.approx(expected, rel=1e-12)


def test_cross_entropy_of_equal_logits_is_log_vocabulary_per_token():
    head = torch.nn.Linear(6, 11).double()
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.constant_(head.bias, 3.0)
    loss = cross_entropy(normal(5, 6), head, torch.arange(5))
    assert loss.item() == pytest.approx(5 * math.log(11), rel=1e-12)


def test_cross_entropy_skips_ignored_labels():
    hidden, labels = normal(20, 6), torch.arange(20) % 11
    head = torch.nn.Linear(6, 11).double()
    some = labels.clone()
    some[::3] = IGNORE_INDEX
    chosen = some != IGNORE_INDEX
    expected = cross_entropy(hidden[chosen], head, labels[chosen])
    torch.testing.assert_close(cross_entropy(hidden, head, some), expected)


def test_cross_entropy_never_makes_the_logits_of_more_than_a_block():
    sizes = []

    def head(hidden: Tensor) -> Tensor:
        sizes.append(len(hidden))
        return hidden

    tokens = head_loss.BLOCK_TOKENS * 2 + 3
    cross_entropy(normal(tokens, 4), head, torch.zeros(tokens, dtype=torch.int64))
    assert sizes == [head_loss.BLOCK_TOKENS, head_loss.BLOCK_TOKENS, 3]


def test_cross_entropy_of_no_tokens_is_zero_and_has_a_gradient():
    hidden = torch.zeros(0, 6, requires_grad=True)
    head = torch.nn.Linear(6, 11)
    loss = cross_entropy(hidden, head, torch.zeros(0, dtype=torch.int64))
    assert loss.item() == 0.0
    loss.backward()
    assert not head.weight.grad.any()


def test_cross_entropy_of_bf16_is_summed_in_fp32():
    hidden, labels = normal(600, 6, dtype=torch.bfloat16), torch.arange(600) % 11
    head = torch.nn.Linear(6, 11).bfloat16()
    loss = cross_entropy(hidden, head, labels)
    logits = head(hidden).detach().double().numpy()
    expected = -log_softmax(logits, axis=-1)[np.arange(600), labels.numpy()].sum()
    assert loss.dtype == torch.float32
    # A bf16 sum near 1500 would be off by up to 4.
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_cross_entropy_gradient_passes_gradcheck(monkeypatch):
    monkeypatch.setattr(head_loss, "BLOCK_TOKENS", 3)
    labels = torch.arange(7) % 5

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return cross_entropy(hidden, lambda h: h @ weight.T, labels)  # type: ignore[arg-type]

    leaves = (normal(7, 4).requires_grad_(), normal(5, 4, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(loss, leaves)


# --- logits KD ---


@pytest.mark.parametrize("temperature", [0.5, 1.0, 5.0])
def test_logits_kd_is_the_divergence_of_student_from_teacher(temperature):
    student, teacher = normal(9, 13) * 3, normal(9, 13, seed=1) * 3
    p = softmax(teacher.numpy() / temperature, axis=-1)
    q = softmax(student.numpy() / temperature, axis=-1)
    expected = rel_entr(p, q).sum()
    loss = logits_kd(student, teacher, temperature=temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    # The other direction is another number, so the order of arguments is tested too.
    assert rel_entr(q, p).sum() != pytest.approx(expected, rel=1e-2)


def test_logits_kd_of_equal_distributions_is_zero():
    logits = normal(9, 13)
    assert logits_kd(logits, logits.clone(), temperature=5.0).item() == 0.0
    # Softmax does not see a constant added to a token's logits.
    assert logits_kd(logits + 7.0, logits, temperature=5.0).item() == pytest.approx(0.0, abs=1e-12)


def test_logits_kd_has_no_temperature_squared():
    # For small logits KL ~ variance of the difference / (2 tau^2): doubling tau divides it by four.
    student, teacher = normal(9, 13) * 1e-3, normal(9, 13, seed=1) * 1e-3
    cold = logits_kd(student, teacher, temperature=1.0).item()
    assert logits_kd(student, teacher, temperature=2.0).item() == pytest.approx(cold / 4, rel=1e-2)


def test_logits_kd_of_bf16_is_computed_in_fp32():
    student, teacher = (normal(50, 300, seed=s, dtype=torch.bfloat16) for s in (0, 1))
    loss = logits_kd(student, teacher, temperature=5.0)
    expected = logits_kd(student.double(), teacher.double(), temperature=5.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_logits_kd_gradient_passes_gradcheck():
    teacher = normal(4, 6, seed=1)
    assert torch.autograd.gradcheck(
        lambda s: logits_kd(s, teacher, temperature=2.0), normal(4, 6).requires_grad_()
    )


# --- relation KD ---


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


# --- accumulation: the sum over a batch is the sum of the sums over its parts ---

SPLITS = pytest.mark.parametrize("sizes", [[4], [1, 3], [2, 2], [1, 1, 1, 1]])


def assert_splits_add_up(whole: Tensor, parts: list[Tensor], leaves: list[Tensor]) -> None:
    gradients = torch.autograd.grad(whole, leaves, retain_graph=True)
    total = torch.stack(parts).sum()
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-12)
    for gradient, expected in zip(torch.autograd.grad(total, leaves), gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
        assert expected.any()


@SPLITS
def test_cross_entropy_adds_up_over_micro_batches(sizes):
    hidden, weight = normal(4, 5, 6).requires_grad_(), normal(11, 6, seed=1).requires_grad_()
    labels = torch.arange(20).reshape(4, 5) % 11
    labels[1, 2:] = IGNORE_INDEX

    def loss(h: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(h.flatten(0, 1), lambda x: x @ weight.T, y.flatten())  # type: ignore[arg-type]

    parts = [loss(h, y) for h, y in zip(hidden.split(sizes), labels.split(sizes), strict=True)]
    assert_splits_add_up(loss(hidden, labels), parts, [hidden, weight])


@SPLITS
def test_logits_kd_adds_up_over_micro_batches(sizes):
    student, teacher = normal(4, 13).requires_grad_(), normal(4, 13, seed=1)
    parts = [
        logits_kd(s, t, temperature=5.0)
        for s, t in zip(student.split(sizes), teacher.split(sizes), strict=True)
    ]
    assert_splits_add_up(logits_kd(student, teacher, temperature=5.0), parts, [student])


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
