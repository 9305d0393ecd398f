"""Which checkpoint of an interrupted training can be gone on from."""

import json
import logging
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .sharding import holds_shards

logger = logging.getLogger(__name__)


def resume_point_of(trainer_dir: Path) -> str | None:
    """The last checkpoint that was written to its end and can be opened.

    An incomplete one stays where it is: training comes past its step again and writes over it.
    """
    checkpoints = sorted(trainer_dir.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in reversed(checkpoints):
        if _is_whole(path):
            return str(path)
        logger.warning("%s is incomplete (killed while saving?); using an earlier one", path)
    return None


def _is_whole(checkpoint: Path) -> bool:
    """Whether state, weights and optimizer can be opened."""
    try:
        steps_done(str(checkpoint))
        if holds_shards(checkpoint):
            return True
        with safe_open(checkpoint / "model.safetensors", framework="pt"):
            pass
    except (OSError, ValueError, KeyError, SafetensorError):
        return False
    return zipfile.is_zipfile(checkpoint / "optimizer.pt")


def steps_done(checkpoint: str) -> int:
    """Optimizer steps that a Trainer checkpoint has behind it."""
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    return int(state["global_step"])
