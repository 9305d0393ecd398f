"""QNLI, MNLI and CNN/DailyMail in the forms that people download them in, on rows made up here."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from bitdistill.config import TaskConfig
from bitdistill.data.rows import sharing
from bitdistill.data.summaries import lead, sentences
from bitdistill.data.tasks import Task, load_task
from bitdistill.errors import ConfigError, DataError

QNLI_LABELS = ("entailment", "not_entailment")
MNLI_LABELS = ("entailment", "neutral", "contradiction")


def write_tsv(path: Path, rows: list[dict]) -> None:
    lines = ["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)


def qnli_rows(count: int, *, hub: bool = False) -> list[dict]:
    """Five questions to each of ten-sentence passages, each with two of its sentences."""
    rows = []
    for i in range(count):
        passage, question = divmod(i // 2, 5)
        sentence = (question + i % 2) % 5
        rows.append(
            {
                "index": i,
                "question": f'What "is" p{passage}q{question}?',
                "sentence": f"It is p{passage}s{sentence}.",
                "label": i % 2 if hub else QNLI_LABELS[i % 2],
            }
        )
    return rows


def mnli_glue_rows(count: int, genre: str) -> list[dict]:
    """The columns of GLUE's MNLI zip."""
    names = ["index", "promptID", "pairID", "genre"]
    parses = ["sentence1_binary_parse", "sentence2_binary_parse", "sentence1_parse", "sentence2_parse"]
    return [
        dict.fromkeys(names + parses, "x")
        | {"sentence1": f"{genre} premise {i // 3}", "sentence2": f"hypothesis {i}"}
        | {"label1": MNLI_LABELS[(i + 1) % 3], "gold_label": MNLI_LABELS[i % 3]}
        for i in range(count)
    ]


def articles(count: int) -> list[dict]:
    return [
        {
            "id": f"{i:040x}",
            "article": f"(CNN)Mr. A{i} went out. He met B{i}. They left. Nobody knows why.",
            "highlights": f"A{i} met B{i} .\nThey left .",
        }
        for i in range(count)
    ]


def load(folder: Path, name: str, **config: object) -> Task:
    return load_task(TaskConfig(name=name, data_dir=str(folder), **config))


# --- QNLI ---


def test_qnli_from_glues_zip(tmp_path):
    write_tsv(tmp_path / "train.tsv", qnli_rows(200))
    write_tsv(tmp_path / "dev.tsv", qnli_rows(4))
    task = load(tmp_path, "qnli")
    assert [(e.prompt, e.answer, e.label) for e in task.test[:2]] == [
        ('It is p0s0.\nDoes this answer the question "What "is" p0q0?"?', " yes", 0),
        ('It is p0s1.\nDoes this answer the question "What "is" p0q0?"?', " no", 1),
    ]
    assert len(task.train) + len(task.validation) == 200


def test_qnli_passages_stay_on_one_side(tmp_path):
    write_tsv(tmp_path / "train.tsv", qnli_rows(200))
    write_tsv(tmp_path / "dev.tsv", qnli_rows(4))
    task = load(tmp_path, "qnli", template="{sentence} {question}")
    # The first word of a prompt is pPsS: passage and sentence.
    kept, held = (
        {e.prompt.split()[2].partition("s")[0] for e in side} for side in (task.train, task.validation)
    )
    assert not kept & held
    assert (len(kept), len(held)) == (18, 2)


