"""What the tests of bad input share: what a refusal looks like, and ways to damage a checkpoint."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PROGRESS = re.compile(r"  \d+/\d+  .* left \d+ s")
WEIGHT = "model.layers.1.mlp.up_proj.weight"


def refused(outcome, *fragments: object) -> str:
    """The message of a command that ended with one, with nothing but progress lines before it."""
    assert outcome.status == 1, outcome.err
    lines = [line for line in outcome.err.splitlines() if line.strip() and not PROGRESS.search(line)]
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("error: ")
    for fragment in fragments:
        assert str(fragment) in lines[0]
    return lines[0]


def refused_full(outcome) -> None:
    message = refused(outcome)
    assert "disk" in message
    assert "full" in message
    assert "run the same command again" in message


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def weights_digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def distill(cli, project, student, teacher, output, *settings):
    overrides = [argument for setting in settings for argument in ("--set", setting)]
    return cli("distill", project, "--source", student, "--teacher", teacher, "--output", output, *overrides)
