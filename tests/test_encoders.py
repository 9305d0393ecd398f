"""An encoder from the command line: every verb, a whole run, resume, two processes, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from bad_input.refusals import change_config, refused, weights_digest
from safetensors.torch import load_file
from small_project import SENTENCES
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from bitdistill.errors import CheckpointError
from bitdistill.evaluate import TorchScorer
from bitdistill.metrics import Evaluation
from bitdistill.train.callbacks import MetricsFile
from bitdistill.train.loading import load_model, load_tokenizer

METHODS = ("fp16_sft", "fp16_ct_sft", "bitnet_sft", "bitdistill")


def metrics(step: Path) -> list[dict]:
    return [json.loads(line) for line in (step / "metrics.jsonl").read_text().splitlines()]


def succeeded(outcome) -> None:
    assert outcome.status == 0, outcome.err


def sets(changes: list[str]) -> list[str]:
    return [word for change in changes for word in ("--set", change)]


def settings(bert: Path, output: Path) -> list[str]:
    return [f'model.source="{bert}"', f'output_dir="{output}"', "sft.epochs=2", "refine.gain=rms"]


@pytest.fixture(scope="module")
def run(cli, encoder_project, bert, tmp_path_factory) -> Path:
    """The folder of a whole run."""
    output = tmp_path_factory.mktemp("encoders")
    succeeded(cli("run", encoder_project, *sets(settings(bert, output))))
    return output / "small"


# --- a whole run ---


def test_a_run_gives_the_four_rows(run):
    result = json.loads((run / "result.json").read_text())
    assert {key for key in result if key != "meta"} == set(METHODS)
    assert all(result[method]["stderr"] > 0 for method in METHODS)
    # The encoder, pooler and classifier of a BERT of width 32: counted by hand.
    layer = 4 * (32 * 32 + 32) + (48 * 32 + 48) + (48 * 32 + 32) + 4 * 32
    total = (80 + 64 + 2) * 32 + 2 * 32 + 2 * layer + (32 * 32 + 32) + (2 * 32 + 2)
    gains = 2 * (32 + 48)
    assert result["fp16_sft"]["parameters"] == result["bitnet_sft"]["parameters"] == total
    assert result["bitdistill"]["parameters"] == total + gains
    ternary = 2 * (4 * 32 * 32 + 2 * 48 * 32)
    assert result["bitdistill"]["bytes"] == round(2 * (total + gains - ternary) + ternary * 1.6 / 8 + 4 * 12)
    assert (run / "report.html").is_file()
    assert (run / "report.md").is_file()


@pytest.mark.parametrize("method", METHODS)
def test_accuracy_is_that_of_plain_transformers_one_item_at_a_time(run, method):
    classifier = AutoModelForSequenceClassification.from_pretrained(run / method).eval()
    tokenizer = AutoTokenizer.from_pretrained(run / method)
    correct = []
    for text in SENTENCES[3::4]:
        logits = classifier(**tokenizer(text, return_tensors="pt")).logits[0]
        correct.append(int(logits.argmax()) == int("good" in text))
    record = json.loads((run / method / "eval-test.json").read_text())
    assert Evaluation.from_dict(record).items == tuple(correct)
    assert classifier.config.id2label == {0: "bad", 1: "good"}


def test_every_latent_and_head_that_should_learn_has_moved(run):
    folders = ("refine-subln", "pretrain-subln", "bitdistill")
    refined, pretrained, student = (load_file(run / folder / "model.safetensors") for folder in folders)
    pooler = {name for name in refined if ".pooler." in name}
    assert pooler
    for name in refined:
        assert torch.equal(refined[name], pretrained[name]) == (name in pooler), name
    for name in student.keys() & pretrained.keys():
        assert not torch.equal(student[name], pretrained[name]), name
    weights = json.loads((run / "bitdistill" / "weights.json").read_text())
    assert sum(weights["counts"]) == 2 * (4 * 32 * 32 + 2 * 48 * 32)
    assert 0 < weights["flip_rate"] < 1


def test_every_part_of_the_loss_is_logged(run):
    for row in metrics(run / "bitdistill"):
        assert all(0 < row[f"loss/{part}"] < 1e3 for part in ("ce", "logits_kd", "relation_kd"))
    assert len(metrics(run / "pretrain-subln")) == 8
    for folder in ("pretrain-fp16", "pretrain-subln", "fp16_sft", "bitnet_sft"):
        assert all(0 < row["loss/ce"] < 20 for row in metrics(run / folder))


def test_the_verbs_one_by_one(cli, run, encoder_project, bert, tmp_path):
    """As ``run`` calls them, so their weights are those of the run."""
    options = sets(settings(bert, tmp_path))

    def verb(name: str, source: Path, *more: object) -> Path:
        output = tmp_path / name
        succeeded(cli(name, encoder_project, "--source", source, "--output", output, *options, *more))
        return output

    pretrained = verb("pretrain", verb("refine", bert))
    teacher = verb("sft", bert)
    student = verb("distill", pretrained, "--teacher", teacher)
    assert weights_digest(student) == weights_digest(run / "bitdistill")
    outcome = cli("eval", encoder_project, student, "--split", "validation")
    succeeded(outcome)
    assert "accuracy" in outcome.out
    outcome = cli("inspect", student)
    succeeded(outcome)
    assert "bit_bert" in outcome.out


# --- resume and processes ---


def test_stage_2_that_is_killed_in_its_second_epoch_ends_in_the_same_weights(
    cli, encoder_project, bert, tmp_path, monkeypatch
):
    """Masks, order and dropout: 98 sequences in batches of 4 make epochs of 25 steps."""
    source = shutil.copytree(bert, tmp_path / "bert")
    change_config(source, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)

    def pretrain(output: Path):
        changes = sets([f"output_dir={tmp_path / 'runs'}", "pretrain.tokens=2048", "pretrain.save_every=9"])
        return cli("pretrain", encoder_project, "--source", source, "--output", output, *changes)

    succeeded(pretrain(tmp_path / "whole"))
    log = MetricsFile.on_log

    def killed(self, args, state, control, **named):
        log(self, args, state, control, **named)
        if state.global_step == 30:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "on_log", killed)
        assert pretrain(tmp_path / "killed").status == 130
    succeeded(pretrain(tmp_path / "killed"))
    assert weights_digest(tmp_path / "killed") == weights_digest(tmp_path / "whole")
    rows = metrics(tmp_path / "killed")
    assert [row["step"] for row in rows] == list(range(1, 33))
    assert rows[26]["epoch"] > 1


def test_two_processes_train_what_one_trains(python, run, encoder_project, bert, tmp_path):
    """Sums in another order move activations of a student over rounding boundaries; a wrong total would be a factor."""
    sizes = [
        f"{section}.batch_size={size}" for section, size in (("pretrain", 2), ("sft", 4), ("distill", 4))
    ]
    changes = [*settings(bert, tmp_path), *sizes, "run.methods=['bitdistill']"]
    done = python("-m", "bitdistill", "run", encoder_project, *sets(changes), processes=2)
    assert done.returncode == 0, done.stderr
    for step, tolerance in (("fp16_sft", 1e-5), ("pretrain-subln", 1e-3), ("bitdistill", 1e-2)):
        one, two = (metrics(folder / step) for folder in (run, tmp_path / "small"))
        assert len(one) == len(two) > 1
        for left, right in zip(one, two, strict=True):
            names = [name for name in left if name.startswith("loss")]
            expected = pytest.approx([left[name] for name in names], rel=tolerance, abs=2e-6)
            assert [right[name] for name in names] == expected


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        (["task.scoring=generation"], ["task.scoring = 'generation'", "bert is an encoder", "leave it out"]),
        (["task.columns=[]", "task.template={text} was"], ["task.template = '{text} was'", "task.columns"]),
        (["task.max_length=65"], ["task.max_length = 65", "64 positions"]),
        (["distill.kd_tokens=all"], ["distill.kd_tokens = 'all'", "of classes, not of tokens"]),
        (["distill.teacher_cache=hidden"], ["distill.teacher_cache = 'hidden'", "is not cached"]),
        (["distill.preset=authors"], ["distill.kd_tokens = 'all'", 'set it to "response" behind a preset']),
        (
            ["distill.relation_states=pre_rope"],
            ["distill.relation_states = 'pre_rope'", "no rotary embedding"],
        ),
        (["distill.relation_mask=causal"], ["distill.relation_mask = 'causal'", '"padding"']),
        (
            ["task.columns=[]", "task.template={text}", "task.kind=generation", "task.labels=[]"],
            ["task.kind = 'generation'", "bert is an encoder, which classifies"],
        ),
    ],
)
def test_a_run_refuses_what_an_encoder_cannot_do_before_it_trains(
    cli, encoder_project, bert, tmp_path, changes, fragments
):
    outcome = cli("run", encoder_project, *sets([*settings(bert, tmp_path / "runs"), *changes]))
    refused(outcome, *fragments)
    assert not (tmp_path / "runs").exists()


def test_sequences_longer_than_the_positions_are_refused(cli, encoder_project, bert, tmp_path):
    for verb, more in (("pretrain", ()), ("refine", ("--set", "refine.gain=rms"))):
        outcome = cli(
            verb, encoder_project, "--source", bert, "--output", tmp_path / verb,
            "--set", f"output_dir={tmp_path}", "--set", "corpus.sequence_length=65", *more,
        )  # fmt: skip
        refused(outcome, "corpus.sequence_length = 65", "64 positions")


def test_columns_with_a_decoder_are_refused(cli, encoder_project, llama, tmp_path):
    outcome = cli("run", encoder_project, *sets(settings(llama, tmp_path)))
    refused(outcome, "task.columns = ('text',)", "llama is a decoder", "task.template")


def test_an_encoder_is_not_exported(cli, run, tmp_path):
    for source in ("bitdistill", "fp16_sft", "pretrain-subln"):
        outcome = cli("export", run / source, tmp_path / "packed")
        refused(outcome, run / source, "the engine runs decoders", "is an encoder", "bitdistill eval")
    assert not (tmp_path / "packed").exists()


def test_an_encoder_has_no_perplexity(cli, run, encoder_project):
    refused(
        cli("eval", encoder_project, run / "pretrain-subln", "--perplexity"), "--perplexity", "is an encoder"
    )


def test_a_masked_lm_is_not_evaluated_on_the_task(cli, run, encoder_project):
    refused(
        cli("eval", encoder_project, run / "pretrain-subln"),
        "an encoder without a classification head",
        "bitdistill sft",
    )


def test_an_encoder_scores_no_text(run):
    """Neither in lm-eval nor for answers by generation."""
    with pytest.raises(CheckpointError, match=r"bit_bert is an encoder.*bitdistill eval for a classifier"):
        TorchScorer(load_model(run / "bitdistill"), load_tokenizer(run / "bitdistill"))


@pytest.mark.parametrize("verb", ["pretrain", "run"])
def test_stage_2_of_a_classifier_is_refused(cli, run, encoder_project, tmp_path, verb):
    """By a run before it trains anything."""
    source, output = run / "fp16_sft", tmp_path / "runs"
    options = ("--source", source, "--output", tmp_path / "new") if verb == "pretrain" else ()
    outcome = cli(verb, encoder_project, *options, *sets(settings(source, output)))
    refused(outcome, source, "a classifier has no masked-LM head", "leave stage 2 out")
    assert not output.exists()


def test_a_teacher_that_is_a_decoder_is_refused_before_anything_is_trained(
    cli, encoder_project, bert, llama, tmp_path
):
    changes = [*settings(bert, tmp_path / "runs"), f'distill.teacher="{llama}"']
    outcome = cli("run", encoder_project, *sets(changes))
    refused(outcome, llama, "is a decoder, where a classifier is needed")
    assert not (tmp_path / "runs").exists()
