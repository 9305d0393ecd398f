"""Copy a trained base in bf16, with its tokenizer and its record, into a folder small enough to commit.

python benchmarks/bases/publish.py CHECKPOINT OUT
"""

import json
import shutil
import sys
from pathlib import Path

import torch

from bitdistill.train.loading import load_model, load_tokenizer, save_model


def main(source: Path, out: Path) -> None:
    """Write weights in bf16, tokenizer, ``metrics.jsonl`` and ``run.json``."""
    model = load_model(source).to(torch.bfloat16)
    out.mkdir(parents=True, exist_ok=True)
    save_model(model, load_tokenizer(source), out)
    for name in ("metrics.jsonl", "run.json"):
        shutil.copy(source / name, out / name)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(json.dumps({"folder": str(out), "bytes": size}))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
