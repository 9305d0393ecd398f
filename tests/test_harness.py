"""The lm-eval adapter against lm-eval's own Hugging Face model, request by request and on local tasks."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'bitdistill[eval]')")

from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from bitdistill.errors import ConfigError, DataError
from bitdistill.export import export
from bitdistill.harness import EngineLM, TorchLM
from bitdistill.train.loading import load_model

CONTEXT = 40
"""Tokens of context in these tests, so that texts are longer than it."""

LONG = "the soup was very good . the room seemed quite warm , but the view was not . " * 3


def with_begin_token(folder: Path) -> None:
    """Give a checkpoint's tokenizer a begin-of-text token that it puts before every text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": "<|pad|>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", tokenizer.convert_tokens_to_ids("<|pad|>"))]
    )
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module", params=["plain", "begin token"])
def folders(request, tmp_path_factory, save_student) -> tuple[Path, Path]:
    """A small student, and the same one exported."""
    root = tmp_path_factory.mktemp("harness")
    student = save_student(root / "student", "qwen3", {"norm_sites": "subln"})
    if request.param == "begin token":
        with_begin_token(student)
    export(student, root / "packed", head="f32", licence="apache-2.0")
    return student, root / "packed"


@pytest.fixture(scope="module")
def oracle(folders) -> HFLM:
    """lm-eval's own model over the same weights."""
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    return HFLM(
        pretrained=load_model(folders[0]), tokenizer=tokenizer, max_length=CONTEXT, batch_size=3, device="cpu"
    )


@pytest.fixture(scope="module", params=["torch", "engine"])
def ours(request, folders) -> Any:
    if request.param == "torch":
        return TorchLM(str(folders[0]), max_length=CONTEXT)
    return EngineLM(str(folders[1]), kv_cache="fp32", max_length=CONTEXT)


def requests_of(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, argument, index) for index, argument in enumerate(arguments)]


def greedy_text(oracle: HFLM, context: str, tokens: int) -> str:
    ids = oracle.tok_encode(context)
    start = len(ids)
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(int(oracle.model(torch.tensor([ids])).logits[0, -1].argmax()))
    return oracle.tokenizer.decode(ids[start:])


def test_loglikelihood_is_lm_evals(ours, oracle):
    """Contexts that are empty, end in a space, or are too long; continuations of one token, of many, greedy ones."""
    greedy = [(text, greedy_text(oracle, text, 3)) for text in ("the soup was", "the room seemed very")]
    pairs = [
        ("the soup was", " good"),
        ("the soup was ", "very good , indeed"),
        ("the soup was", " very bad ."),
        ("", "the host was warm"),
        (LONG, " good"),
        (LONG, " not so very good"),
        *greedy,
    ]
    requests = requests_of("loglikelihood", *pairs)
    found, expected = ours.loglikelihood(requests), oracle.loglikelihood(requests)
    assert [score for score, _ in found] == pytest.approx(
        [score for score, _ in expected], rel=1e-4, abs=1e-3
    )
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    assert len({round(score, 2) for score, _ in expected}) == len(pairs)
    assert {is_greedy for _, is_greedy in expected} == {True, False}


def test_loglikelihood_rolling_is_lm_evals(ours, oracle):
    requests = requests_of("loglikelihood_rolling", ("the soup was good .",), (LONG,), ("x",))
    assert len(oracle.tok_encode(LONG)) > 2 * CONTEXT
    found, expected = ours.loglikelihood_rolling(requests), oracle.loglikelihood_rolling(requests)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_generate_until_is_lm_evals(ours, oracle):
    """A stop text that comes, one that does not, none; a prompt that is too long; different lengths."""
    free = greedy_text(oracle, "the soup was", 12)
    stop = free[4:7]
    assert stop
    requests = requests_of(
        "generate_until",
        ("the soup was", {"until": [stop], "max_gen_toks": 12}),
        ("the room", {"until": [stop, "never this"], "max_gen_toks": 12}),
        ("the soup was", {"until": ["never this"], "max_gen_toks": 12, "do_sample": False}),
        (LONG, {"until": [], "max_gen_toks": 9}),
    )
    found, expected = ours.generate_until(requests), oracle.generate_until(requests)
    assert found == expected
    assert found[0] == free.split(stop)[0]
    assert len(found[0]) < len(found[2])


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "message"),
    [
        ("generate_until", ("x", {"do_sample": True, "temperature": 1.0}), ConfigError, "greedy"),
        ("generate_until", ("x", {"max_gen_toks": CONTEXT}), ConfigError, "no room for a prompt"),
        ("loglikelihood", ("x", LONG), DataError, "does not fit the model's context"),
    ],
)
def test_requests_that_cannot_be_answered_are_refused(ours, kind, arguments, error, message):
    with pytest.raises(error, match=message):
        getattr(ours, kind)(requests_of(kind, arguments))


