"""Steps of a run on disk: where a step works, when it is finished, and what it was made from.

A step writes into ``<output>.partial`` and is renamed to ``<output>`` when it is complete, so a folder
without the suffix is always whole. ``run.json`` inside it holds the settings, the digest of the parent, the
versions, and the metrics; its key decides whether a later run may reuse or resume it.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from .errors import CheckpointError

RUN_FILE = "run.json"
_WEIGHT_SUFFIXES = (".safetensors", ".bin")
_TO_CONTINUE = {
    "training.precision": "Set its precision to the one it was made with to continue it.",
}
"""What to do about settings that the machine or its launcher decides."""


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name and rename, so that no reader sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value, whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def digest_of(value: Any) -> str:
    """Short digest of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def file_digest(*paths: Path) -> str:
    """Short digest of the names and contents of files."""
    state = hashlib.sha256()
    for path in paths:
        state.update(path.name.encode())
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                state.update(chunk)
    return state.hexdigest()[:16]


def checkpoint_digest(source: str | Path, revision: str | None = None) -> str:
    """Digest of a checkpoint folder's weights, config and tokenizer, or name and revision of a hub model."""
    folder = Path(source)
    if not folder.is_dir():
        return f"{source}@{revision or 'main'}"
    names = sorted(
        path
        for path in folder.iterdir()
        if path.suffix in _WEIGHT_SUFFIXES or path.name in ("config.json", "tokenizer.json")
    )
    return file_digest(*names)


def read_run(folder: str | Path) -> dict[str, Any]:
    """``run.json`` of a step folder.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = Path(folder) / RUN_FILE
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: missing or damaged run record; this folder was not written by a finished bitdistill step"
        ) from error


def processes_begun_with(output: Path, run_dir: Path) -> int | None:
    """Processes whose global batch a step is to keep: its own where it has a checkpoint, else those of its run.

    None where neither has begun.
    """
    step = Step(output, {})
    own = output if step.is_done else step.partial if step.has_checkpoint else None
    folders = [own] if own else sorted(path.parent for path in run_dir.rglob(RUN_FILE))
    for folder in folders:
        record = read_run(folder)
        processes = record["settings"].get("training", {}).get("processes")
        if processes and (own or record["status"] == "done"):
            return int(processes)
    return None


def provenance() -> dict[str, Any]:
    """Versions, machine and git revision, for the record beside every result."""
    versions = {"python": platform.python_version()}
    for package in (
        "bitdistill",
        "torch",
        "transformers",
        "accelerate",
        "tokenizers",
        "datasets",
        "numpy",
    ):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "versions": versions,
        "git_revision": git.stdout.strip() or None,
        "machine": f"{platform.machine()} {_cpu_name()}, {os.cpu_count()} cores",
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


@dataclass(frozen=True)
class Step:
    """One step of a run and its folders."""

    output: Path
    """Where the finished step lives."""
    settings: dict[str, Any]
    """Everything that decides the result: stage name, config sections, seed, digests of the inputs."""
    progress: str = "trainer/checkpoint-*"
    """Files of an unfinished step that it can go on from."""

    @property
    def partial(self) -> Path:
        """Where the step works until it is finished."""
        return self.output.with_name(self.output.name + ".partial")

    @property
    def is_done(self) -> bool:
        return (self.output / RUN_FILE).is_file()

    @property
    def has_checkpoint(self) -> bool:
        return any(self.partial.glob(self.progress))

    def begin(self) -> None:
        """Make or reopen the working folder. One that stopped before its first checkpoint is made anew.

        Raises:
            CheckpointError: the folder was made with other settings, or holds something else.
        """
        if (self.partial / RUN_FILE).is_file() and not self.has_checkpoint:
            shutil.rmtree(self.partial)
        for folder in (self.output, self.partial):
            if (folder / RUN_FILE).is_file():
                self._check_same(folder)
        if self.is_done:
            shutil.rmtree(self.output / "trainer", ignore_errors=True)  # a kill may have left it
        else:
            if self.output.exists() and not (self.output.is_dir() and not any(self.output.iterdir())):
                raise CheckpointError(
                    f"{self.output} is there already and was not made by a finished bitdistill step. "
                    "Nothing was changed. Use another name for the output"
                )
            self.partial.mkdir(parents=True, exist_ok=True)
            if not (self.partial / RUN_FILE).is_file():
                write_json(self.partial / RUN_FILE, {"status": "running", "settings": self.settings})

    def _check_same(self, folder: Path) -> None:
        before = read_run(folder)["settings"]
        changed = sorted(differences(before, self.settings))
        if changed:
            advice = "".join(
                f"{text} " for key, text in _TO_CONTINUE.items() if any(key in c for c in changed)
            )
            raise CheckpointError(
                f"{folder} was made with other settings ({'; '.join(changed)}). "
                f"Nothing was changed. {advice}Use another name or --set output_dir=..., or delete that folder to "
                "redo it."
            )

    def finish(self, metrics: dict[str, Any], seconds: float) -> Path:
        """Write the record, give the folder its final name, and drop resume files: last, so that a kill or a full
        disk on the way costs no training."""
        record = {
            "status": "done",
            "settings": self.settings,
            "metrics": metrics,
            "time_s": round(seconds, 2),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        write_json(self.partial / RUN_FILE, record | provenance())
        os.rename(self.partial, self.output)
        shutil.rmtree(self.output / "trainer", ignore_errors=True)
        return self.output


def differences(before: Any, after: Any, prefix: str = "") -> list[str]:
    """Dotted keys whose values differ, with both values."""
    if isinstance(before, dict) and isinstance(after, dict):
        found = []
        for key in before.keys() | after.keys():
            found += differences(before.get(key), after.get(key), f"{prefix}.{key}" if prefix else key)
        return found
    return [] if before == after else [f"{prefix}: {before!r} there, {after!r} now"]
