"""The head's losses in blocks against the naive form in float64: whole logits, F.cross_entropy and F.kl_div."""

import json
import weakref
from pathlib import Path

import peft
import pytest
import torch
from saved_tensors import saved_elements
from torch import Tensor, nn
from torch.nn import functional as F

from bitdistill.config import DistillConfig
from bitdistill.train import head_loss as module
from bitdistill.train.head_loss import head_loss
from bitdistill.train.losses import cross_entropy, label_loss, logits_kd
from bitdistill.train.objective import Distillation

IGNORED = -100
TOKENS, HIDDEN, VOCABULARY = 7, 4, 13  # three blocks, the last of one token
EXACT = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_TOKENS", 3)
    monkeypatch.setattr(module, "ROWS_LOGITS_CPU", 2 * VOCABULARY)  # parts of two rows and of one


class OwnLinear(nn.Linear):
    """Not a plain linear, so called as a module."""


def linear(kind: type = nn.Linear, vocabulary: int = VOCABULARY, *, bias: bool = False) -> nn.Linear:
    return kind(HIDDEN, vocabulary, bias=bias).double()


def hidden_states(tokens: int = TOKENS) -> Tensor:
    return torch.randn(tokens, HIDDEN, dtype=torch.float64).requires_grad_()


heads = pytest.mark.parametrize("kind", [nn.Linear, OwnLinear])


class Losses:
    """CE on some tokens and logits KD on others; the weights are 1 / counts and lambda tau^2 / counts."""

    def __init__(self, *, vocabulary: int = VOCABULARY, temperature: float = 2.0) -> None:
        self.labels = torch.arange(TOKENS) % VOCABULARY
        self.labels[[1, 4]] = IGNORED
        self.kd_mask = torch.tensor([True, True, False, True, False, True, True])
        self.teacher = torch.randn(TOKENS, vocabulary, dtype=torch.float64)
        self.vocabulary, self.temperature = min(vocabulary, VOCABULARY), temperature
        self.weights = torch.tensor([1 / 5, 10 * temperature**2 / 5], dtype=torch.float64)

    def __call__(self, logits: Tensor, rows: slice) -> Tensor:
        v = self.vocabulary
        kd = logits_kd(
            logits[:, :v],
            self.teacher[rows, :v],
            temperature=self.temperature,
            mask_N=self.kd_mask[rows],
        )
        return torch.stack((label_loss(logits, self.labels[rows]), kd))

    def naive(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        v, chosen = self.vocabulary, self.kd_mask
        ce = F.cross_entropy(logits, self.labels, reduction="sum")
        log_q = F.log_softmax(logits[chosen, :v] / self.temperature, dim=-1)
        p = F.softmax(self.teacher[chosen, :v] / self.temperature, dim=-1)
        sums = torch.stack((ce, F.kl_div(log_q, p, reduction="sum")))
        return (self.weights * sums).sum(), sums


def gradients(loss: Tensor, *leaves: Tensor | None) -> list[Tensor]:
    return list(
        torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None and leaf.requires_grad])
    )


# --- equal to the naive form ---


@heads
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 5.0])
@pytest.mark.parametrize("vocabulary", [VOCABULARY, VOCABULARY - 3, VOCABULARY + 3])
@pytest.mark.parametrize("upstream", [1.0, -2.5])
def test_values_and_gradients_are_those_of_whole_logits(kind, bias, temperature, vocabulary, upstream):
    hidden, head = hidden_states(), linear(kind, bias=bias)
    losses = Losses(vocabulary=vocabulary, temperature=temperature)
    expected, expected_sums = losses.naive(head(hidden))
    loss, sums = head_loss(hidden, head, losses, losses.weights)
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(sums, expected_sums, **EXACT)
    assert not sums.requires_grad
    leaves = (hidden, head.weight, head.bias)
    found = gradients(upstream * loss, *leaves)
    torch.testing.assert_close(found, gradients(upstream * expected, *leaves), **EXACT)
    assert all(gradient.any() for gradient in found)


