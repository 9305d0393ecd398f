"""Students in other versions of transformers: without this package, and with its own tests. One JSON report.

    python tests/transformers_matrix.py --version 5.20.0 --version 5.23.0 --output benchmarks/transformers_matrix.json

A tiny student of every family is saved here with its logits. Then each version gets a virtual environment, all else as
``constraints.txt`` has it where the version allows, and there

    stock    transformers alone loads every student with ``trust_remote_code`` and must give the same logits
    own      ``tests/model`` and ``tests/train`` run with this package's source on the path

Without ``--version``: the oldest that ``pyproject.toml`` allows, and the newest that pip finds.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-5
"""Largest difference of two logits: versions may order a sum differently."""

NEEDED = (
    "torch",
    "numpy",
    "safetensors",
    "accelerate",
    "datasets",
    "rich",
    "typer",
    "jinja2",
    "pytest",
    "hypothesis",
    "peft",
    "scipy",
)
"""What transformers needs to run a student, and what the tests need."""

STOCK = """
import importlib.util, json, sys
assert importlib.util.find_spec("bitdistill") is None, "bitdistill is installed here: this would prove nothing"
import torch, transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
answers = {"transformers": transformers.__version__, "torch": torch.__version__, "difference": {}, "failed": {}}
for folder in sys.argv[1:]:
    family = folder.rpartition("/")[2]
    recorded = load_file(folder + "/recorded.safetensors")
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
        with torch.no_grad():
            logits = model(recorded["ids"]).logits
        answers["difference"][family] = float((logits - recorded["logits"]).abs().max())
    except Exception as error:
        answers["failed"][family] = f"{type(error).__name__}: {error}"[:300]
print("ANSWERS" + json.dumps(answers))
"""


def save_students(folder: Path) -> list[Path]:
    """A tiny student of every family with ``recorded.safetensors``: ids, and logits of this environment's version."""
    import torch
    from safetensors.torch import save_file

    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
    from conftest import small_student
    from tiny_families import FAMILY_NAMES
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    ids = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    folders = []
    for family in FAMILY_NAMES:
        student = small_student(family)
        folders.append(folder / family)
        student.save_pretrained(folders[-1])
        with torch.no_grad():
            logits = student(ids).logits.contiguous()
        save_file({"ids": ids, "logits": logits}, folders[-1] / "recorded.safetensors")
    return folders


def allowed_versions() -> list[str]:
    """The oldest version that the package's metadata allows, and the newest that pip finds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (wanted,) = (x for x in project["optional-dependencies"]["train"] if x.startswith("transformers"))
    oldest = re.search(r">=([\d.]+)", wanted)
    assert oldest is not None, wanted
    full = oldest[1] + ".0" * (2 - oldest[1].count("."))
    found = _run(sys.executable, "-m", "pip", "index", "versions", "transformers").stdout
    newest = re.search(r"^transformers \(([\d.]+)\)", found, re.MULTILINE)
    if newest is None:
        sys.exit("pip finds no transformers: name the versions with --version")
    return [full, newest[1]]


def make_environment(folder: Path, version: str) -> Path:
    """A virtual environment with that version; returns its interpreter."""
    python = folder / "bin" / "python"
    if not python.is_file():
        _run(sys.executable, "-m", "venv", str(folder), check=True)
    # The version says which of these go with it; the rest is the tested set.
    free = re.compile(r"^(transformers|tokenizers|huggingface|lm-eval|datasets|accelerate)", re.MULTILINE)
    pins = [
        p for p in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if not free.match(p)
    ]
    (folder / "constraints.txt").write_text("\n".join(pins) + "\n", encoding="utf-8")
    install = [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--constraint",
        str(folder / "constraints.txt"),
    ]
    _run(*install, f"transformers=={version}", *NEEDED, check=True)
    return python


def check_version(python: Path, students: list[Path]) -> dict[str, Any]:
    """What a version makes of the students and of the tests."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    clean |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(python.parents[1] / "modules")}
    stock = _run(str(python), "-I", "-c", STOCK, *map(str, students), env=clean)
    if "ANSWERS" in stock.stdout:
        answers = json.loads(stock.stdout.rpartition("ANSWERS")[2])
    else:
        answers = {"difference": {}, "failed": {"all": stock.stderr.strip()[-300:]}}
    own = _run(
        *(str(python), "-m", "pytest", "tests/model", "tests/train", "-p", "no:cacheprovider"),
        env=clean | {"PYTHONPATH": str(ROOT / "src")},
    )
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error|skipped)", own.stdout)}
    answers["tests"] = counts or {"error": (own.stdout + own.stderr).strip()[-300:]}
    near = all(value <= TOLERANCE for value in answers["difference"].values())
    answers["good"] = near and not answers["failed"] and own.returncode == 0
    return answers


def _run(
    *command: str, check: bool = False, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if check and done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return done


def main() -> None:
    """Run the matrix; exit status 1 if a version fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="append", help="of transformers; repeatable")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "transformers", help="environments and students"
    )
    parser.add_argument("--output", type=Path, help="the report, as JSON")
    options = parser.parse_args()
    students = save_students(options.work / "students")
    report: dict[str, Any] = {"tolerance": TOLERANCE, "versions": {}}
    for version in options.version or allowed_versions():
        found = check_version(make_environment(options.work / version, version), students)
        report["versions"][version] = found
        print(version, json.dumps(found), flush=True)
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.exit(not all(found["good"] for found in report["versions"].values()))


if __name__ == "__main__":
    main()