def test_the_hubs_numbers_mean_what_glues_words_mean(tmp_path, monkeypatch):
    """``datasets`` is replaced by one that gives the hub's columns; what is asked of it is checked."""
    asked = []

    def load_dataset(name, subset, split):
        asked.append((name, subset, split))
        if subset == "mnli":
            rows = mnli_glue_rows(60, "any")
            return [
                {
                    "premise": r["sentence1"],
                    "hypothesis": r["sentence2"],
                    "label": MNLI_LABELS.index(r["gold_label"]),
                }
                for r in rows
            ]
        return qnli_rows(100, hub=True) if subset == "qnli" else articles(40)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for name, folder_rows, dev in (
        ("qnli", qnli_rows(100), "dev"),
        ("mnli", mnli_glue_rows(60, "any"), "dev_matched"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        write_tsv(folder / "train.tsv", folder_rows)
        write_tsv(folder / f"{dev}.tsv", folder_rows)
        assert load_task(TaskConfig(name=name)) == load(folder, name)
    load_task(TaskConfig(name="mnli_mismatched"))
    load_task(TaskConfig(name="cnndm"))
    assert asked == [
        ("nyu-mll/glue", "qnli", "train"),
        ("nyu-mll/glue", "qnli", "validation"),
        ("nyu-mll/glue", "mnli", "train"),
        ("nyu-mll/glue", "mnli", "validation_matched"),
        ("nyu-mll/glue", "mnli", "train"),
        ("nyu-mll/glue", "mnli", "validation_mismatched"),
        ("abisee/cnn_dailymail", "3.0.0", "train"),
        ("abisee/cnn_dailymail", "3.0.0", "test"),
    ]


def test_rows_that_share_a_text_directly_or_through_others_are_one_group():
    rows = [{"a": a, "b": b} for a, b in ("xp", "yp", "yq", "zr", "ws", "vs")]
    (one, two, three, four, five, six) = sharing("a", "b")(rows)
    assert one == two == three
    assert five == six
    assert len({one, four, five}) == 3


# --- MNLI ---


@pytest.fixture
def mnli(tmp_path) -> Path:
    write_tsv(tmp_path / "train.tsv", mnli_glue_rows(300, "fiction"))
    write_tsv(tmp_path / "dev_matched.tsv", mnli_glue_rows(6, "fiction"))
    write_tsv(tmp_path / "dev_mismatched.tsv", mnli_glue_rows(9, "letters"))
    return tmp_path


def test_mnli_is_judged_on_the_matched_set_and_on_the_other_if_asked(mnli):
    matched, mismatched = load(mnli, "mnli"), load(mnli, "mnli_mismatched")
    assert [(e.prompt, e.answer) for e in matched.test[:3]] == [
        ('fiction premise 0\nThen "hypothesis 0" is', " true"),
        ('fiction premise 0\nThen "hypothesis 1" is', " unknown"),
        ('fiction premise 0\nThen "hypothesis 2" is', " false"),
    ]
    assert all(e.prompt.startswith("letters") for e in mismatched.test)
    assert (len(matched.test), len(mismatched.test)) == (6, 9)
    assert (matched.train, matched.validation) == (mismatched.train, mismatched.validation)


def test_hypotheses_of_one_premise_stay_on_one_side(mnli):
    task = load(mnli, "mnli", template="{premise} / {hypothesis}")
    kept, held = ({e.prompt.split(" / ")[0] for e in side} for side in (task.train, task.validation))
    assert not kept & held
    assert (len(kept), len(held)) == (90, 10)
    assert len(task.validation) == 30


def test_labels_of_your_own_must_be_as_many(mnli):
    task = load(mnli, "mnli", labels=(" yes", " maybe", " no"))
    assert [e.answer for e in task.test[:3]] == [" yes", " maybe", " no"]
    with pytest.raises(ConfigError, match="one for each of entailment, neutral, contradiction"):
        load(mnli, "mnli", labels=(" yes", " no"))


# --- CNN/DailyMail ---


def test_cnndm_is_the_same_from_jsonl_from_parquet_and_from_the_hubs_parts(tmp_path):
    rows, test = articles(40), articles(3)
    jsonl, plain, parts = (tmp_path / name for name in ("jsonl", "plain", "parts"))
    jsonl.mkdir()
    for name, some in (("train", rows), ("test", test)):
        (jsonl / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        write_parquet(plain / f"{name}.parquet", some)
    for i in range(2):
        write_parquet(parts / f"train-0000{i}-of-00002.parquet", rows[20 * i : 20 * i + 20])
    write_parquet(parts / "test-00000-of-00001.parquet", test)
    write_parquet(parts / "validation-00000-of-00001.parquet", articles(7))
    task = load(jsonl, "cnndm")
    assert load(plain, "cnndm") == task
    assert load(parts, "cnndm") == task
    example = task.test[0]
    assert example.prompt == "(CNN)Mr. A0 went out. He met B0. They left. Nobody knows why."
    assert (example.tail, example.answer) == ("\nTL;DR:", " A0 met B0 .\nThey left .")
    assert task.kind == "summarisation"
    assert task.lead[0] == "(CNN)Mr. A0 went out.\nHe met B0.\nThey left."


def test_two_forms_of_one_split_are_refused_and_none_is_named(tmp_path):
    write_tsv(tmp_path / "train.tsv", qnli_rows(20))
    with pytest.raises(DataError, match=r"no dev.tsv, .*validation.parquet"):
        load(tmp_path, "qnli")
    write_tsv(tmp_path / "dev.tsv", qnli_rows(20))
    write_parquet(tmp_path / "validation-00000-of-00001.parquet", qnli_rows(20))
    with pytest.raises(DataError, match=r"dev.tsv, validation-00000-of-00001.parquet hold the same rows"):
        load(tmp_path, "qnli")
    (tmp_path / "train.tsv").unlink()
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"train.parquet: not a readable parquet file"):
        load(tmp_path, "qnli")


@pytest.mark.parametrize("template", ["Summarise: {title}", "{article} or {article}?", "Of {article}"])
def test_a_template_that_could_not_keep_its_end_is_refused(tmp_path, template):
    rows = [row | {"title": "t"} for row in articles(20)]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError, match=r"write \{article\} once and something behind it"):
        load(tmp_path, "cnndm", template=template)


def test_a_kind_that_the_built_in_task_is_not_is_refused():
    with pytest.raises(ConfigError, match='"cnndm" is summarisation'):
        TaskConfig(name="cnndm", kind="classification")
    assert TaskConfig(name="cnndm").kind == "summarisation"
    assert TaskConfig(name="jsonl").kind == "classification"


# --- sentences ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ('He said "no." She left.', ['He said "no."', "She left."]),
        ("Mr. Smith met J. Doe of the U.S. Army. 9 came.", ["Mr. Smith met J. Doe of the U.S. Army.", "9 came."]),
        ("It cost 3.50 dollars. e.g. this.", ["It cost 3.50 dollars. e.g. this."]),
        ("First line .\nSecond line .\n\n", ["First line .", "Second line ."]),
        ("", []),
    ],
)  # fmt: skip
def test_sentences(text, expected):
    assert sentences(text) == expected


