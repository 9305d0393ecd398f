"""Tasks: rows become prompts and answers, labels are read, splits keep related rows together."""

import itertools
import json
import random
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from bitdistill.config import TaskConfig
from bitdistill.data import tasks
from bitdistill.data.glue import sentences_around
from bitdistill.data.tasks import Example, Task, load_task
from bitdistill.errors import DataError


def write_jsonl(folder: Path, train: list[dict], test: list[dict]) -> Path:
    for name, rows in (("train.jsonl", train), ("eval.jsonl", test)):
        (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return folder


def jsonl_task(folder: Path, train: list[dict], test: list[dict] | None = None, **config: object) -> Task:
    write_jsonl(folder, train, test or train[:2])
    values = {
        "name": "jsonl",
        "data_dir": str(folder),
        "template": "{text} It was",
        "labels": (" bad", " good"),
    }
    return load_task(TaskConfig(**values | config))


def some_rows(count: int) -> list[dict]:
    return [{"text": f"text {i}", "label": i % 2} for i in range(count)]


def everything(task: Task) -> tuple[set, set, set]:
    return tuple({(e.prompt, e.answer) for e in part} for part in (task.train, task.validation, task.test))


# --- labels, prompts and answers ---


@pytest.mark.parametrize("value", [1, "1", "good", " good", "good ", " 1 "])
def test_a_label_may_be_its_index_or_its_text(tmp_path, value):
    rows = [*some_rows(20), {"text": "this one", "label": value}]
    task = jsonl_task(tmp_path, rows, [{"text": "this one", "label": value}])
    assert [(e.prompt, e.answer, e.label) for e in task.test] == [("this one It was", " good", 1)]


def test_text_goes_before_index_where_labels_are_digits(tmp_path):
    """With labels "1" and "0" the value 1 is the text of the first."""
    task = jsonl_task(
        tmp_path, some_rows(20), [{"text": "a", "label": 1}, {"text": "b", "label": "0"}], labels=("1", "0")
    )
    assert [(e.label, e.answer) for e in task.test] == [(0, "1"), (1, "0")]


def test_labels_that_are_digits_leave_no_room_for_indices(tmp_path):
    """With labels "1" to "5" the value 0 is no label, though it would be an index."""
    stars = ("1", "2", "3", "4", "5")
    rows = [{"text": str(i), "label": i % 5 + 1} for i in range(40)]
    task = jsonl_task(tmp_path, rows, rows[:5], labels=stars)
    assert [e.answer for e in task.test] == list(stars)
    with pytest.raises(DataError, match="evaluation row 1"):
        jsonl_task(tmp_path, rows, [{"text": "x", "label": 0}], labels=stars)


@pytest.mark.parametrize("value", [2, -1, "fine", 0.5, True, "١٢"])
def test_any_other_label_is_refused_with_its_row(tmp_path, value):
    with pytest.raises(DataError, match="evaluation row 3"):
        jsonl_task(tmp_path, some_rows(20), [*some_rows(2), {"text": "x", "label": value}])


def test_a_template_fills_every_column_and_strips_the_values(tmp_path):
    rows = [{"premise": f" p{i} ", "text": f"t{i}\n", "label": i % 2} for i in range(20)]
    task = jsonl_task(tmp_path, rows, rows[:1], template="{premise}|{text}|{premise}{{}}")
    assert task.test[0].prompt == "p0|t0|p0{}"


def test_a_generation_task_keeps_the_target_text_as_it_is(tmp_path):
    rows = [{"article": f"a{i}", "summary": f" Summary {i}.\n"} for i in range(20)]
    task = jsonl_task(
        tmp_path,
        rows,
        [{"article": "x", "summary": 7}],
        kind="generation",
        template="{article} TL;DR",
        labels=(),
        label_column="summary",
    )
    assert [(e.prompt, e.answer, e.label) for e in task.test] == [("x TL;DR", "7", None)]
    answers = {e.prompt: e.answer for e in (*task.train, *task.validation)}
    assert answers == {f"a{i} TL;DR": f" Summary {i}.\n" for i in range(20)}
    assert task.majority_accuracy() is None


def test_majority_accuracy_is_the_share_of_the_commonest_test_label(tmp_path):
    test = [{"text": str(i), "label": int(i < 3)} for i in range(4)]
    assert jsonl_task(tmp_path, some_rows(20), test).majority_accuracy() == 0.75


def test_tsv_text_keeps_its_quotes(tmp_path):
    """GLUE files are not CSV: a lone quotation mark is text."""
    lines = ["sentence\tlabel", *(f'say "{i} \t{i % 2}' for i in range(20))]
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    task = load_task(TaskConfig(name="sst2", data_dir=str(tmp_path)))
    assert [e.prompt for e in task.test] == [f'say "{i} It was' for i in range(20)]
    assert {e.answer for e in task.test} == {" terrible", " great"}


# --- splits ---


def test_parts_are_disjoint_and_cover_the_training_rows(tmp_path):
    task = jsonl_task(tmp_path, some_rows(200), [{"text": "unseen", "label": 1}])
    train, validation, test = everything(task)
    assert not train & validation
    assert train | validation == {(f"text {i} It was", (" bad", " good")[i % 2]) for i in range(200)}
    assert len(validation) == 20
    assert test == {("unseen It was", " good")}


def test_no_seed_changes_any_part(project):
    """Every seed of a study sees the same examples, whatever was drawn before."""
    from bitdistill.recipe import load_recipe

    tasks = []
    for seed in (0, 1):
        random.seed(seed)
        tasks.append(load_task(load_recipe(project, [f"seed={seed}"]).task))
    assert tasks[0] == tasks[1]


def test_a_subset_is_part_of_the_whole_and_leaves_the_test_set_alone(tmp_path):
    whole = jsonl_task(tmp_path, some_rows(200), some_rows(30))
    subset = jsonl_task(tmp_path, some_rows(200), some_rows(30), max_train_examples=40)
    assert len(subset.train) == 40
    assert len(subset.validation) == 10
    assert set(subset.train) <= set(whole.train)
    assert set(subset.validation) <= set(whole.validation)
    assert subset.test == whole.test
    assert len({e.label for e in subset.train}) == 2


@pytest.mark.parametrize(("cuts", "train", "validation"), [
    ({"max_validation_examples": 7}, 180, 7),
    ({"max_train_examples": 40, "max_validation_examples": 15}, 40, 15),
    ({"max_train_examples": 40, "max_validation_examples": 10}, 40, 10),
    ({"max_validation_examples": 500}, 180, 20),
])  # fmt: skip
def test_the_validation_part_has_a_cut_of_its_own(tmp_path, cuts, train, validation):
    whole = jsonl_task(tmp_path, some_rows(200))
    subset = jsonl_task(tmp_path, some_rows(200), **cuts)
    assert subset.train == whole.train[:train]
    assert subset.validation == whole.validation[:validation]
    assert (len(subset.train), len(subset.validation)) == (train, validation)


def test_the_digest_changes_with_any_example_and_only_then(tmp_path):
    digest = jsonl_task(tmp_path, some_rows(40)).digest
    assert jsonl_task(tmp_path, some_rows(40)).digest == digest
    changed = some_rows(40)
    changed[17]["text"] += "!"
    assert jsonl_task(tmp_path, changed, some_rows(2)).digest != digest
    assert jsonl_task(tmp_path, some_rows(40), template="{text} So").digest != digest


def test_parts_of_the_same_examples_have_the_same_digest(tmp_path):
    whole = jsonl_task(tmp_path, some_rows(200), some_rows(30))
    subset = jsonl_task(tmp_path, some_rows(200), some_rows(30), max_train_examples=40)
    for part in ("train", "validation", "test"):
        same = whole.part(part) == subset.part(part)
        assert same == (part == "test") == (whole.part_digest(part) == subset.part_digest(part))


# --- nested phrases ---

words = st.lists(st.sampled_from("abcd"), min_size=1, max_size=7)


def contains(outer: list[str], inner: list[str]) -> bool:
    return any(outer[i : i + len(inner)] == inner for i in range(len(outer) - len(inner) + 1))


@given(st.lists(words, min_size=1, max_size=14))
def test_a_phrase_belongs_to_every_sentence_around_it(texts):
    """Oracle: brute-force search for the texts around every text."""
    rows = [{"sentence": " ".join(text)} for text in texts]
    for text, groups in zip(texts, sentences_around(rows), strict=True):
        found = {" ".join(texts[index]) for index in groups}
        around = [other for other in texts if contains(other, text)]
        largest = [o for o in around if not any(contains(p, o) and p != o for p in texts)]
        assert found == {" ".join(sentence) for sentence in largest}
        assert len(groups) == len(found)


@given(st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=5), min_size=12, max_size=40))
def test_no_text_of_one_side_holds_a_text_of_the_other(texts):
    """Oracle: every pair of texts of the two sides. Rows that are on neither side nest in sentences of both."""
    rows = [{"sentence": " ".join(text)} for text in texts]
    examples = [Example(row["sentence"], "", 0) for row in rows]
    config = TaskConfig(name="sst2", validation_share=0.3)
    try:
        parts = tasks._split(examples, sentences_around(rows), config)
    except DataError:  # everything nests in one sentence
        assume(False)
    assert parts == tasks._split(examples, sentences_around(rows), config)
    train, validation = ([e.prompt.split() for e in part] for part in parts)
    assert len(validation) >= 0.3 * len(texts)
    for left, right in itertools.product(train, validation):
        assert not contains(left, right)
        assert not contains(right, left)
    for text in texts:
        if text not in train and text not in validation:
            assert all(any(contains(other, text) for other in side) for side in (train, validation))


