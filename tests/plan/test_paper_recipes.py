"""Every recipe of the paper is planned with the published configs: no weights are there, and none are needed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from published import BILLIONS, CONFIGS, LINEAR_MILLIONS

from bitdistill.config import Recipe
from bitdistill.plan import Machine, plan_run
from bitdistill.recipe import load_recipe

FOLDER = Path(__file__).parents[2] / "recipes" / "paper"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.toml"))
MI300X = Machine(processes=8, flops=1.3e15, memory=192e9)
"""What the paper used: eight of them, 192 GB each; dense bf16 by the data sheet."""


@pytest.fixture(scope="module")
def published(tmp_path_factory, tokenizer) -> Path:
    """A folder for each model, with its config and a tokenizer and nothing else."""
    root = tmp_path_factory.mktemp("published")
    for name, config in CONFIGS.items():
        tokenizer.save_pretrained(root / name)
        (root / name / "config.json").write_text(json.dumps(config))
    return root


def recipe_of(name: str, published: Path) -> Recipe:
    model = name.rpartition("-")[0]
    return load_recipe(FOLDER / f"{name}.toml", [f"model.source={published / model}"])


def test_there_is_one_for_every_result_of_the_papers_tables():
    qwen3 = [
        f"qwen3-{size}-{task}"
        for size in ("0.6b", "1.7b", "4b")
        for task in ("mnli", "qnli", "sst2", "cnndm")
    ]
    assert sorted(RECIPES) == sorted([*qwen3, "qwen2.5-0.5b-mnli", "gemma3-1b-mnli"])


@pytest.mark.parametrize("name", RECIPES)
def test_they_say_what_the_paper_states(name):
    recipe = load_recipe(FOLDER / f"{name}.toml")
    distill = recipe.distill
    weights = (1.0, 1e3) if name.endswith("cnndm") else (10.0, 1e5)
    assert (distill.lambda_logits, distill.gamma_relation) == weights
    assert (distill.temperature, distill.relation_form, len(distill.relation_layers)) == (
        5.0,
        "scaled_dot",
        1,
    )
    assert (distill.tau_squared, recipe.refine.norm_sites) == (False, "subln")
    assert recipe.pretrain.tokens == 10_000_000_000
    assert recipe.corpus.source == "hub:tiiuae/falcon-refinedweb"
    assert (recipe.task.max_length, recipe.corpus.sequence_length) == (512, 512)
    for section in (recipe.pretrain, recipe.sft, recipe.distill):
        assert section.batch_size * section.gradient_accumulation_steps == 32
    assert recipe.model.source.count("/") == 1


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_planned_with_the_published_config(published, name):
    plan = plan_run(recipe_of(name, published), MI300X)
    steps = {step["folder"].partition("/")[0]: step for step in plan["steps"]}
    assert list(steps) == [
        "fp16_sft", "refine-none", "bitnet_sft", "refine-subln", "pretrain-subln", "bitdistill",
    ]  # fmt: skip
    assert len(plan["steps"]) == 12  # three learning rates for each of three methods
    model = name.rpartition("-")[0]
    plain, subln = plan["models"]
    assert plain["parameters_before"] / 1e9 == pytest.approx(BILLIONS[model], rel=3e-3)
    layers = CONFIGS[model]["num_hidden_layers"]
    assert (subln["linears"], subln["norms"], plain["norms"]) == (7 * layers, 2 * layers, 0)
    if model in LINEAR_MILLIONS:
        ternary = subln["ternary_share"] * subln["parameters"]
        assert ternary / 1e6 == pytest.approx(LINEAR_MILLIONS[model], abs=0.1)
    stage2 = steps["pretrain-subln"]
    # One position of 512 predicts nothing; 8 processes see 256 sequences a step.
    assert stage2["optimizer_steps"] == -(-10_000_000_000 // (256 * 512))
    assert 10_000_000_000 <= stage2["tokens"] < 10_000_000_000 + 256 * 512
    assert stage2["flops"] == pytest.approx(6 * BILLIONS[model] * 1e9 * 1e10, rel=0.25)
    assert stage2["seconds"] == pytest.approx(stage2["flops"] / (8 * 1.3e15 * 0.4))
    memory = steps["bitdistill"]["memory"]
    assert memory["teacher"] == pytest.approx(4e9 * BILLIONS[model], rel=3e-3)
    assert memory["ddp"] < 192e9
    assert memory["fsdp2"] < memory["ddp"]
    assert "upper bound" in plan["task"]["basis"]


def test_the_largest_is_planned_in_little_memory(published, tmp_path):
    """Qwen3-4B has 16 GB of latents and takes 116 GB in stage 3; the process may hold 2.5, libraries included."""
    code = """
import resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (2_500_000_000,) * 2)
from bitdistill import cli
cli.main()
"""
    source = published / "qwen3-4b"
    before = sorted(path.name for path in source.iterdir())
    assert not any(name.endswith((".safetensors", ".bin")) for name in before)
    arguments = [
        "run", FOLDER / "qwen3-4b-sst2.toml", "--dry-run", "--flops", "1.3e15", "--device-memory", "80e9",
        "--set", f"model.source={source}", "--set", f"output_dir={tmp_path / 'runs'}",
        "--set", "run.learning_rates=[1e-5]",
        "--set", "run.methods=['bitdistill:no_pretrain']", "--json", tmp_path / "plan.json",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    (stage3,) = (step for step in plan["steps"] if step["stage"] == "distill")
    assert 1e11 < stage3["memory"]["peak"] < 1.3e11
    assert "warning: bitdistill-no_pretrain takes" in done.stderr
    assert "which has 80.00 GB" in done.stderr
    assert sorted(path.name for path in source.iterdir()) == before
    assert not (tmp_path / "runs").exists()
