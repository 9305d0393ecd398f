"""A trained Llama from the world outside: refined, saved and loaded again; its text scores as it should."""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitdistill.config import CorpusConfig
from bitdistill.data.corpus import PackedSequences, build_shards
from bitdistill.evaluate import TorchScorer
from bitdistill.model import BitLinear
from bitdistill.model.quant import ternarize
from bitdistill.train.loading import load_model, load_tokenizer

TEXT = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."


@pytest.fixture(scope="module")
def source(shared_data) -> Path:
    folder = shared_data / "checkpoints" / "stories260K" / "hf"
    if not folder.is_dir():
        pytest.skip("the stories260K checkpoint is not beside the repository")
    return folder


@pytest.fixture(scope="module")
def refined(cli, project, source, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("real") / "student"
    outcome = cli("refine", project, "--source", source, "--output", output)
    assert outcome.status == 0, outcome.err
    return output


def logits(model: torch.nn.Module, tokenizer) -> torch.Tensor:
    with torch.no_grad():
        return model(**tokenizer(TEXT, return_tensors="pt")).logits


def test_the_checkpoint_loads_as_it_was_trained(source):
    """It is a language model: it predicts a children's story far better than chance."""
    model, tokenizer = load_model(source), load_tokenizer(source)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert loss < math.log(model.config.vocab_size) / 2.5


def test_the_student_keeps_every_weight_and_survives_saving(source, refined, tmp_path):
    model, student = AutoModelForCausalLM.from_pretrained(source), load_model(refined)
    ternary = {name: m for name, m in student.named_modules() if isinstance(m, BitLinear)}
    assert len(ternary) == 7 * model.config.num_hidden_layers
    for name, tensor in model.state_dict().items():
        assert torch.equal(student.state_dict()[name], tensor), name
    tokenizer = AutoTokenizer.from_pretrained(refined)
    before = logits(student.eval(), tokenizer)
    student.save_pretrained(tmp_path)
    assert torch.equal(logits(load_model(tmp_path).eval(), tokenizer), before)
    assert not torch.allclose(before, logits(model.eval(), tokenizer))
    codes = torch.cat([ternarize(m.weight)[0].flatten() for m in ternary.values()])
    assert set(codes.unique().tolist()) == {-1.0, 0.0, 1.0}


def test_the_student_loads_without_the_package(refined, tmp_path):
    """In a process that cannot import it, through trust_remote_code, with the same logits."""
    folder = shutil.copytree(refined, tmp_path / "student")
    code = """
import sys
sys.modules["bitdistill"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text, path = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    torch.save(model(**AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")).logits, path)
"""
    path = tmp_path / "logits.pt"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), TEXT, str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    mine = logits(load_model(refined).eval(), AutoTokenizer.from_pretrained(refined))
    torch.testing.assert_close(torch.load(path), mine, rtol=1e-6, atol=1e-6)


def test_documents_begin_as_the_tokenizer_begins_them_and_perplexity_is_low(source, tmp_path):
    """The model was trained on texts behind its begin-of-text token."""
    model, tokenizer = load_model(source), load_tokenizer(source)
    (tmp_path / "a.txt").write_text(f"{TEXT}\n" * 30)
    config = CorpusConfig(source=str(tmp_path / "a.txt"), pretrain_share=1)
    sequences = PackedSequences(build_shards(config, "pretrain", tokenizer, tmp_path), 32)
    assert sequences[0]["input_ids"][0] == tokenizer.bos_token_id
    assert sequences[0]["input_ids"].tolist() == tokenizer(f"{TEXT}\n" * 2)["input_ids"][:32]
    assert TorchScorer(model, tokenizer).perplexity(sequences) < 12
