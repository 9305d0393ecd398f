"""Metrics of summaries against values worked out by hand and against sacrebleu; runs that use them."""

import json
import math
import sys
from pathlib import Path

import pytest

from bitdistill.data.prompts import PromptEncoder
from bitdistill.data.tasks import Example
from bitdistill.errors import ConfigError
from bitdistill.evaluate import evaluate_classification_by_generation, label_in
from bitdistill.metrics import Evaluation, Score, judge_summaries

# --- ROUGE and BLEU ---


@pytest.fixture
def eval_packages() -> None:
    for name in ("sacrebleu", "rouge_score"):
        pytest.importorskip(name, reason=f"{name} is not installed (pip install 'bitdistill[eval]')")


def metrics_of(found: Evaluation) -> dict[str, float]:
    return {found.metric: found.value} | {name: score.value for name, score in found.others.items()}


@pytest.mark.usefixtures("eval_packages")
def test_rouge_of_one_sentence_is_as_worked_out_by_hand():
    """Reference of 5 words, answer of 4: 3 words, 1 pair (the cat) and a subsequence of 3 (the cat fast) in common."""
    found = metrics_of(judge_summaries(["the cat runs fast"], ["the cat sat very fast"]))
    assert found["rouge1"] == pytest.approx(2 * 3 / 9)
    assert found["rouge2"] == pytest.approx(2 * 1 / 7)
    assert found["rougeL"] == pytest.approx(2 * 3 / 9)
    assert found["rougeLsum"] == pytest.approx(2 * 3 / 9)


@pytest.mark.usefixtures("eval_packages")
@pytest.mark.parametrize("separator", [" ", "\n"])
def test_lsum_is_over_sentences_and_l_over_the_whole_text(separator):
    """The same two sentences in the other order: half the words are in one subsequence, all in a sentence's."""
    reference = f"Dogs bark loudly.{separator}Cats sleep much."
    answer = f" Cats sleep much.{separator}Dogs bark loudly."
    found = metrics_of(judge_summaries([answer], [reference]))
    assert found["rougeL"] == pytest.approx(0.5)
    assert found["rougeLsum"] == 1
    assert found["rouge1"] == 1
    assert found["rouge2"] == pytest.approx(4 / 5)


@pytest.mark.usefixtures("eval_packages")
def test_words_are_compared_by_their_stems():
    assert metrics_of(judge_summaries(["jumping dogs"], ["jumped dog"]))["rouge1"] == 1


@pytest.mark.usefixtures("eval_packages")
def test_bleu_is_sacrebleus_over_the_corpus_as_a_share():
    import sacrebleu

    answers = ["the cat is on the mat", "a dog\nbarks at night", ""]
    references = [" the cat is on a mat", "the dog barks at night .", "nothing"]
    single = metrics_of(judge_summaries(answers[:1], references[:1]))["bleu"]
    assert single == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    found = judge_summaries(answers, references).others["bleu"]
    flat = [" ".join(text.split()) for text in answers]
    expected = sacrebleu.corpus_bleu(flat, [[" ".join(text.split()) for text in references]]).score
    assert found.value == pytest.approx(expected / 100)
    assert 0 < found.stderr < 1


@pytest.mark.usefixtures("eval_packages")
def test_the_spread_of_bleu_falls_with_the_root_of_the_items():
    answers = ["the cat is on the mat today", "a b c d e f", "one two three four six"]
    references = ["the cat is on the mat today", "a b c d x y", "one two three four five"]
    few = judge_summaries(answers * 4, references * 4).others["bleu"]
    many = judge_summaries(answers * 64, references * 64).others["bleu"]
    assert few.value == pytest.approx(many.value)
    assert few.stderr / many.stderr == pytest.approx(4, rel=0.25)


@pytest.mark.usefixtures("eval_packages")
def test_scores_are_means_over_the_items_with_their_standard_error():
    answers, references = ["a b", "x y", "c"], ["a b", "c d", "c d"]
    found = judge_summaries(answers, references)
    items = (1.0, 0.0, 2 / 3)
    assert found.items == pytest.approx(items)
    assert found.value == pytest.approx(5 / 9)
    spread = math.sqrt(sum((item - 5 / 9) ** 2 for item in items) / 3)
    assert found.stderr == pytest.approx(spread / math.sqrt(3))


@pytest.mark.parametrize("missing", ["sacrebleu", "rouge_score"])
def test_a_missing_package_is_named_with_the_remedy(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        ConfigError, match=r"is not installed; install them with: pip install 'bitdistill\[eval\]'"
    ):
        judge_summaries(["a"], ["a"])


def test_an_evaluation_comes_back_from_json():
    found = Evaluation.of("rougeLsum", [0.5, 0.25, 1 / 3], {"bleu": Score(0.1, 0.02)})
    stored = json.loads(json.dumps(found.as_dict()))
    again = Evaluation.from_dict(stored)
    assert (again.metric, again.value, again.stderr, again.others) == (
        found.metric, found.value, found.stderr, found.others
    )  # fmt: skip
    assert again.items == pytest.approx(found.items, rel=1e-5)