# --- local tasks through the whole of lm-eval ---

HEAD = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: "{folder}/rows.jsonl"}}
  cache_dir: "{folder}/cache"
test_split: test
output_type: {kind}
"""
TASKS = {
    "choose": (
        "multiple_choice",
        'doc_to_text: "{{text}} It was"\ndoc_to_choice: ["bad", "good", "very warm indeed"]\ndoc_to_target: label\n'
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n",
    ),
    "roll": (
        "loglikelihood_rolling",
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n",
    ),
    "write": (
        "generate_until",
        'doc_to_text: "{{text}}"\ndoc_to_target: "{{answer}}"\ngeneration_kwargs: {until: ["."], max_gen_toks: 6}\n'
        "metric_list: [{metric: exact_match}]\n",
    ),
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, oracle) -> Path:
    """Task files on generated rows; every other answer is what the model writes."""
    folder = tmp_path_factory.mktemp("tasks")
    with (folder / "rows.jsonl").open("w") as stream:
        for i in range(12):
            text = f"the {('soup', 'room', 'view')[i % 3]} was {'very ' * (i // 3)}good ."
            answer = greedy_text(oracle, text, 6).split(".")[0] if i % 2 else "something else"
            stream.write(json.dumps({"text": text, "label": i % 3, "answer": answer}) + "\n")
    for name, (kind, body) in TASKS.items():
        (folder / f"{name}.yaml").write_text(HEAD.format(name=name, kind=kind, folder=folder) + body)
    return folder


def numbers(results: dict) -> dict[str, float]:
    return {
        f"{task}/{metric}": value
        for task, scores in results.items()
        for metric, value in scores.items()
        if isinstance(value, float) and "stderr" not in metric
    }


def test_the_verb_gives_lm_evals_results_on_local_tasks(cli, folders, tasks, oracle, tmp_path):
    manager = TaskManager(include_path=str(tasks))
    whole = HFLM(pretrained=oracle.model, tokenizer=oracle.tokenizer, batch_size=4, device="cpu")
    expected = numbers(
        simple_evaluate(model=whole, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)["results"]
    )
    assert len(expected) == 5
    assert 0 < expected["write/exact_match,none"] < 1
    for source, exact in zip(folders, ((), ("--kv-cache", "fp32")), strict=True):
        path = tmp_path / f"{source.name}.json"
        arguments = ("--tasks", ",".join(TASKS), "--include-path", tasks, "--json", path)
        outcome = cli("lm-eval", source, *arguments, *exact)
        assert outcome.status == 0, outcome.err
        assert "|choose" in outcome.out
        assert numbers(json.loads(path.read_text())["results"]) == pytest.approx(expected, rel=1e-3)


def test_an_unknown_task_is_refused(cli, folders):
    outcome = cli("lm-eval", folders[0], "--tasks", "no_such_task")
    assert outcome.status == 1
    assert "no_such_task: lm-eval has no such task" in outcome.err


def test_lm_evals_own_command_line_knows_both_models():
    code = (
        "import bitdistill.harness; from lm_eval.api.registry import get_model\n"
        "print(get_model('bitdistill').__name__, get_model('bitdistill-engine').__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["TorchLM", "EngineLM"]


def test_bits_of_states_are_not_of_an_exported_model(folders):
    with pytest.raises(ConfigError, match="are of torch"):
        EngineLM(str(folders[1]), kv_bits=4)


def test_the_engines_model_loads_no_torch(folders):
    code = (
        "import sys; from bitdistill.harness import EngineLM; from lm_eval.api.instance import Instance\n"
        "lm = EngineLM(sys.argv[1]); lm.loglikelihood([Instance('loglikelihood', {}, ('the soup', ' was'), 0)])\n"
        "lm.generate_until([Instance('generate_until', {}, ('the soup', {'max_gen_toks': 3}), 0)])\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folders[1]], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False"]
