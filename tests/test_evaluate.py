"""Evaluation against plain Hugging Face calls, one item at a time and without padding."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_families import FAMILY_NAMES
from transformers import PreTrainedModel

from bitdistill import evaluate
from bitdistill.config import CorpusConfig
from bitdistill.data.corpus import PackedSequences, build_shards
from bitdistill.data.prompts import PromptEncoder
from bitdistill.data.tasks import Example
from bitdistill.evaluate import TorchScorer, evaluate_classification, evaluate_generation
from bitdistill.metrics import Evaluation
from bitdistill.model import TernarySpec
from bitdistill.train.surgery import refine

PROMPTS = (
    "the soup was",
    "the room seemed very good and the host was quite warm , but the view was not . so it was",
    "x",
    "the view seemed",
)


@pytest.fixture(params=[*FAMILY_NAMES, "ternary"])
def model(request, make_model) -> PreTrainedModel:
    if request.param == "ternary":
        return refine(make_model("llama"), TernarySpec())[0]
    return make_model(request.param)


@torch.no_grad()
def log_likelihood(model: PreTrainedModel, context: list[int], continuation: list[int]) -> float:
    """Sum of the log-probabilities of the continuation, one forward pass, softmax in float64."""
    logits = model(torch.tensor([context + continuation])).logits[0].double()
    log_probs = logits.log_softmax(-1)
    return sum(log_probs[len(context) - 1 + i, token].item() for i, token in enumerate(continuation))


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: list[int], count: int, end: int) -> list[int]:
    """Greedy decoding by hand, without cache or padding."""
    ids = list(prompt)
    while len(ids) - len(prompt) < count:
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == end:
            break
        ids.append(token)
    return ids[len(prompt) :]


# --- label log-likelihood ---


@pytest.mark.parametrize(("batch_tokens", "batch_logits"), [(4096, 1 << 22), (4096, 3000), (40, 1), (1, 1)])
def test_scores_are_sums_of_log_probabilities_of_the_label_tokens(
    model, tokenizer, monkeypatch, batch_tokens, batch_logits
):
    """Labels of one and of several tokens, one the beginning of another, prompts of four lengths."""
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", batch_tokens)
    monkeypatch.setattr(evaluate, "BATCH_LOGITS", batch_logits)
    labels = [tokenizer.encode(text) for text in (" good", " good, really", " XYZ", " bad")]
    assert len({len(label) for label in labels}) > 2
    requests = [(tokenizer.encode(prompt), label) for prompt in PROMPTS for label in labels]
    scores = TorchScorer(model, tokenizer).log_likelihoods(requests)
    expected = [log_likelihood(model, *request) for request in requests]
    assert scores == pytest.approx(expected, rel=1e-5, abs=1e-4)
    assert max(expected) - min(expected) > 1


def test_accuracy_is_the_share_of_items_whose_label_scores_highest(model, tokenizer):
    labels = (" very good", " bad", " warm indeed")
    encoder = PromptEncoder(tokenizer, 64)
    examples = [Example(prompt, labels[i % 3], i % 3) for i, prompt in enumerate(PROMPTS)]
    result = evaluate_classification(TorchScorer(model, tokenizer), encoder, examples, labels)
    best = [
        max(
            range(3),
            key=lambda i, p=prompt: log_likelihood(model, tokenizer.encode(p), tokenizer.encode(labels[i])),
        )
        for prompt in PROMPTS
    ]
    expected = tuple(found == example.label for found, example in zip(best, examples, strict=True))
    assert result.items == expected
    assert result.metric == "accuracy"
    assert result.value == sum(expected) / 4


class FixedScores:
    """A scorer that knows the answers: the protocol needs no torch."""

    def __init__(self, scores: dict[tuple[int, ...], float]) -> None:
        self.scores = scores

    def label_scores(self, prompts, labels):
        return [[self.scores[tuple(label)] for label in labels] for _ in prompts]


def test_the_first_label_wins_a_tie_and_length_is_not_normalised(tokenizer):
    encoder = PromptEncoder(tokenizer, 64)
    labels = (" good", " bad", " very very very good")
    ids = [tuple(tokenizer.encode(label)) for label in labels]
    examples = [Example("x", labels[i], i) for i in range(3)]
    tie = FixedScores({ids[0]: -1.0, ids[1]: -1.0, ids[2]: -1.5})
    assert evaluate_classification(tie, encoder, examples, labels).items == (True, False, False)
    longest = FixedScores({ids[0]: -1.0, ids[1]: -1.0, ids[2]: -0.9})
    assert evaluate_classification(longest, encoder, examples, labels).items == (False, False, True)


def test_standard_error_is_binomial():
    correct = [True] * 30 + [False] * 10
    result = Evaluation.of("accuracy", correct)
    assert result.value == 0.75
    assert result.stderr == pytest.approx(np.std(correct) / math.sqrt(40))


# --- generation ---


def test_left_padded_batches_generate_what_single_prompts_do(model, tokenizer):
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    assert len({len(prompt) for prompt in prompts}) > 2
    answers = TorchScorer(model, tokenizer).generate(prompts, 7)
    assert answers == [greedy(model, prompt, 7, tokenizer.eos_token_id) for prompt in prompts]
    assert all(answers)


def test_an_answer_ends_before_the_end_of_text(make_model, tokenizer):
    """The end token is one that the model gives in the middle of an answer, and others go on longer."""
    model = make_model("llama")
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    free = [greedy(model, prompt, 7, end=-1) for prompt in prompts]
    end = next(token for token in free[0][1:] if token != free[0][0])
    stops = SimpleNamespace(pad_token_id=tokenizer.pad_token_id, eos_token_id=end)
    answers = TorchScorer(model, stops).generate(prompts, 7)
    expected = [answer[: answer.index(end)] if end in answer else answer for answer in free]
    assert answers == expected
    assert len({len(answer) for answer in expected}) > 1


def test_exact_match_is_the_share_of_texts_that_agree(make_model, tokenizer):
    model = make_model("qwen3")
    encoder = PromptEncoder(tokenizer, 64)
    texts = [tokenizer.decode(greedy(model, tokenizer.encode(p), 6, tokenizer.eos_token_id)) for p in PROMPTS]
    answers = [f" {texts[0]}\n", texts[1][:-1], texts[2], "something else"]
    examples = [Example(prompt, answer, None) for prompt, answer in zip(PROMPTS, answers, strict=True)]
    result = evaluate_generation(TorchScorer(model, tokenizer), encoder, examples, 6)
    assert result.items == (True, False, True, False)
    assert (result.metric, result.value) == ("exact_match", 0.5)


# --- perplexity ---


def test_perplexity_is_exp_of_the_hugging_face_loss(make_model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", 50)
    text = "".join(f"the soup number {i} was warm .\n\n" for i in range(40))
    (tmp_path / "a.txt").write_text(text)
    config = CorpusConfig(source=str(tmp_path / "a.txt"), pretrain_share=1)
    sequences = PackedSequences(build_shards(config, "pretrain", tokenizer, tmp_path), 16)
    assert len(sequences) > 10
    model = make_model("llama", initializer_range=0.05)
    rows = torch.stack([sequences[i]["input_ids"] for i in range(len(sequences))])
    with torch.no_grad():
        expected = math.exp(model(rows, labels=rows).loss.double().item())
    assert TorchScorer(model, tokenizer).perplexity(sequences) == pytest.approx(expected, rel=1e-5)


def test_the_cli_reports_what_the_scores_say(cli, project, llama, teacher, tokenizer, tmp_path):
    """``bitdistill eval`` end to end against one plain forward pass per item and label."""
    import json

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(teacher).eval()
    rows = [json.loads(line) for line in (project.parent / "task" / "eval.jsonl").open()]
    labels = [tokenizer.encode(text) for text in (" bad", " good")]
    right = 0
    for row in rows:
        prompt = tokenizer.encode(f"{row['text']} It was")
        scores = [log_likelihood(model, prompt, label) for label in labels]
        right += scores.index(max(scores)) == row["label"]
    outcome = cli("eval", project, teacher, "--json", tmp_path / "result.json")
    assert outcome.status == 0, outcome.err
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["items"] == len(rows) == 18
    assert result["accuracy"] == pytest.approx(right / len(rows))
    assert f"accuracy {right / len(rows):.4f}" in outcome.out
