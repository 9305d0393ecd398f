"""Tasks and corpora that cannot be read: one message that names file, row and remedy."""

import pytest
from refusals import refused

GOOD_ROW = '{"text": "the soup was good .", "label": 1}\n'


@pytest.mark.parametrize(
    ("file", "content", "fragments"),
    [
        ("train.jsonl", "", ("train.jsonl: no rows", "empty")),
        ("eval.jsonl", "\n\n", ("eval.jsonl: no rows", "empty")),
        ("train.jsonl", GOOD_ROW + '{"text": "x", "label": 2}\n', ("training row 2", "label 2", "bad, good")),
        ("train.jsonl", GOOD_ROW + '{"text": "x", "label": "²"}\n', ("training row 2", "label '²'")),
        ("eval.jsonl", GOOD_ROW + '{"text": "x", "label": "fine"}\n', ("evaluation row 2", "'fine'")),
        ("train.jsonl", GOOD_ROW + '{"text": "x"}\n', ("training row 2", "no column 'label'", "text")),
        ("train.jsonl", GOOD_ROW + '{"text": "x", "label"\n', ("train.jsonl:2", "not valid JSON")),
        ("train.jsonl", GOOD_ROW + "[1]\n", ("train.jsonl:2", "JSON object")),
        ("train.jsonl", GOOD_ROW * 9, ("same label", "task.label_column")),
        ("train.jsonl", GOOD_ROW, ("too few", "validation_share")),
    ],
)
def test_bad_task_rows_are_named(cli, project, llama, data, tmp_path, file, content, fragments):
    (data / file).write_text(content, encoding="utf-8")
    outcome = cli(
        "sft", project, "--source", llama, "--output", tmp_path / "new", "--set", f"task.data_dir={data}"
    )
    refused(outcome, *fragments)
    assert not (tmp_path / "new").exists()


def test_task_data_in_another_encoding_is_named(cli, project, llama, data, tmp_path):
    (data / "train.jsonl").write_bytes('{"text": "café", "label": 1}\n'.encode("latin-1"))
    outcome = cli(
        "sft", project, "--source", llama, "--output", tmp_path / "new", "--set", f"task.data_dir={data}"
    )
    refused(outcome, data / "train.jsonl", "not UTF-8", "convert")


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("task.data_dir=nowhere", ("nowhere/train.jsonl", "task.data_dir")),
        (
            "task.name=sst3",
            ("task.name = 'sst3'", "sst2, qnli, mnli, mnli_mismatched, cnndm, grammar, jsonl"),
        ),
        ("task.template=It was", ("task.template = 'It was'", "no {column}")),
        ("task.template=", ("task.template is empty", "{column}")),
        ("task.template={txt} It was", ("no column 'txt'", "text, label", "task.template")),
        ("task.template={text", ("task.template = '{text'", "}")),
        ("task.template={text.size} It", ("task.template = '{text.size} It'", "{column}")),
        ("task.labels=[' a', 'a']", ("task.labels", "two labels are the same")),
        ("task.label_column=class", ("no column 'class'", "task.label_column")),
        ("task.labels=[]", ("task.labels is empty",)),
        ("task.labels=['', 'x']", ("''", "no tokens")),
        ("task.max_length=8", ("no room for a prompt", "task.max_length", "now 8")),
    ],
)
def test_a_task_section_that_does_not_fit_the_data_is_named(cli, project, llama, override, fragments):
    settings = ["--set", override]
    if "max_length" in override:
        settings += ["--set", "task.labels=['ABCDEFGH', 'IJKLMNOP']"]
    refused(cli("eval", project, llama, *settings), *fragments)


def test_a_prompt_without_tokens_is_refused(cli, project, llama, data):
    (data / "eval.jsonl").write_text('{"text": "", "label": 1}\n')
    outcome = cli("eval", project, llama, "--set", f"task.data_dir={data}", "--set", "task.template={text}")
    refused(outcome, "prompt '' has no tokens", "task.template")


def test_generation_that_leaves_no_room_for_a_prompt_is_refused(cli, project, llama):
    outcome = cli(
        "eval", project, llama, "--set", "task.kind=generation", "--set", "task.labels=[]",
        "--set", "task.max_new_tokens=48",
    )  # fmt: skip
    refused(outcome, "48 tokens leave no room", "task.max_length (now 48)", "task.max_new_tokens")


@pytest.mark.parametrize(
    ("name", "content", "fragments"),
    [
        ("a.jsonl", "", ("every document is empty",)),
        ("a.txt", " \n\n \n", ("every document is empty",)),
        ("a.jsonl", '{"text": \n', ("a.jsonl:1", "not valid JSON")),
        ("a.jsonl", '{"body": "x"}\n', ("a.jsonl:1", "no column 'text'", "body", "corpus.text_column")),
        ("a.parquet", "PAR", ("a.parquet", "parquet")),
        ("a.txt", "the soup", ("do not fill one sequence of 16", "corpus.sequence_length")),
        ("a.csv", "text\nx\n", (".txt, .jsonl, .parquet", "corpus.source")),
        (None, "", ("corpus.source", "hub:NAME")),
    ],
)
def test_a_corpus_that_cannot_be_read_is_named(cli, project, llama, tmp_path, name, content, fragments):
    folder = tmp_path / "corpus"
    folder.mkdir()
    if name is not None:
        (folder / name).write_text(content)
    outcome = cli(
        "pretrain", project, "--source", llama, "--output", tmp_path / "new",
        "--set", f"corpus.source={folder}", "--set", "corpus.pretrain_share=1",
    )  # fmt: skip
    refused(outcome, *fragments)


def test_a_text_column_that_parquet_lacks_is_named(cli, project, llama, tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    outcome = cli(
        "pretrain", project, "--source", llama, "--output", tmp_path / "new",
        "--set", f"corpus.source={tmp_path / 'a.parquet'}",
    )  # fmt: skip
    refused(outcome, "a.parquet", "no column 'text'", "body", "corpus.text_column")


def test_a_mistake_can_be_corrected_in_place(cli, project, llama, tmp_path):
    """A step that stopped before its first checkpoint has nothing to lose, so other settings may follow."""
    command = ("sft", project, "--source", llama, "--output", tmp_path / "new")
    refused(cli(*command, "--set", "task.labels=['', 'x']"), "no tokens")
    outcome = cli(*command)
    assert outcome.status == 0, outcome.err
    assert (tmp_path / "new" / "model.safetensors").is_file()


def test_a_corpus_file_of_another_kind_is_refused(cli, project, llama, tmp_path):
    (tmp_path / "a.csv").write_text("text\nhello\n")
    outcome = cli(
        "pretrain", project, "--source", llama, "--output", tmp_path / "new", "--set",
        f"corpus.source='{tmp_path / 'a.csv'}'",
    )  # fmt: skip
    refused(outcome, "a.csv", ".jsonl")
