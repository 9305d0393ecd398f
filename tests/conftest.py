"""What every test shares: reproducible examples, one torch thread, a fixed seed, no network, and a small
project (tokenizer, models, corpus, task, recipe) to run the command line on.
"""

import contextlib
import importlib.util
import io
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

if "BITDISTILL_CORE" in os.environ:
    # Another build of the engine core (make test-sanitize) in place of the installed one.
    _spec = importlib.util.spec_from_file_location("bitdistill._core", os.environ["BITDISTILL_CORE"])
    assert _spec is not None and _spec.loader is not None
    sys.modules["bitdistill._core"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["bitdistill._core"])

import pytest
import torch
from hypothesis import settings
from tiny_encoders import small_encoder, wordpiece
from tiny_families import PECULIARITIES, dense_classes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

# Derandomised: a test that passed on one machine draws the same examples on the next.
# No deadline: a busy machine is not a bug.
settings.register_profile("bitdistill", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("bitdistill")

# Equality to the last bit is asserted between processes; a sum split over threads may round otherwise.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real checkpoints and data sets beside the repository; tests that need them skip where they are not."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real data is not beside the repository (../shared/data)")
    return folder


# --- the command line, in this process ---


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    status: int
    out: str
    err: str


def run_cli(*arguments: object) -> Outcome:
    """``bitdistill ARGUMENTS`` through its entry point; what main() lets escape fails the test."""
    from bitdistill import cli

    out, err, status = io.StringIO(), io.StringIO(), 0
    argv, sys.argv = sys.argv, ["bitdistill", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as stop:
        status = int(stop.code or 0)
    finally:
        sys.argv = argv
    return Outcome(status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def cli() -> Callable[..., Outcome]:
    """``cli("eval", recipe, folder)`` -> status, stdout, stderr."""
    return run_cli


# --- Python in other processes ---


def run_python(*arguments: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS``, or as many processes of it as asked, that torchrun starts to work together."""
    command = [sys.executable, *map(str, arguments)]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--no-python", "--nproc-per-node"]
        command = [sys.executable, *launcher, str(processes), *command]
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="session")
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``python("-m", "bitdistill", "--help", processes=2)``: see ``run_python``."""
    return run_python


# --- a small project ---

WORDS = (
    ("soup", "room", "view", "host"),
    ("was", "seemed"),
    ("very", "not", "quite"),
    ("good", "bad", "warm"),
)
SENTENCES = [f"the {' '.join(words)} ." for words in itertools.product(*WORDS)]

RECIPE = """
name = "small"
output_dir = "{folder}/runs"

[corpus]
source = "{folder}/prose.jsonl"
sequence_length = 16
pretrain_share = 0.8

[task]
name = "jsonl"
data_dir = "{folder}/task"
template = "{{text}} It was"
labels = [" bad", " good"]
max_length = 48

[pretrain]
precision = "fp32"
tokens = 512
batch_size = 4
log_every = 1

[sft]
precision = "fp32"
epochs = 1
batch_size = 8
log_every = 1

[distill]
precision = "fp32"
epochs = 1
batch_size = 8
relation_heads = 2
gamma_relation = 10
log_every = 1
"""


def write_project(folder: Path) -> Path:
    """Corpus, task and recipe in ``folder``; returns the recipe."""
    (folder / "task").mkdir(parents=True)
    rows = [{"text": text, "label": int("good" in text)} for text in SENTENCES]
    parts = {"train.jsonl": rows[::2] + rows[1::4], "eval.jsonl": rows[3::4]}
    for name, part in parts.items():
        lines = [f"{json.dumps(row)}\n" for row in part]
        (folder / "task" / name).write_text("".join(lines), encoding="utf-8")
    documents = [" ".join(SENTENCES[i : i + 4]) for i in range(len(SENTENCES) - 4)]
    lines = [f"{json.dumps({'text': text})}\n" for text in documents]
    (folder / "prose.jsonl").write_text("".join(lines), encoding="utf-8")
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(folder=folder), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with its corpus and task. Shared: give ``--output`` and ``--set`` places of your own."""
    return write_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the sentences; its ids fit the small models."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")


def small_model(family: str, **changes: object) -> PreTrainedModel:
    """A random full-precision model with grouped-query attention, the same at every call.

    Weights are wide enough that logits differ by more than rounding; norm gains and biases are not neutral.
    """
    config_class, model_class = dense_classes(family)
    geometry = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "tie_word_embeddings": True,
        **PECULIARITIES.get(family, {}),
    }
    torch.manual_seed(1)
    model = model_class(config_class(**geometry | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith(".bias"):
                parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    """``make_model("llama", num_hidden_layers=3)``: see ``small_model``."""
    return small_model


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Checkpoint of a small Qwen3 with its tokenizer. Read it, or copy it before damaging it."""
    return _saved("qwen3", tmp_path_factory, tokenizer)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Checkpoint of a small Llama with its tokenizer. Read it, or copy it before damaging it."""
    return _saved("llama", tmp_path_factory, tokenizer)


@pytest.fixture(scope="session")
def wordpieces() -> PreTrainedTokenizerBase:
    """BERT's tokenizer over the sentences."""
    return wordpiece(SENTENCES)


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory, wordpieces: PreTrainedTokenizerBase) -> Path:
    """Checkpoint of a small BERT as it was pre-trained: masked-LM head, pooler, next-sentence head."""
    folder = tmp_path_factory.mktemp("models") / "bert"
    small_encoder("BertForPreTraining").save_pretrained(folder)
    wordpieces.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoder_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with columns in place of the template: what an encoder reads."""
    recipe = write_project(tmp_path_factory.mktemp("encoder_project"))
    template = next(line for line in recipe.read_text(encoding="utf-8").splitlines() if "template" in line)
    text = recipe.read_text(encoding="utf-8").replace(template, 'columns = ["text"]')
    recipe.write_text(text, encoding="utf-8")
    return recipe


def _saved(family: str, factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = factory.mktemp("models") / family
    small_model(family).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory, project: Path, llama: Path) -> Path:
    """The small Llama refined by ``bitdistill refine``."""
    return _made("refine", tmp_path_factory.mktemp("models") / "student", project, llama)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, project: Path, llama: Path) -> Path:
    """The small Llama fine-tuned by ``bitdistill sft``."""
    return _made("sft", tmp_path_factory.mktemp("models") / "teacher", project, llama)


def small_student(family: str, ternary: dict | None = None, **changes: object) -> PreTrainedModel:
    """A small random student with norm gains that are not neutral."""
    from bitdistill.model.students import STUDENT_CLASSES

    base = small_model(family, **changes)
    config_class, model_class = STUDENT_CLASSES[family]
    fields = base.config.to_dict()
    fields.pop("model_type")
    model = model_class(config_class(ternary=ternary or {}, **fields)).eval()
    report = model.load_state_dict(base.state_dict(), strict=False)
    assert all(".norm.weight" in name for name in report.missing_keys)
    with torch.no_grad():
        for name in report.missing_keys:
            model.get_parameter(name).uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="session")
def make_student() -> Callable[..., PreTrainedModel]:
    """``make_student("qwen3", {"norm_sites": "all"}, tie_word_embeddings=False)``: see ``small_student``."""
    return small_student


@pytest.fixture(scope="session")
def save_student(tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """``save_student(folder, "qwen3", {"norm_sites": "all"})`` -> folder: ``small_student`` with a tokenizer."""

    def save(folder: Path, family: str, ternary: dict, **changes: object) -> Path:
        small_student(family, ternary, **changes).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


def _made(verb: str, output: Path, recipe: Path, source: Path) -> Path:
    outcome = run_cli(verb, recipe, "--source", source, "--output", output)
    assert outcome.status == 0, outcome.err
    return output
