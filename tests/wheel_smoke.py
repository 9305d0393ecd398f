"""The sdist and the wheel in ``dist``: what is in them, and whether the wheel runs where nothing else is installed.

    python tests/wheel_smoke.py [--dist dist] [--python python3.13]
    python tests/wheel_smoke.py --student FOLDER

The first makes a tiny student here, with torch, and an environment that holds the wheel and its run-time dependencies
alone; there ``wheel_check.py`` runs the student. The second only makes the student, for an environment elsewhere.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NEW_TOKENS = 24
MARGIN = 0.02
"""Distance of the two best logits, in standard deviations of the logits, that rounding does not bridge."""
TEXTS = 3

TOP_OF_SDIST = {
    "CHANGELOG.md", "CMakeLists.txt", "LICENSE", "PKG-INFO", "README.md", "THIRD_PARTY_LICENSES", "csrc",
    "pyproject.toml", "src",
}  # fmt: skip
MOST_BYTES = {"sdist": 1_000_000, "wheel": 2_000_000}


def make_student(folder: Path) -> None:
    """A packed student in ``model``, and in ``expected.json`` what transformers writes with the same weights."""
    import torch
    from small_project import SENTENCES, train_tokenizer
    from tiny_families import small_student
    from transformers import AutoModelForCausalLM

    from bitdistill import _core
    from bitdistill.export import export

    torch.set_num_threads(1)
    tokenizer = train_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }} . {% endfor %}"
    with tempfile.TemporaryDirectory() as checkpoint:
        small_student("qwen3").save_pretrained(checkpoint)
        tokenizer.save_pretrained(checkpoint)
        facts = export(checkpoint, folder / "model", head="f32")
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()

    def greedy(prompt: list[int]) -> list[int]:
        """Every token from a pass over the whole text, without cache, up to one that rounding may decide."""
        ids: list[int] = []
        while len(ids) < NEW_TOKENS:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids])).logits[0, -1]
            best, second = logits.topk(2).values
            token = int(logits.argmax())
            if best - second < MARGIN * logits.std() or token == tokenizer.eos_token_id:
                break
            ids.append(token)
        return ids

    answers = [(greedy(tokenizer(prompt).input_ids), prompt) for prompt in SENTENCES]
    answers = sorted(answers, key=lambda pair: len(pair[0]))[-TEXTS:]
    assert all(len(ids) >= NEW_TOKENS // 2 for ids, _ in answers), answers
    texts = [{"prompt": prompt, "ids": ids, "text": tokenizer.decode(ids)} for ids, prompt in answers]
    messages = [{"role": "user", "content": "the soup"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    chat = greedy(tokenizer(rendered, add_special_tokens=False).input_ids)
    assert chat
    expected: dict[str, Any] = {
        "machine": platform.machine(),
        "rooms": _core.compiled_isas(),
        "facts": facts,
        "texts": texts,
        "chat": {"prompt": messages[0]["content"], "ids": chat},
    }
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


def check_contents(sdist: Path, wheel: Path) -> None:
    """All that a build needs and nothing else in the sdist; the package and its licences in the wheel."""
    with tarfile.open(sdist) as archive:
        inside = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    astray = {path for path in inside if path.parts[:1] and path.parts[0] not in TOP_OF_SDIST}
    astray |= {path for path in inside if path.suffix in (".so", ".pyc")}
    assert not astray, f"{sdist}: {sorted(map(str, astray))}"
    missing = {path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*") if path.is_file()} - inside
    assert not missing, f"{sdist} lacks {sorted(map(str, missing))}"
    with zipfile.ZipFile(wheel) as archive:
        names = {Path(name) for name in archive.namelist() if not name.endswith("/")}
    package = {path for path in names if path.parts[0] == "bitdistill"}
    metadata = {path for path in names if path.parts[0] == f"bitdistill-{wheel.name.split('-')[1]}.dist-info"}
    astray = names - package - metadata
    astray |= {path for path in package if path.suffix not in (".py", ".pyi", ".so", ".toml", ".typed")}
    assert not astray, f"{wheel}: {sorted(map(str, astray))}"
    assert len({path for path in package if path.suffix == ".so"}) == 1, "one core is expected"
    assert {path.name for path in metadata} >= {"LICENSE", "THIRD_PARTY_LICENSES"}, "the licences are missing"
    for kind, path in (("sdist", sdist), ("wheel", wheel)):
        assert path.stat().st_size <= MOST_BYTES[kind], f"{path}: {path.stat().st_size:,} bytes"
        print(f"{path.name}: {path.stat().st_size:,} bytes")


def check_wheel(wheel: Path, interpreter: str, student: Path) -> None:
    """Install into an empty environment and run ``wheel_check.py`` there."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([interpreter, "-m", "venv", folder], check=True)
        python = Path(folder) / "bin" / "python"
        alone = os.environ | {"PATH": str(python.parent)}
        install = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:")
        subprocess.run([python, *install, wheel], env=alone, check=True)
        subprocess.run([python, "-m", "pip", "check"], env=alone, check=True)
        subprocess.run([python, ROOT / "tests" / "wheel_check.py", student], env=alone, check=True)


def main() -> None:
    """Smoke test; exit status 1 if it fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="folder of one sdist and one wheel")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the empty environment")
    parser.add_argument("--student", type=Path, metavar="FOLDER", help="only make the student, here")
    options = parser.parse_args()
    if options.student:
        make_student(options.student)
        return
    try:
        (sdist,), (wheel,) = options.dist.glob("*.tar.gz"), options.dist.glob("*.whl")
    except ValueError:
        sys.exit(f"{options.dist}: one sdist and one wheel are needed there; run: make wheel")
    check_contents(sdist, wheel)
    with tempfile.TemporaryDirectory() as folder:
        make_student(Path(folder))
        check_wheel(wheel, options.python, Path(folder))


if __name__ == "__main__":
    main()
