"""An installed wheel without compiler and torch: it writes what transformers writes, and says what is missing.

    python tests/wheel_check.py STUDENT

STUDENT is the folder of ``wheel_smoke.py --student``. Needs the wheel and the standard library alone. It starts itself
again in isolated mode, so that no source tree is found, and with its environment's own programs alone on the path.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TOOLS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "ld", "make", "ninja", "cmake")
LEFT_OUT = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "matplotlib",
    "lm_eval",
    "nanobind",
    "scikit_build_core",
)

STEP = ("recipe.toml", "--source", "x", "--output", "y")
WITHOUT_TORCH: dict[str, tuple[tuple[str, ...], str]] = {
    "demo": ((), "train"),
    "run": (("recipe.toml",), "train"),
    "base": (("recipe.toml",), "train"),
    "refine": (STEP, "train"),
    "pretrain": (STEP, "train"),
    "sft": (STEP, "train"),
    "distill": ((*STEP, "--teacher", "z"), "train"),
    "eval": (("recipe.toml", "x"), "train"),
    "inspect": (("x",), "train"),
    "trim": (("x", "y"), "train"),
    "sweep": (("recipe.toml",), "train"),
    "export": (("x", "y"), "train"),
    "lm-eval": (("x", "--tasks", "arc_easy"), "eval"),
}
"""Verb -> arguments with which it needs more than the wheel brings, and the extra that it must name."""

WORKING = {"inspect", "generate", "chat", "bench", "report"}
"""Verbs that work here (``report`` as far as finding the run)."""


def check_surroundings() -> None:
    """No compiler, no torch, and the package comes from this environment."""
    reachable = [tool for tool in TOOLS if shutil.which(tool)]
    assert not reachable, f"on the path: {reachable}"
    found = [name for name in LEFT_OUT if importlib.util.find_spec(name)]
    assert not found, f"installed here: {found}"
    import bitdistill

    assert Path(bitdistill.__file__).is_relative_to(sys.prefix), bitdistill.__file__


def check_engine(model: Path, expected: dict[str, Any]) -> None:
    """Every room of this CPU writes the same ids as transformers."""
    from bitdistill import Engine, _core

    rooms = _core.compiled_isas()
    if expected["machine"] == platform.machine():
        assert rooms == expected["rooms"], (
            f"{rooms} in the wheel, {expected['rooms']} where the model was made"
        )
    for room in _core.available_isas():
        os.environ["BITDISTILL_ISA"] = room
        engine = Engine(model, threads=2, kv_cache="fp32")
        for case in expected["texts"]:
            answer = engine.generate(case["prompt"], max_new_tokens=len(case["ids"]))
            assert answer.tokens == case["ids"], (room, case, answer)
    os.environ.pop("BITDISTILL_ISA", None)
    tokens = sum(len(case["ids"]) for case in expected["texts"])
    print(
        f"{tokens} greedy tokens are transformers' in {', '.join(_core.available_isas())} (of {', '.join(rooms)})"
    )


def check_command_line(model: Path, expected: dict[str, Any]) -> None:
    """generate, chat, inspect and bench on the model."""
    exact = ("--kv-cache", "fp32")
    assert bitdistill("--version") == f"bitdistill {importlib.metadata.version('bitdistill')}\n"
    for case in expected["texts"]:
        limit = ("--max-new-tokens", str(len(case["ids"])))
        text = bitdistill("generate", str(model), case["prompt"], *limit, *exact, "--json", "out.json")
        assert text == case["text"] + "\n", (case, text)
        assert json.loads(Path("out.json").read_text(encoding="utf-8"))["tokens"] == case["ids"]
    chat = expected["chat"]
    limit = ("--max-new-tokens", str(len(chat["ids"])))
    bitdistill("chat", str(model), *limit, *exact, "--json", "chat.json", stdin=chat["prompt"] + "\n")
    (turn,) = json.loads(Path("chat.json").read_text(encoding="utf-8"))["turns"]
    assert turn["tokens"] == chat["ids"], turn
    bitdistill("inspect", str(model), "--json", "facts.json")
    assert json.loads(Path("facts.json").read_text(encoding="utf-8")) == expected["facts"]
    bitdistill("bench", str(model), "--threads", "1", "--json", "bench.json")
    records = json.loads(Path("bench.json").read_text(encoding="utf-8"))
    assert {record["phase"] for record in records} == {"prefill", "decode"}, records
    assert all(record["tok_s"] > 0 for record in records), records


def check_what_is_missing() -> None:
    """Every other verb names the extra that it needs, in one line."""
    from bitdistill.cli import app

    verbs = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert verbs == WITHOUT_TORCH.keys() | WORKING, (
        f"say here what they do: {verbs ^ (WITHOUT_TORCH.keys() | WORKING)}"
    )
    Path("recipe.toml").write_text('name = "smoke"\n', encoding="utf-8")
    for verb, (arguments, extra) in WITHOUT_TORCH.items():
        message = bitdistill(verb, *arguments, fails=True)
        assert message.endswith(f"install it with: pip install 'bitdistill[{extra}]'\n"), (verb, message)
        assert message.count("\n") == 1, (verb, message)
    message = bitdistill("report", "x", fails=True)
    assert "no such file" in message, message
    assert message.count("\n") == 1, message


def bitdistill(*arguments: str, fails: bool = False, stdin: str = "") -> str:
    """Standard output of a command that succeeds, standard error of one that must fail."""
    done = subprocess.run(
        ["bitdistill", *arguments], input=stdin, capture_output=True, text=True, check=False
    )
    assert done.returncode == int(fails), (arguments, done)
    return done.stderr if fails else done.stdout


def main() -> None:
    """Check; exit status 1 and the assertion that fails otherwise."""
    student = Path(sys.argv[1]).resolve()
    programs = str(Path(sys.executable).parent)
    if os.environ["PATH"] != programs or not sys.flags.isolated:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-I", __file__, str(student)]
            alone = {"PATH": programs, "HOME": folder, "LANG": "C.UTF-8"}
            sys.exit(subprocess.run(command, cwd=folder, env=alone, check=False).returncode)
    expected = json.loads((student / "expected.json").read_text(encoding="utf-8"))
    check_surroundings()
    check_engine(student / "model", expected)
    check_command_line(student / "model", expected)
    check_what_is_missing()
    version = platform.python_version()
    print(
        f"bitdistill {importlib.metadata.version('bitdistill')} on Python {version}, {platform.machine()}: good"
    )


if __name__ == "__main__":
    main()
