"""Copies to be damaged."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def damaged(llama, tmp_path) -> Path:
    """A copy of the small Llama, to be damaged."""
    return Path(shutil.copytree(llama, tmp_path / "damaged"))


@pytest.fixture
def data(project, tmp_path) -> Path:
    """A copy of the project's task data, to be damaged."""
    return Path(shutil.copytree(project.parent / "task", tmp_path / "data"))
