"""Unpack the real data of the study into the layout its recipes read.

    python benchmarks/real_input/prepare.py DATA OUT

DATA holds ``corpora/`` (eltec_eng.tar.xz, openstax.tar.xz, pepys_diary.txt.xz, *.txt), ``sst2/``, ``qnli/`` and
``mnli/`` (GLUE's TSV files, ``train_subset.tsv`` where there is a part of the training data) and
``checkpoints/stories260K/hf``. OUT receives ``corpus/`` (prose), ``stories.jsonl`` (a TinyStories story a line), the
tasks and ``stories260K/`` (the checkpoint, with its tokenizer's end-of-text token set to the one that its config names:
the separator it was trained with).
"""

import json
import lzma
import shutil
import sys
import tarfile
from pathlib import Path

STORY_END = "<|endoftext|>"


def main(data: Path, out: Path) -> None:
    """Write everything; existing files are replaced."""
    corpus = out / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for name in ("eltec_eng", "openstax"):
        with tarfile.open(data / "corpora" / f"{name}.tar.xz") as archive:
            archive.extractall(corpus, filter="data")
    (corpus / "pepys_diary.txt").write_bytes(
        lzma.decompress((data / "corpora" / "pepys_diary.txt.xz").read_bytes())
    )
    for path in (data / "corpora").glob("*.txt"):
        shutil.copyfile(path, corpus / path.name)
    stories = (data / "corpora" / "tinystories_sample_2MB.txt").read_text(encoding="utf-8").split(STORY_END)
    with (out / "stories.jsonl").open("w", encoding="utf-8") as stream:
        for story in filter(None, map(str.strip, stories)):
            stream.write(json.dumps({"text": story}) + "\n")
    for task in ("sst2", "qnli", "mnli"):
        (out / task).mkdir(exist_ok=True)
        for path in (data / task).glob("*.tsv"):
            shutil.copyfile(path, out / task / path.name.replace("_subset", ""))
    checkpoint = out / "stories260K"
    checkpoint.mkdir(exist_ok=True)
    for path in (data / "checkpoints" / "stories260K" / "hf").iterdir():
        (checkpoint / path.name).write_bytes(path.read_bytes())
    config = checkpoint / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(settings | {"eos_token": settings["bos_token"]}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