def test_phrases_are_on_the_side_of_their_sentence(tmp_path):
    """SST-2 in small: sentences of words that no other sentence has, and every phrase cut from them."""
    sentences = [[f"w{i}.{j}" for j in range(6)] for i in range(40)]
    spans = [
        sentence[start:end]
        for sentence in sentences
        for start, end in itertools.combinations(range(len(sentence) + 1), 2)
    ]
    random.Random(1).shuffle(spans)
    lines = ["sentence\tlabel", *(f"{' '.join(span)} \t{i % 2}" for i, span in enumerate(spans))]
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n")
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\nfine\t1\n")
    task = load_task(TaskConfig(name="sst2", data_dir=str(tmp_path), template="{sentence}"))
    held = {e.prompt.split()[0].partition(".")[0] for e in task.validation}
    kept = {e.prompt.split()[0].partition(".")[0] for e in task.train}
    assert not held & kept
    assert len(held) == 4  # a tenth of the sentences, with all their phrases
    assert len(task.validation) == 4 * 21
    assert len(task.train) == 36 * 21


def test_real_sst2_is_read_whole_and_phrases_stay_with_their_sentences(shared_data):
    task = load_task(TaskConfig(name="sst2", data_dir=str(shared_data / "sst2"), template="{sentence}"))
    assert len(task.train) + len(task.validation) == 67_349 - 1_638
    assert len(task.validation) == pytest.approx(6_735, abs=60)
    assert len(task.test) == 872
    assert sum(e.label for e in task.test) == 444
    # Oracle: every run of words of one side looked up on the other.
    sides = [{tuple(e.prompt.split()) for e in part} for part in (task.train, task.validation)]
    for left, right in (sides, sides[::-1]):
        for words in left:
            assert not any(
                words[start:end] in right for start, end in itertools.combinations(range(len(words) + 1), 2)
            )