def test_lead_is_the_first_sentences():
    assert lead("A b. C d. E f. G h.") == "A b.\nC d.\nE f."
    assert lead("Only one.") == "Only one."


# --- the real data, where it is ---


def linked(tmp_path: Path, **files: Path) -> Path:
    for name, target in files.items():
        (tmp_path / f"{name}{target.suffix}").symlink_to(target)
    return tmp_path


def test_real_qnli(shared_data, tmp_path):
    source = shared_data / "qnli"
    folder = linked(tmp_path, train=source / "train_subset.tsv", dev=source / "dev.tsv")
    task = load(folder, "qnli", template="{question}\t{sentence}")
    assert len(task.test) == 5463
    assert len(task.train) + len(task.validation) == 18_869
    for column in (0, 1):
        kept, held = ({e.prompt.split("\t")[column] for e in side} for side in (task.train, task.validation))
        assert not kept & held
    assert 0.09 < len(task.validation) / 18_869 < 0.11


def test_real_mnli(shared_data, tmp_path):
    source = shared_data / "mnli"
    folder = linked(tmp_path, train=source / "train_subset.tsv", dev_matched=source / "dev_matched.tsv")
    task = load(folder, "mnli")
    assert [sum(e.label == i for e in task.test) for i in range(3)] == [3479, 3123, 3213]  # as published


def test_real_cnndm(shared_data, tmp_path):
    source = shared_data / "cnn_dm"
    folder = linked(tmp_path, train=source / "validation_subset.jsonl", test=source / "test_subset.jsonl")
    task = load(folder, "cnndm")
    assert (len(task.train) + len(task.validation), len(task.test)) == (1000, 500)
    assert all(1 <= text.count("\n") + 1 <= 3 for text in task.lead)
    assert all(
        text.split() == e.prompt.split()[: len(text.split())]
        for text, e in zip(task.lead, task.test, strict=True)
    )
