"""The teacher cache: what it holds and the losses it gives.

Oracles: Hugging Face's forward pass of each example alone, and the objective beside the live teacher.
"""

import pytest
import torch
from hf_reference import rotated_states
from torch.nn import functional as F

from bitdistill.data import teacher_rows
from bitdistill.data.tasks import load_task
from bitdistill.data.teacher_rows import RowPlan, TaughtBatch
from bitdistill.recipe import load_recipe
from bitdistill.train import teacher_cache
from bitdistill.train.loading import load_model, load_tokenizer
from bitdistill.train.objective import Distillation
from bitdistill.train.sft import task_sequences
from bitdistill.train.teacher_cache import cached_teacher

BF16 = 2**-8
"""Relative error of rounding to bf16, at most."""


@pytest.fixture(autouse=True)
def _many_shards(monkeypatch):
    monkeypatch.setattr(teacher_rows, "SHARD_TOKENS", 64)
    monkeypatch.setattr(teacher_cache, "BATCH_TOKENS", 40)


@pytest.fixture
def make(project, student, teacher, tmp_path):
    """``make("distill.teacher_cache=topk")`` -> recipe, cached teacher, taught sequences."""

    def build(*settings: str):
        overrides = [f'distill.teacher="{teacher}"', f'output_dir="{tmp_path}"', *settings]
        recipe = load_recipe(project, overrides)
        tokenizer = load_tokenizer(student)
        sequences = task_sequences(recipe, load_task(recipe.task), tokenizer)
        return recipe, *cached_teacher(recipe, student, tokenizer, sequences)

    return build


def alone(item) -> dict[str, torch.Tensor]:
    """One example as a batch of its own, without padding."""
    ids = torch.tensor([item.prompt + item.answer])
    labels = ids.clone()
    labels[:, : len(item.prompt)] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def kd_positions(item, kd_tokens: str) -> slice:
    return slice(0, len(item)) if kd_tokens == "all" else slice(len(item.prompt) - 1, len(item) - 1)


# --- what it holds ---


@pytest.mark.parametrize("kd_tokens", ["response", "all"])
def test_hidden_states_and_relation_states_are_the_teachers_on_each_example(make, teacher, kd_tokens):
    _, _, taught = make(
        "distill.teacher_cache=hidden", f"distill.kd_tokens={kd_tokens}", "distill.relation_layers=[0, 1]"
    )
    model = load_model(teacher)
    assert len(taught) == len(taught.lengths) > 8
    for index in (0, 5, len(taught) - 1):
        example = taught[index]
        batch = alone(example.encoded)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            hidden = model.model(**inputs).last_hidden_state[0]
        expected = {"teacher_hidden": hidden[kd_positions(example.encoded, kd_tokens)]}
        for layer in (0, 1):
            for letter, state in zip("qkv", rotated_states(model, layer, **inputs), strict=True):
                expected[f"teacher_{letter}.{layer}"] = state[0].transpose(0, 1)
        assert example.rows.keys() == expected.keys()
        for name, tensor in expected.items():
            assert example.rows[name].dtype == torch.bfloat16
            torch.testing.assert_close(example.rows[name].float(), tensor, rtol=BF16, atol=1e-5)


def test_top_k_rows_are_those_of_the_teachers_logits(make, teacher):
    settings = ("distill.cache_top_k=5", "distill.temperature=3", "distill.gamma_relation=0")
    _, _, taught = make("distill.teacher_cache=topk", "distill.relation_heads=0", *settings)
    model = load_model(teacher)
    for index in (1, 7):
        example = taught[index]
        with torch.no_grad():
            logits = model(alone(example.encoded)["input_ids"]).logits[0].double()
        p = F.softmax(logits[kd_positions(example.encoded, "response")] / 3, dim=-1)
        values, ids = p.sort(dim=-1, descending=True)
        assert set(example.rows) == {"teacher_top", "teacher_top_log_p", "teacher_rest_log_p"}
        assert torch.equal(example.rows["teacher_top"].long(), ids[:, :5])
        found = example.rows["teacher_top_log_p"].double().exp()
        torch.testing.assert_close(found, values[:, :5], rtol=5e-3, atol=0)
        rest = example.rows["teacher_rest_log_p"].double().exp()
        torch.testing.assert_close(rest, values[:, 5:].sum(dim=-1), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("temperature", "warned"), [(5, True), (0.02, False)])
def test_a_top_k_that_holds_little_of_the_mass_is_warned_of(make, caplog, temperature, warned):
    caplog.set_level("WARNING")
    make("distill.teacher_cache=topk", "distill.cache_top_k=2", f"distill.temperature={temperature}")
    text = " ".join(record.getMessage() for record in caplog.records)
    assert ("of the teacher's mass" in text) == warned


# --- what it teaches ---

CASES = {
    "response": (),
    "all tokens": ("distill.kd_tokens=all",),
    "both layers, causal": ("distill.relation_layers=[0, 1]", "distill.relation_mask=causal"),
    "cosine, pre-rope": ("distill.relation_form=cosine", "distill.relation_states=pre_rope"),
    "logits only": ("distill.gamma_relation=0", "distill.relation_heads=0"),
    "relations only": ("distill.lambda_logits=0",),
}


