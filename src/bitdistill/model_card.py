"""The README.md of an exported model: what it is, what it came from, under which licence."""

import re
from pathlib import Path

from .checkpoint import RUN_FILE, read_run
from .errors import CheckpointError

_FIELDS = ("license", "license_name", "license_link", "base_model", "language")


def model_card(source: str | Path, model_type: str, licence: str | None = None) -> str:
    """Markdown with the Hub's front matter. ``licence`` wins over what the checkpoint's own card says."""
    known = card_fields(Path(source))
    if licence:
        known = {k: v for k, v in known.items() if not k.startswith("license")} | {"license": licence}
    front = [f"{key}: {value}" for key, value in known.items()]
    front += ["library_name: bitdistill", "tags: [bitdistill, ternary, 1.58-bit]"]
    origin = (
        f"Base model: {known['base_model']}." if "base_model" in known else "The base model is not recorded."
    )
    terms = (
        f"Licence of the base model: {known['license']}. It covers this model too."
        if "license" in known
        else "The licence of the base model is not recorded in the checkpoint; find it before you share this model."
    )
    lines = [
        "---",
        *front,
        "---",
        "# Ternary student",
        "",
        f"A 1.58-bit (ternary) model of type `{model_type}`, packed by bitdistill for its CPU engine:",
        "`bitdistill chat MODEL`, or `Engine(path).generate(...)` in Python.",
        "",
        origin,
        terms,
        *_how_it_was_made(Path(source)),
    ]
    return "\n".join(lines) + "\n"


def card_fields(folder: Path) -> dict[str, str]:
    """Licence and base model from the front matter of a checkpoint's README.md, as written there."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    front = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", text, re.DOTALL)
    if front is None:
        return {}
    found = {}
    for line in front[1].splitlines():
        key, _, value = line.partition(":")
        if key in _FIELDS and value.strip():
            found[key] = value.strip()
    return found


def _how_it_was_made(folder: Path) -> list[str]:
    if not (folder / RUN_FILE).is_file():
        return []
    try:
        record = read_run(folder)
    except CheckpointError:
        return []
    stage = record.get("settings", {}).get("stage", "unknown")
    return ["", f"Last step: {stage}, finished {record.get('finished', 'at an unknown time')}."]