@heads
@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "head"])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(kind, frozen):
    hidden, head, losses = hidden_states(), linear(kind, bias=True), Losses()
    {"hidden": hidden, "weight": head.weight, "bias": head.bias, "head": head}[frozen].requires_grad_(False)
    leaves = (hidden, head.weight, head.bias)
    expected = gradients(losses.naive(head(hidden))[0], *leaves)
    loss, _ = head_loss(hidden, head, losses, losses.weights)
    loss.backward()
    assert [leaf.grad is None for leaf in leaves] == [not leaf.requires_grad for leaf in leaves]
    found = [leaf.grad for leaf in leaves if leaf.grad is not None]
    torch.testing.assert_close(found, expected, **EXACT)


@heads
def test_a_head_tied_to_the_embedding_adds_its_gradient_to_the_embeddings(kind):
    ids, head, losses = torch.arange(TOKENS) % 5, linear(kind), Losses()

    def hidden() -> Tensor:
        return F.embedding(ids, head.weight).tanh()

    expected = gradients(losses.naive(head(hidden()))[0], head.weight)
    loss, _ = head_loss(hidden(), head, losses, losses.weights)
    torch.testing.assert_close(gradients(loss, head.weight), expected, **EXACT)


@heads
def test_gradients_accumulate_over_micro_batches(kind):
    head, losses, pieces = linear(kind), Losses(), [hidden_states() for _ in range(3)]
    expected = sum(gradients(losses.naive(head(hidden))[0], head.weight)[0] for hidden in pieces)
    for hidden in pieces:
        head_loss(hidden, head, losses, losses.weights)[0].backward()
    torch.testing.assert_close(head.weight.grad, expected, **EXACT)


@heads
def test_gradcheck(kind):
    hidden, head, losses = hidden_states(), linear(kind, bias=True), Losses()

    def loss(*leaves: Tensor) -> Tensor:  # the leaves are changed in place
        return head_loss(hidden, head, losses, losses.weights)[0]

    assert torch.autograd.gradcheck(loss, (hidden, head.weight, head.bias))


@pytest.mark.parametrize("target", ["adapter", "hook", "forward"])
def test_a_head_that_does_more_than_its_product_is_called(target):
    hidden, head, losses = hidden_states(), linear(), Losses()
    if target == "adapter":
        config = peft.LoraConfig(r=2, target_modules=["head"], init_lora_weights=False)
        model = peft.get_peft_model(nn.ModuleDict({"head": head}), config)
        head = model.base_model.model["head"].double()
    elif target == "hook":
        head.register_forward_hook(lambda module, inputs, output: 2 * output)
    else:
        head.forward = lambda hidden: F.linear(hidden, head.weight).tanh()
    leaves = (hidden, *head.parameters())
    expected, _ = losses.naive(head(hidden))
    loss, _ = head_loss(hidden, head, losses, losses.weights)
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(gradients(loss, *leaves), gradients(expected, *leaves), **EXACT)


@heads
def test_no_tokens_have_no_loss_and_a_gradient_of_zero(kind):
    hidden, head = hidden_states(0), linear(kind)
    loss = cross_entropy(hidden, head, torch.zeros(0, dtype=torch.int64))
    assert loss.item() == 0
    assert [gradient.any().item() for gradient in gradients(loss, hidden, head.weight)] == [False, False]


# --- the objective of stage 3 ---


