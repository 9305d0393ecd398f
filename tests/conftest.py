"""What every test shares: reproducible examples, one torch thread, a fixed seed, no network, and a small
project (tokenizer, models, corpus, task, recipe) to run the command line on.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
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
from command_line import Outcome, run_cli, run_python
from hypothesis import settings
from small_project import SENTENCES, train_tokenizer, write_project
from tiny_encoders import small_encoder, wordpiece
from tiny_families import small_model, small_student
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


@pytest.fixture(scope="session")
def cli() -> Callable[..., Outcome]:
    """``cli("eval", recipe, folder)`` -> status, stdout, stderr."""
    return run_cli


# --- Python in other processes ---


@pytest.fixture(scope="session")
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``python("-m", "bitdistill", "--help", processes=2)``: see ``run_python``."""
    return run_python


# --- a small project ---


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with its corpus and task. Shared: give ``--output`` and ``--set`` places of your own."""
    return write_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """See ``train_tokenizer``."""
    return train_tokenizer()


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