# --- classification by generation ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" no", 0),
        ("no, never", 0),
        (" nothing", None),
        (" not sure", 2),
        (" not", 1),
        ("Not", None),
        ("", None),
        ("well no", None),
    ],
)
def test_an_answer_is_the_longest_label_that_it_begins_with(text, expected):
    assert label_in(text, (" no", " not", " not sure")) == expected


class Writes:
    """A scorer that writes what it is told, cut to the length asked for."""

    def __init__(self, tokenizer, texts):
        self.tokenizer, self.texts, self.asked = tokenizer, texts, []

    def generate(self, prompts, max_new_tokens):
        self.asked.append(max_new_tokens)
        return [self.tokenizer.encode(text)[:max_new_tokens] for text in self.texts]


def test_accuracy_by_generation(tokenizer):
    labels = (" good", " very bad indeed")
    texts = [" good", " very bad indeed it was", " goodness", " very good"]
    examples = [Example("x", labels[i], i) for i in (0, 1, 0, 1)]
    scorer = Writes(tokenizer, texts)
    found = evaluate_classification_by_generation(scorer, PromptEncoder(tokenizer, 64), examples, labels)
    assert found.items == (1, 1, 0, 0)
    assert (found.metric, found.value) == ("accuracy", 0.5)
    assert found.others["no_label"].value == 0.5
    assert scorer.asked == [len(tokenizer.encode(labels[1]))]


def test_eval_by_generation_agrees_with_greedy_text_by_hand(cli, project, teacher, tokenizer, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(teacher).eval()
    rows = [json.loads(line) for line in (project.parent / "task" / "eval.jsonl").open()]
    length = max(len(tokenizer.encode(text)) for text in (" bad", " good"))
    right = 0
    for row in rows:
        ids = tokenizer.encode(f"{row['text']} It was")
        start = len(ids)
        for _ in range(length):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        right += tokenizer.decode(ids[start:]).split()[:1] == [("bad", "good")[row["label"]]]
    outcome = cli(
        "eval", project, teacher, "--set", "task.scoring=generation", "--json", tmp_path / "result.json"
    )
    assert outcome.status == 0, outcome.err
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["accuracy"] == right / len(rows)
    assert 0 <= result["no_label"] <= 1 - result["accuracy"]


# --- a run ---


@pytest.mark.usefixtures("eval_packages")
def test_a_run_on_summaries_has_every_metric_and_lead_3_beside_it(cli, project, llama, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    rows = [
        {
            "article": f"The soup was {'very ' * (i % 4)}good . The room was warm . The view was bad . The host left .",
            "highlights": f"the soup was {'very ' * (i % 4)}good .",
        }
        for i in range(24)
    ]
    (data / "train.jsonl").write_text(
        "".join(json.dumps(row | {"article": row["article"] + f" {i}"}) + "\n" for i, row in enumerate(rows))
    )
    (data / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:6]))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'name = "sum"\noutput_dir = "{tmp_path}/runs"\n[model]\nsource = "{llama}"\n'
        f'[corpus]\nsource = "{project.parent}/prose.jsonl"\nsequence_length = 16\n'
        f'[task]\nname = "cnndm"\ndata_dir = "{data}"\nmax_length = 64\nmax_new_tokens = 16\n'
        '[sft]\nprecision = "fp32"\nepochs = 1\nbatch_size = 8\n'
        '[run]\nmethods = ["fp16_sft", "bitnet_sft"]\nlearning_rates = [1e-3, 1e-2]\n'
    )
    outcome = cli("run", recipe)
    assert outcome.status == 0, outcome.err
    folder = tmp_path / "runs" / "sum"
    result = json.loads((folder / "result.json").read_text())
    assert result["meta"]["metric"] == "rougeLsum"
    # Lead-3 of every article holds the summary's words (3 + very + 1) and 8 more.
    recalls = [(4 + i % 4, 12 + i % 4) for i in range(6)]
    assert result["meta"]["baselines"]["lead-3"]["rouge1"] == pytest.approx(
        sum(2 * common / (common + whole) for common, whole in recalls) / 6
    )
    for key in ("fp16_sft", "bitnet_sft"):
        row = result[key]
        assert set(row["metrics"]) == {"rouge1", "rouge2", "rougeL", "bleu"}
        assert row["validation_rougeLsum"] == max(row["grid"].values())
        assert f"{100 * row['rougeLsum']:.2f} %" in outcome.out
    assert "lead-3" in outcome.out
    report = (folder / "report.md").read_text()
    assert "| Method | ROUGE-Lsum | ROUGE-1 | ROUGE-2 | ROUGE-L | BLEU |" in report
    assert f"| lead-3 | {100 * result['meta']['baselines']['lead-3']['rougeLsum']:.2f}% |" in report
    assert "lead-3 (" in (folder / "report.html").read_text()
    again = cli("eval", recipe, folder / result["fp16_sft"]["steps"][-1], "--json", Path(tmp_path / "e.json"))
    assert again.status == 0, again.err
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["rougeLsum"] == result["fp16_sft"]["rougeLsum"]
    assert found["bleu"] == result["fp16_sft"]["metrics"]["bleu"]["value"]