@pytest.mark.parametrize("kd_tokens", ["response", "all"])
@pytest.mark.parametrize("tau_squared", [False, True])
@pytest.mark.parametrize(("student_vocabulary", "teacher_vocabulary"), [(300, 310), (310, 300)])
@pytest.mark.parametrize("tied", [False, True])
def test_distillation_is_that_of_whole_logits(
    make_model, kd_tokens, tau_squared, student_vocabulary, teacher_vocabulary, tied
):
    student = make_model("llama", vocab_size=student_vocabulary, tie_word_embeddings=tied).double()
    teacher = make_model("llama", vocab_size=teacher_vocabulary, initializer_range=0.15).double()
    config = DistillConfig(
        lambda_logits=10.0, gamma_relation=0.0, kd_tokens=kd_tokens, tau_squared=tau_squared
    )
    objective = Distillation(student, teacher, config)
    ids = torch.randint(2, 300, (3, 9))
    real = torch.ones_like(ids)
    real[0, :2] = 0  # padding on the left: its last position has a label and is no token of "all"
    labels = ids.masked_fill(real == 0, IGNORED)
    labels[1, :6] = IGNORED
    batch = {"input_ids": ids, "attention_mask": real, "labels": labels}
    totals = 2 * objective.counts(batch)  # as if another micro-batch of the step had as many

    logits_s = student(input_ids=ids, attention_mask=real).logits
    logits_t = teacher(input_ids=ids, attention_mask=real).logits.detach()
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    chosen = targets != IGNORED if kd_tokens == "response" else real.bool()
    ce = F.cross_entropy(logits_s.flatten(0, 1), targets.flatten(), reduction="sum") / totals[0].double()
    tau = config.temperature
    log_q, log_p = (F.log_softmax(x[chosen][:, :300] / tau, dim=-1) for x in (logits_s, logits_t))
    kd = F.kl_div(log_q, log_p, reduction="sum", log_target=True) / totals[1].double()
    kd = kd * (tau**2 if tau_squared else 1)
    parameters = list(student.parameters())
    expected = gradients(ce + 10 * kd, *parameters)

    result = objective(**batch, totals=totals)
    parts = {"loss": ce + 10 * kd, "loss/ce": ce, "loss/logits_kd": kd, "loss/logits_kd_weighted": 10 * kd}
    torch.testing.assert_close(result, parts, **EXACT)
    found = gradients(result["loss"], *parameters)
    # Hugging Face's norms and rotations are fp32 in a float64 model too.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
    if not tied:
        index = [id(p) for p in parameters].index(id(student.lm_head.weight))
        torch.testing.assert_close(found[index], expected[index], **EXACT)


# --- precision ---


@heads
def test_bf16_autocast_follows_float64_as_the_naive_form_does(kind):
    hidden, head, losses = hidden_states().float().detach().requires_grad_(), linear(kind).float(), Losses()
    leaves = (hidden, head.weight)
    exact_head = linear()
    exact_head.load_state_dict(head.state_dict())
    exact_leaf = hidden.detach().double().requires_grad_()
    exact, _ = losses.naive(exact_head(exact_leaf))
    losses.teacher = losses.teacher.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, sums = head_loss(hidden, head, losses, losses.weights)
        naive, _ = losses.naive(head(hidden).float())
    assert loss.dtype == sums.dtype == torch.float32
    torch.testing.assert_close(loss, naive.float(), rtol=1e-5, atol=0)
    for found, usual, true in zip(
        gradients(loss, *leaves),
        gradients(naive, *leaves),
        gradients(exact, exact_leaf, exact_head.weight),
        strict=True,
    ):
        assert found.dtype == torch.float32
        error, usual_error = ((g.double() - true).norm() for g in (found, usual))
        assert 0 < error < 1.5 * usual_error < 0.1 * true.norm()


