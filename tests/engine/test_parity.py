"""benchmarks/parity.py on small students of every family, and that it notices what it is there to notice."""

from collections.abc import Callable
from pathlib import Path

import parity
import pytest
import torch

from bitdistill.recipe import load_recipe
from bitdistill.train.loading import load_model

PROMPTS = ["the soup was", "the room seemed very", "the host"]


@pytest.mark.parametrize(
    ("family", "ternary"),
    [
        ("llama", {}),
        ("llama", {"granularity": "block", "block_size": 16}),
        ("qwen3", {"norm_sites": "all"}),
        ("qwen3", {"scale": "learned"}),
    ],
)
def test_small_students_are_at_parity(
    save_student: Callable[..., Path], family: str, ternary: dict, tmp_path: Path
) -> None:
    report = parity.compare(save_student(tmp_path / "student", family, ternary), PROMPTS, 16, threads=1)
    assert parity.failures(report) == []
    assert report["differing_trits"] == 0
    assert report["activation_codes"] > 1000


def test_task_and_text_of_a_recipe_are_compared_too(
    save_student: Callable[..., Path], project: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(project)
    report = parity.compare(
        save_student(tmp_path / "student", "llama", {}), PROMPTS[:1], 4, threads=1, recipe=recipe, task=True
    )
    assert parity.failures(report) == []
    assert report["decisions"]["items"] == 18
    report["decisions"]["different"] = [{"item": 3, "margin": 0.2}]
    report["perplexity"] = {"torch": 1000.0, "engine": 1002.0}
    assert parity.failures(report) == [
        "unexplained decision {'item': 3, 'margin': 0.2}",
        "perplexity is 1.00200 of torch's",
    ]


def test_other_weights_are_noticed(
    save_student: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_student(tmp_path / "student", "llama", {})

    def another(folder: Path) -> torch.nn.Module:
        model = load_model(folder)
        with torch.no_grad():
            weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
            weight.copy_(weight.flip(0))
        return model

    monkeypatch.setattr(parity, "load_model", another)
    found = parity.failures(parity.compare(source, PROMPTS[:1], 16, threads=1))
    assert any("trits differ" in text for text in found)
    assert any("activation codes" in text for text in found)