@pytest.mark.parametrize("case", CASES)
def test_the_losses_and_gradients_are_those_beside_the_live_teacher(make, student, teacher, case):
    """Up to the rounding of what is kept; batches in an order of their own."""
    recipe, cached, taught = make("distill.teacher_cache=hidden", *CASES[case])
    batch = TaughtBatch(1)([taught[index] for index in (9, 2, 13, 4)])
    plain = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    results, gradients = [], []
    for source, inputs in ((cached, batch), (load_model(teacher), plain)):
        model = load_model(student)
        objective = Distillation(model, source, recipe.distill)
        result = objective(**inputs, totals=objective.counts(inputs))
        result["loss"].backward()
        results.append({name: value.item() for name, value in result.items()})
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert results[0] == pytest.approx(results[1], rel=2e-2)
    assert results[0]["loss/ce"] == pytest.approx(results[1]["loss/ce"], rel=1e-6)
    assert F.cosine_similarity(*gradients, dim=0) > 0.9995


def test_the_losses_are_exact_where_the_live_teachers_states_are_bf16(make, student, teacher):
    recipe, cached, taught = make(
        "distill.teacher_cache=hidden", "distill.gamma_relation=0", "distill.relation_heads=0"
    )
    batch = TaughtBatch(1)([taught[index] for index in (3, 8, 0)])
    plain = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    live = load_model(teacher)
    live.model.norm.register_forward_hook(lambda *call: call[-1].bfloat16().float())
    results, gradients = [], []
    for source, inputs in ((cached, batch), (live, plain)):
        model = load_model(student)
        objective = Distillation(model, source, recipe.distill)
        result = objective(**inputs, totals=objective.counts(inputs))
        result["loss"].backward()
        results.append(result["loss/logits_kd"])
        gradients.append([p.grad for p in model.parameters()])
    # The cache was filled in other batches, which round otherwise in fp32 but almost never across a bf16 boundary.
    torch.testing.assert_close(*results, rtol=1e-5, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("k", "tolerance"), [(300, 2e-3), (8, None)])
def test_top_k_gives_the_divergence_of_what_was_kept(make, student, teacher, k, tolerance):
    """With the whole vocabulary that of the live teacher; else that of merged distributions, in float64."""
    settings = ("distill.gamma_relation=0", "distill.relation_heads=0", "distill.temperature=2")
    recipe, cached, taught = make("distill.teacher_cache=topk", f"distill.cache_top_k={k}", *settings)
    items = [taught[index] for index in (9, 2, 13)]
    batch = TaughtBatch(1)(items)
    models = load_model(teacher), load_model(student)
    objective = Distillation(models[1], cached, recipe.distill)
    found = objective(**batch, totals=objective.counts(batch))["loss/logits_kd"].item()
    total, tokens = 0.0, 0
    for item in items:
        chosen = kd_positions(item.encoded, "response")
        with torch.no_grad():
            p, q = (
                F.softmax(m(alone(item.encoded)["input_ids"]).logits[0, chosen].double() / 2, dim=-1)
                for m in models
            )
        order = p.argsort(dim=-1, descending=True)
        p, q = (x.gather(-1, order) for x in (p, q))
        if k < 300:
            p, q = (torch.cat((x[:, :k], x[:, k:].sum(-1, keepdim=True)), dim=-1) for x in (p, q))
        total += float((p * (p.log() - q.log())).sum())
        tokens += len(p)
    assert found == pytest.approx(total / tokens, rel=tolerance or 2e-3)


def test_bf16_compute_teaches_as_the_live_teacher_does_under_autocast(make, student, teacher):
    recipe, cached, taught = make("distill.teacher_cache=hidden", "distill.precision=bf16")
    assert cached.head.weight.dtype == torch.bfloat16
    batch = TaughtBatch(1)([taught[index] for index in (9, 2, 13, 4)])
    plain = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    results = []
    for source, inputs in ((cached, batch), (load_model(teacher), plain)):
        objective = Distillation(load_model(student), source, recipe.distill)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = objective(**inputs, totals=objective.counts(inputs))
        results.append({name: value.item() for name, value in result.items()})
    assert results[0] == pytest.approx(results[1], rel=3e-2)


# --- the plan ---


def test_every_example_has_its_place_in_shards_of_similar_lengths(make):
    recipe, _, taught = make(
        "distill.teacher_cache=hidden", "distill.gamma_relation=0", "distill.relation_heads=0"
    )
    plan = RowPlan(taught.sequences, recipe.distill.kd_tokens)
    assert sorted(index for shard in plan.shards for index in shard) == list(range(len(taught)))
    lengths = [taught.lengths[index] for shard in plan.shards for index in shard]
    assert lengths == sorted(lengths)
    for shard, indices in enumerate(plan.shards):
        batches = list(plan.batches(shard, 40))
        assert [index for batch in batches for index in batch] == indices
        assert all(len(b) * max(taught.lengths[i] for i in b) <= 40 for b in batches)