def test_bf16_weights_add_their_gradient_up_in_fp32(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_TOKENS", 1)
    monkeypatch.setattr(module, "BLOCK_WEIGHTS", 5 * HIDDEN)
    head = linear().bfloat16()
    # A first gradient of 256 and then many of 1, which bf16 would not add to it.
    hidden = torch.ones(300, HIDDEN, dtype=torch.bfloat16)
    hidden[0] = 256

    def losses(logits: Tensor, rows: slice) -> Tensor:
        return logits.float().sum().reshape(1)

    loss, _ = head_loss(hidden, head, losses, torch.ones(1))
    (gradient,) = gradients(loss, head.weight)
    assert gradient.dtype == torch.bfloat16
    assert gradient.unique().tolist() == [torch.tensor(555.0).bfloat16().item()]


# --- memory ---


@heads
@pytest.mark.parametrize("with_kd", [False, True])
def test_no_logits_are_saved_for_the_backward_pass(kind, with_kd, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_TOKENS", 16)
    tokens, vocabulary = 512, 200
    hidden, head = hidden_states(tokens), linear(kind, vocabulary)
    teacher, labels = torch.randn(tokens, vocabulary), torch.arange(tokens) % vocabulary

    def losses(logits: Tensor, rows: slice) -> Tensor:
        ce = label_loss(logits, labels[rows])
        return torch.stack((ce, logits_kd(logits, teacher[rows], temperature=5.0) if with_kd else ce))

    def blocks_without_more() -> Tensor:
        rows = [slice(start, start + 16) for start in range(0, tokens, 16)]
        return torch.stack([losses(head(hidden[block]), block) for block in rows]).sum()

    in_all, _ = saved_elements(blocks_without_more)
    assert in_all > tokens * vocabulary  # blocks alone keep all logits
    in_all, largest = saved_elements(lambda: head_loss(hidden, head, losses, torch.ones(2))[0])
    assert in_all <= hidden.numel() + head.weight.numel()
    assert largest <= max(hidden.numel(), head.weight.numel())


@heads
def test_logits_exist_for_one_block_at_a_time_and_a_plain_head_shows_some_rows_of_it(kind):
    sizes, logits_of = [], weakref.WeakSet()

    def losses(logits: Tensor, rows: slice) -> Tensor:
        assert len(logits_of) == 0
        logits_of.add(logits)
        sizes.append((len(logits), rows))
        return logits.square().sum().reshape(1)

    head_loss(hidden_states(), linear(kind), losses, torch.ones(1))
    blocks = [(0, 3), (3, 6), (6, 7)] if kind is OwnLinear else [(0, 2), (2, 3), (3, 5), (5, 6), (6, 7)]
    assert sizes == [(end - start, slice(start, end)) for start, end in blocks]


@heads
def test_what_stands_beside_the_logits_is_made_once_for_each_block(kind):
    hidden, head, losses, made = hidden_states(), linear(kind), Losses(), []

    def beside(rows: slice) -> Tensor:
        made.append(rows)
        return losses.teacher[rows]

    def with_teacher(logits: Tensor, rows: slice, teacher: Tensor) -> Tensor:
        kd = logits_kd(logits, teacher, temperature=losses.temperature, mask_N=losses.kd_mask[rows])
        return torch.stack((label_loss(logits, losses.labels[rows]), kd))

    loss, _ = head_loss(hidden, head, with_teacher, losses.weights, beside)
    assert made == [slice(0, 3), slice(3, 6), slice(6, 7)]
    expected, _ = losses.naive(head(hidden))
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(
        gradients(loss, hidden, head.weight), gradients(expected, hidden, head.weight), **EXACT
    )


@heads
def test_without_gradients_none_is_made(kind):
    hidden, head, losses = hidden_states(), linear(kind), Losses()
    expected, expected_sums = losses.naive(head(hidden))

    def watched(logits: Tensor, rows: slice) -> Tensor:
        assert not logits.requires_grad
        return losses(logits, rows)

    with torch.no_grad():
        loss, sums = head_loss(hidden, head, watched, losses.weights)
    torch.testing.assert_close((loss, sums), (expected.detach(), expected_sums.detach()), **EXACT)
    assert not loss.requires_grad


def test_the_gradient_of_the_weight_is_the_buffer_it_was_made_in(monkeypatch):
    made, make = [], module._gradient_like

    def watched(x: Tensor | None) -> Tensor | None:
        buffer = make(x)
        made.append(buffer is not None and buffer.data_ptr())
        return buffer

    monkeypatch.setattr(module, "_gradient_like", watched)
    hidden, head, losses = hidden_states(), linear(), Losses()
    loss, _ = head_loss(hidden, head, losses, losses.weights)
    (2 * loss).backward()
    assert head.weight.grad.data_ptr() == made[1]


def test_a_second_backward_pass_is_right_or_an_error():
    hidden, head, losses = hidden_states(), linear(), Losses()
    loss, _ = head_loss(hidden, head, losses, losses.weights)
    first = gradients_kept(loss, hidden, head.weight)
    torch.testing.assert_close(gradients_kept(loss, hidden, head.weight), first, rtol=0, atol=0)
    gradients_kept(3 * loss, hidden, head.weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients_kept(loss, hidden, head.weight)


def gradients_kept(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [g.clone() for g in torch.autograd.grad(loss, leaves, retain_graph=True)]


# --- sharded ---


def test_fsdp2_shards_give_the_gradients_of_the_whole_student(python):
    done = python(Path(__file__).with_name("sharded_head.py"), processes=2)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {layout: result["ways"] for layout, result in found.items()} == {
        "root": ["_fused"],
        "root, tied": ["_fused"],
        "own group": ["_checkpointed"],
    }
    assert all(result["distance"] < 1e-5 for result in found.values()), found
