"""Every family of the table from the command line, on a tiny model of it; what is refused, and the remedies."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_families import ENCODER_NAMES, FAMILY_NAMES, PECULIARITIES, dense_classes, families
from transformers import Gemma3Config, SiglipVisionConfig

from bitdistill.errors import CheckpointError
from bitdistill.model import STUDENT_CLASSES
from bitdistill.train.loading import load_model

ROOT = Path(__file__).parent.parent
DOCS = (ROOT / "docs" / "adding_a_family.md").read_text(encoding="utf-8")


def metrics(step: Path) -> list[dict]:
    return [json.loads(line) for line in (step / "metrics.jsonl").read_text().splitlines()]


@families
def test_every_stage_runs(cli, project, make_model, tokenizer, tmp_path, family):
    base, refined, pretrained, teacher, student = (
        tmp_path / name for name in ("base", "refined", "pretrained", "teacher", "student")
    )
    make_model(family).save_pretrained(base)
    tokenizer.save_pretrained(base)

    small = ["--set", f"output_dir={tmp_path / 'runs'}", "--set", "pretrain.tokens=128"]

    def run(verb: str, source: Path, output: Path, *options: object) -> None:
        outcome = cli(verb, project, "--source", source, "--output", output, *options, *small)
        assert outcome.status == 0, outcome.err

    run("refine", base, refined, "--set", "refine.gain=rms")
    run("pretrain", refined, pretrained)
    run("sft", base, teacher)
    run("distill", pretrained, student, "--teacher", teacher)

    # Everything the base knew is in the refined student, and every latent that should learn has moved since.
    weights = [load_file(folder / "model.safetensors") for folder in (base, refined, pretrained, student)]
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())
    for earlier, later in itertools.pairwise(weights[1:]):
        assert all(not torch.equal(later[name], earlier[name]) for name in earlier if "proj" in name)
    parts = [row for row in metrics(student) if "loss/relation_kd" in row]
    assert parts
    for row in parts:
        assert all(0 < row[f"loss/{part}"] < 1e4 for part in ("ce", "logits_kd", "relation_kd"))

    assert type(load_model(student)) is STUDENT_CLASSES[family][1]
    assert type(load_model(teacher)) is dense_classes(family)[1]
    outcome = cli("eval", project, student)
    assert outcome.status == 0, outcome.err
    assert "accuracy" in outcome.out


# --- what is no plain decoder ---


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory, tokenizer, make_model) -> Path:
    """A tiny Gemma 3 with eyes."""
    folder = tmp_path_factory.mktemp("models") / "gemma3"
    text = make_model("gemma3_text").config.to_dict()
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = Gemma3Config(text_config=text, vision_config=vision.to_dict(), mm_tokens_per_image=4)
    torch.manual_seed(3)
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("verb", ["refine", "sft", "run"])
def test_a_multimodal_model_is_refused_by_its_config_alone(cli, project, multimodal, tmp_path, verb):
    """Before gigabytes of weights are read; the remedy names a text checkpoint and the page."""
    source = tmp_path / "gemma3"
    source.mkdir()
    for path in multimodal.iterdir():
        if path.suffix != ".safetensors":
            (source / path.name).write_bytes(path.read_bytes())
    arguments = (
        ("--set", f"model.source={source}", "--set", f"output_dir={tmp_path / 'runs'}")
        if verb == "run"
        else ("--source", source, "--output", tmp_path / "new")
    )
    outcome = cli(verb, project, *arguments)
    assert outcome.status == 1
    (line,) = outcome.err.strip().splitlines()
    assert line.startswith(
        f"error: {source}: gemma3 is a multimodal model around a text decoder of type gemma3_text"
    )
    assert "google/gemma-3-1b-pt" in line
    assert "docs/adding_a_family.md" in line


def test_the_lines_of_the_page_save_the_text_decoder_alone(multimodal, tmp_path):
    (lines,) = (
        block.removeprefix("python\n")
        for block in DOCS.split("```")
        if "AutoModelForImageTextToText" in block
    )
    lines = lines.replace("google/gemma-3-4b-pt", str(multimodal)).replace(
        "gemma-3-4b-text", str(tmp_path / "text")
    )
    exec(lines, {})
    whole = transformers.AutoModelForImageTextToText.from_pretrained(multimodal).eval()
    text = load_model(tmp_path / "text").eval()
    ids = torch.randint(2, 300, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(text(ids).logits, whole(ids).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 caps the logits.*without it"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention.*causal language model"),
    ],
)
def test_a_gemma_that_would_be_judged_wrongly_is_refused(make_model, tmp_path, change, message):
    make_model("gemma3_text", **change).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


# --- the page and the table ---


def test_the_page_lists_the_families_of_the_table():
    rows = [line.split("|") for line in DOCS.splitlines() if line.startswith("| `") and line.count("|") == 6]
    runs = {row[1].strip(" `"): row[5].strip() for row in rows}
    assert runs == dict.fromkeys(FAMILY_NAMES, "yes") | dict.fromkeys(ENCODER_NAMES, "no")


def test_peculiarities_name_families_and_settings_that_exist():
    for family, settings in PECULIARITIES.items():
        config = dense_classes(family)[0]()
        for name in settings:
            assert hasattr(config, name) or hasattr(config, f"_{name}"), name
