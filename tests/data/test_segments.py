"""What an encoder reads, against the ids of each text put together by hand."""

import json

import pytest
import torch
from tiny_encoders import SPECIAL
from transformers import DataCollatorWithPadding

from bitdistill.config import TaskConfig
from bitdistill.data.segments import SegmentSequences
from bitdistill.data.tasks import Example, load_task
from bitdistill.errors import DataError

CLS, SEP = SPECIAL.index("[CLS]"), SPECIAL.index("[SEP]")
FIRST, SECOND = "the soup was very good .", "the room seemed not warm ."


def words(tokenizer, text: str) -> list[int]:
    return tokenizer.convert_tokens_to_ids(text.split())


def example(*segments: str, label: int = 0) -> Example:
    return Example("", "", label, segments=segments)


def test_one_text_is_one_segment(wordpieces):
    (item,) = SegmentSequences([example(FIRST, label=1)], wordpieces, 64)
    assert item["input_ids"] == [CLS, *words(wordpieces, FIRST), SEP]
    assert item["token_type_ids"] == [0] * 8
    assert item["labels"] == 1


def test_a_pair_is_two_segments(wordpieces):
    (item,) = SegmentSequences([example(FIRST, SECOND)], wordpieces, 64)
    assert item["input_ids"] == [CLS, *words(wordpieces, FIRST), SEP, *words(wordpieces, SECOND), SEP]
    assert item["token_type_ids"] == [0] * 8 + [1] * 7


def test_the_longer_text_of_a_pair_loses_its_end(wordpieces):
    (item,) = SegmentSequences([example("the soup", SECOND)], wordpieces, 8)
    assert item["input_ids"] == [
        CLS, *words(wordpieces, "the soup"), SEP, *words(wordpieces, "the room seemed"), SEP,
    ]  # fmt: skip


def test_the_tokenizer_does_not_remember_the_truncation(wordpieces, tmp_path):
    SegmentSequences([example(FIRST)], wordpieces, 8)
    wordpieces.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"] is None


def test_batches_are_padded_on_the_right(wordpieces):
    sequences = SegmentSequences([example("the soup", label=1), example(FIRST)], wordpieces, 64)
    assert sequences.lengths == [4, 8]
    batch = DataCollatorWithPadding(wordpieces)([sequences[0], sequences[1]])
    assert batch["input_ids"][0].tolist() == [CLS, *words(wordpieces, "the soup"), SEP, 0, 0, 0, 0]
    assert batch["attention_mask"].tolist() == [[1] * 4 + [0] * 4, [1] * 8]
    assert batch["labels"].tolist() == [1, 0]
    assert {value.dtype for value in batch.values()} == {torch.int64}


def write(folder, name: str, rows: list[dict]) -> None:
    (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def test_the_published_pairs_come_in_the_order_of_glue(tmp_path):
    rows = [
        {"question": f"Q{i}", "sentence": f"S{i}", "label": ("entailment", "not_entailment")[i % 2]}
        for i in range(10)
    ]
    for name in ("train.jsonl", "dev.jsonl"):
        write(tmp_path, name, rows)
    task = load_task(TaskConfig(name="qnli", data_dir=str(tmp_path)))
    assert [e.segments for e in task.test] == [(f"Q{i}", f"S{i}") for i in range(10)]
    assert task.classes == ("entailment", "not_entailment")
    assert task.test[0].prompt.startswith("S0\nDoes this answer")


def test_columns_are_enough_for_a_task_of_ones_own(tmp_path):
    rows = [{"a": f" A{i} ", "b": f"B{i}", "label": i % 2} for i in range(20)]
    for name in ("train.jsonl", "eval.jsonl"):
        write(tmp_path, name, rows)
    settings = {"name": "jsonl", "data_dir": str(tmp_path), "labels": (" no", " yes")}
    task = load_task(TaskConfig(columns=("a", "b"), **settings))
    assert task.test[3].segments == ("A3", "B3")
    assert task.classes == ("no", "yes")
    assert task.digest != load_task(TaskConfig(columns=("b", "a"), **settings)).digest
    with pytest.raises(DataError, match=r"no column 'c'; it has a, b, label.*task\.columns"):
        load_task(TaskConfig(columns=("c",), **settings))
