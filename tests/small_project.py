"""A recipe with its corpus and its task: little English of a few words, learnt in seconds."""

import itertools
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

WORDS = (
    ("soup", "room", "view", "host"),
    ("was", "seemed"),
    ("very", "not", "quite"),
    ("good", "bad", "warm"),
)
SENTENCES = [f"the {' '.join(words)} ." for words in itertools.product(*WORDS)]

RECIPE = """
name = "small"
output_dir = "{folder}/runs"

[corpus]
source = "{folder}/prose.jsonl"
sequence_length = 16
pretrain_share = 0.8

[task]
name = "jsonl"
data_dir = "{folder}/task"
template = "{{text}} It was"
labels = [" bad", " good"]
max_length = 48

[pretrain]
precision = "fp32"
tokens = 512
batch_size = 4
log_every = 1

[sft]
precision = "fp32"
epochs = 1
batch_size = 8
log_every = 1

[distill]
precision = "fp32"
epochs = 1
batch_size = 8
relation_heads = 2
gamma_relation = 10
log_every = 1
"""


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the sentences; its ids fit the small models."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")


def write_project(folder: Path) -> Path:
    """Corpus, task and recipe in ``folder``; returns the recipe."""
    (folder / "task").mkdir(parents=True)
    rows = [{"text": text, "label": int("good" in text)} for text in SENTENCES]
    parts = {"train.jsonl": rows[::2] + rows[1::4], "eval.jsonl": rows[3::4]}
    for name, part in parts.items():
        lines = [f"{json.dumps(row)}\n" for row in part]
        (folder / "task" / name).write_text("".join(lines), encoding="utf-8")
    documents = [" ".join(SENTENCES[i : i + 4]) for i in range(len(SENTENCES) - 4)]
    lines = [f"{json.dumps({'text': text})}\n" for text in documents]
    (folder / "prose.jsonl").write_text("".join(lines), encoding="utf-8")
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(folder=folder), encoding="utf-8")
    return path
