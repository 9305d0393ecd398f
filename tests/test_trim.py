"""Trimmed students: Hugging Face's own forward on the model before is the judge of the model after."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_families import families, small_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from bitdistill import Engine
from bitdistill.before_after import bits_per_byte, compare
from bitdistill.config import CorpusConfig
from bitdistill.errors import CheckpointError, ConfigError, DataError
from bitdistill.export import export
from bitdistill.recipe import load_recipe
from bitdistill.train.loading import load_model
from bitdistill.trim import run

SEEN = ["the soup was very good .", "the room seemed not bad ."]
UNSEEN = "the view was quite warm, host!"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> CorpusConfig:
    path = tmp_path_factory.mktemp("texts") / "seen.jsonl"
    path.write_text("".join(f"{json.dumps({'text': text})}\n" for text in SEEN), encoding="utf-8")
    return CorpusConfig(source=str(path))


def old_ids_of(folder: Path) -> list[int]:
    return list(json.loads((folder / "vocabulary.json").read_text())["old_ids"])


def logits_of(folder: Path, ids: list[int]) -> torch.Tensor:
    """``[T, V]`` of Hugging Face's own forward, fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def ids_of(folder: Path, text: str) -> list[int]:
    return list(AutoTokenizer.from_pretrained(folder)(text)["input_ids"])


# --- the model is the same ---


@families
@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_kept_tokens_are_equal_to_the_bit(
    family: str, tied: bool, save_student: Callable[..., Path], texts: CorpusConfig, tmp_path: Path
) -> None:
    source = save_student(tmp_path / "student", family, {}, tie_word_embeddings=tied)
    folder = run(source, tmp_path / "trimmed", texts=[texts])
    old_ids = old_ids_of(folder)
    assert len(old_ids) < 300
    for (
        text
    ) in SEEN:  # of seven tokens: for one or two, BLAS may sum in another order where there are fewer rows
        old, new = ids_of(source, text), ids_of(folder, text)
        assert [old_ids[i] for i in new] == old
        assert torch.equal(logits_of(folder, new), logits_of(source, old)[:, old_ids])
    before, after = (load_file(place / "model.safetensors") for place in (source, folder))
    tables = {"model.embed_tokens.weight"} if tied else {"model.embed_tokens.weight", "lm_head.weight"}
    assert before.keys() == after.keys() >= tables
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor[old_ids] if name in tables else tensor), name


def test_a_full_precision_model_is_trimmed_as_well(llama: Path, texts: CorpusConfig, tmp_path: Path) -> None:
    folder = run(llama, tmp_path / "trimmed", texts=[texts])
    old, new = ids_of(llama, SEEN[0]), ids_of(folder, SEEN[0])
    assert torch.equal(logits_of(folder, new), logits_of(llama, old)[:, old_ids_of(folder)])
    assert type(load_model(folder)) is type(load_model(llama))


def test_the_folder_loads_without_the_package(student: Path, texts: CorpusConfig, tmp_path: Path) -> None:
    folder = run(student, tmp_path / "trimmed", texts=[texts])
    code = """
import sys
sys.modules["bitdistill"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text, path = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    torch.save(model(**AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")).logits, path)
"""
    path = tmp_path / "logits.pt"
    arguments = [sys.executable, "-c", code, str(folder), SEEN[0], str(path)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = logits_of(student, ids_of(student, SEEN[0]))[:, old_ids_of(folder)]
    torch.testing.assert_close(torch.load(path)[0], expected, rtol=1e-6, atol=1e-6)


def test_shards_stay_shards(tokenizer: PreTrainedTokenizerBase, texts: CorpusConfig, tmp_path: Path) -> None:
    model = small_model("qwen3", tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    tokenizer.save_pretrained(tmp_path / "sharded")
    folder = run(tmp_path / "sharded", tmp_path / "trimmed", texts=[texts])
    before, after = (
        json.loads((place / "model.safetensors.index.json").read_text())
        for place in (tmp_path / "sharded", folder)
    )
    assert len(set(after["weight_map"].values())) > 1
    assert after["weight_map"] == before["weight_map"]
    gone = 2 * (300 - len(old_ids_of(folder))) * 32 * 4  # two tables of 32 fp32 features
    assert after["metadata"]["total_size"] == before["metadata"]["total_size"] - gone
    new = ids_of(folder, SEEN[1])
    with torch.no_grad():
        expected = model(torch.tensor([ids_of(tmp_path / "sharded", SEEN[1])])).logits[0]
    assert torch.equal(logits_of(folder, new), expected[:, old_ids_of(folder)])


# --- the engine runs it ---


@pytest.mark.parametrize("tied", [True, False])
def test_the_engine_runs_it_unchanged(
    tied: bool, save_student: Callable[..., Path], texts: CorpusConfig, tmp_path: Path
) -> None:
    source = save_student(tmp_path / "student", "qwen3", {}, tie_word_embeddings=tied)
    folder = run(source, tmp_path / "trimmed", texts=[texts])
    engines = []
    for place in (source, folder):
        export(place, tmp_path / f"{place.name}-packed", head="f32")
        engines.append(Engine(tmp_path / f"{place.name}-packed", threads=1, kv_cache="fp32"))
    before, engine = engines
    old_ids = old_ids_of(folder)
    assert engine.vocab_size == len(old_ids)
    ids = engine.text.encode(SEEN[0])
    assert [old_ids[i] for i in ids] == before.text.encode(SEEN[0])
    expected = before.logits([old_ids[i] for i in ids])[:, old_ids]
    assert abs(engine.logits(ids) - expected).max() < 1e-5 * expected.std()
    assert engine.text.decode(ids) == SEEN[0]
    assert engine.text.decode(engine.text.encode(UNSEEN)) == UNSEEN
    written = engine.generate(SEEN[0], max_new_tokens=12)
    sequence = [old_ids[i] for i in ids]
    for token in written.tokens:
        best = old_ids[int(before.logits(sequence)[-1, old_ids].argmax())]
        assert old_ids[token] == best
        sequence.append(best)
    assert len(written.tokens) == 12
    assert written.text == before.text.decode(sequence[len(ids) :])


# --- ids in the files ---


def test_every_id_of_the_folder_is_the_new_one(
    make_student: Callable[..., Any], tokenizer: PreTrainedTokenizerBase, texts: CorpusConfig, tmp_path: Path
) -> None:
    """More rows than tokens, a special id that is no token's, special tokens at the end, several stop tokens."""
    source = tmp_path / "student"
    special = AutoTokenizer.from_pretrained(_saved(tokenizer, tmp_path / "tokenizer"))
    special.add_special_tokens({"extra_special_tokens": ["<|user|>", "<|bot|>"]})
    ids = special.convert_tokens_to_ids(["<|end|>", "<|pad|>", "<|user|>", "<|bot|>"])
    assert ids == [0, 1, 300, 301]
    # 305 is a row that no token has, as ids of padded embeddings are.
    student = make_student("qwen3", vocab_size=320, bos_token_id=305, eos_token_id=0, pad_token_id=1)
    student.generation_config.eos_token_id = [301, 0]
    student.generation_config.bos_token_id = 305
    student.save_pretrained(source)
    special.save_pretrained(source)
    folder = run(source, tmp_path / "trimmed", texts=[texts])
    old_ids = old_ids_of(folder)
    new = {old: i for i, old in enumerate(old_ids)}
    config, generation = (
        json.loads((folder / name).read_text()) for name in ("config.json", "generation_config.json")
    )
    before = json.loads((source / "config.json").read_text())
    ours = {
        "vocab_size": len(old_ids),
        "bos_token_id": new[305],
        "eos_token_id": new[0],
        "pad_token_id": new[1],
    }
    assert config == before | ours
    assert generation["eos_token_id"] == [new[301], new[0]]
    assert generation["bos_token_id"] == new[305]
    trimmed = AutoTokenizer.from_pretrained(folder)
    assert {i: special.convert_ids_to_tokens(old) for i, old in enumerate(old_ids) if old != 305} == {
        i: token for token, i in trimmed.get_vocab().items()
    }
    assert trimmed.all_special_ids == [new[i] for i in special.all_special_ids]
    text = f"<|user|>{SEEN[0]}<|bot|>"
    assert [old_ids[i] for i in trimmed(text)["input_ids"]] == special(text)["input_ids"]
    assert load_model(folder).get_input_embeddings().weight.shape[0] == len(old_ids)


def _saved(tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


def test_an_added_token_without_a_row_stays_without_one(
    make_student: Callable[..., Any], tokenizer: PreTrainedTokenizerBase, texts: CorpusConfig, tmp_path: Path
) -> None:
    """As Gemma's image token, whose id is the number of rows."""
    source = tmp_path / "student"
    wider = AutoTokenizer.from_pretrained(_saved(tokenizer, tmp_path / "tokenizer"))
    wider.add_special_tokens({"extra_special_tokens": ["<image>"]})
    make_student("gemma3_text").save_pretrained(source)
    wider.save_pretrained(source)
    folder = run(source, tmp_path / "trimmed", texts=[texts])
    rows = len(old_ids_of(folder))
    assert AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<image>") == rows
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == rows
    with (tmp_path / "image.txt").open("w") as file:
        file.write("<image> of soup")
    with pytest.raises(CheckpointError, match=r"token 300 \('<image>'\), and the embedding has 300 rows"):
        run(source, tmp_path / "other", texts=[CorpusConfig(source=str(tmp_path / "image.txt"))])


def test_the_folder_is_a_finished_step_with_code_and_a_card(
    student: Path, texts: CorpusConfig, tmp_path: Path
) -> None:
    source = tmp_path / "student"
    shutil.copytree(student, source)
    (source / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n", encoding="utf-8")
    (source / "eval-test.json").write_text("{}")
    folder = run(source, tmp_path / "trimmed", texts=[texts])
    assert json.loads((folder / "run.json").read_text())["status"] == "done"
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: mit\n---\n# Mine\n")
    assert f"from 300 rows to {len(old_ids_of(folder))}: the tokens of 2 texts" in card
    for name in ("students.py", "layers.py", "quant.py", "families.py", "hadamard.py"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    assert not (folder / "eval-test.json").exists()  # the student's, not this one's
    assert not (folder / "surgery.txt").exists()


# --- which tokens ---


def test_a_task_keeps_the_tokens_of_its_training_examples_and_labels(
    student: Path, project: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(project)
    folder = run(student, tmp_path / "trimmed", recipe=recipe)
    rows = [json.loads(line) for line in (project.parent / "task" / "train.jsonl").read_text().splitlines()]
    tokenizer, kept = AutoTokenizer.from_pretrained(student), set(old_ids_of(folder))
    for row in rows:
        assert kept >= set(tokenizer(f"{row['text']} It was")["input_ids"])
    for text in (*recipe.task.labels, "<|end|><|pad|>"):
        assert kept >= set(tokenizer(text)["input_ids"])


def test_a_size_is_met_and_refused_where_it_cannot_be(
    student: Path, texts: CorpusConfig, tmp_path: Path
) -> None:
    smallest = len(old_ids_of(run(student, tmp_path / "smallest", texts=[texts])))
    assert (
        len(old_ids_of(run(student, tmp_path / "filled", texts=[texts], size=smallest + 5))) == smallest + 5
    )
    with pytest.raises(ConfigError, match=f"--size 100: .* are {smallest}"):
        run(student, tmp_path / "small", texts=[texts], size=100)
    with pytest.raises(ConfigError, match=r"--size 400: the tokenizer has only 300 tokens"):
        run(student, tmp_path / "large", texts=[texts], size=400)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["filled", "smallest"]


def test_trimming_again_keeps_the_same_tokens(student: Path, texts: CorpusConfig, tmp_path: Path) -> None:
    once = run(student, tmp_path / "once", texts=[texts], size=290)
    again, at_once = (
        run(once, tmp_path / "again", texts=[texts]),
        run(student, tmp_path / "direct", texts=[texts]),
    )
    assert [old_ids_of(once)[i] for i in old_ids_of(again)] == old_ids_of(at_once)
    assert (again / "model.safetensors").read_bytes() == (at_once / "model.safetensors").read_bytes()
    assert run(student, tmp_path / "once", texts=[texts], size=290) == once  # done already


# --- before and after ---


def test_the_comparison_counts_examples_tokens_and_outcomes(
    cli: Callable[..., Any], student: Path, project: Path, tmp_path: Path
) -> None:
    """The training data know nothing of the room and the view, which half of the evaluation data are about."""
    held_out = tmp_path / "held-out.txt"
    held_out.write_text(f"{SEEN[1]}\n\n{UNSEEN}\n", encoding="utf-8")
    words = {"train": ("soup", "host"), "eval": ("soup", "room", "host", "view")}
    for part, subjects in words.items():
        rows = [
            {"text": f"the {subject} was {degree} {quality} .", "label": int(quality == "good")}
            for subject in subjects
            for degree in ("very", "not", "quite")
            for quality in ("good", "bad")
        ]
        (tmp_path / f"{part}.jsonl").write_text(
            "".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8"
        )
    task_data = ("--set", f"task.data_dir={tmp_path}")
    outcome = cli(
        "trim", student, tmp_path / "trimmed", "--recipe", project, *task_data, "--held-out", held_out, "--json",
        tmp_path / "out.json",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    result = json.loads((tmp_path / "out.json").read_text())
    old_ids = old_ids_of(tmp_path / "trimmed")
    assert (result["rows_before"], result["rows"]) == (300, len(old_ids))
    assert result["parameters_before"] - result["parameters"] == (300 - len(old_ids)) * 32
    assert f"300 -> {len(old_ids)} rows" in outcome.out

    answers = (" bad", " good")
    pieces = [[f"{row['text']} It was", answers[row["label"]]] for row in rows]
    counts = []
    for folder in (student, tmp_path / "trimmed"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        counts.append([[i for text in pair for i in tokenizer(text)["input_ids"]] for pair in pieces])
    same = sum(old == [old_ids[i] for i in new] for old, new in zip(*counts, strict=True))
    assert 0 < same < len(rows)
    task = result["task"]
    assert task["examples"] == len(rows)
    assert task["same_tokens"] == same / len(rows)
    assert task["tokens_before"] == sum(map(len, counts[0])) / len(rows)
    assert task["tokens"] == sum(map(len, counts[1])) / len(rows)
    for folder, key in ((student, "metric_before"), (tmp_path / "trimmed", "metric_after")):
        evaluated = cli("eval", project, folder, *task_data, "--json", tmp_path / "eval.json")
        assert evaluated.status == 0, evaluated.err
        assert task[key] == json.loads((tmp_path / "eval.json").read_text())["accuracy"]
    found = result["held_out"]
    assert (found["examples"], found["same_tokens"]) == (2, 0)
    assert found["tokens"] > found["tokens_before"]
    assert found["bits_per_byte_before"] > 0
    assert "0.00 % of 2 come out as the same tokens" in outcome.out


def test_the_tokens_alone_can_be_judged_without_the_models(
    student: Path, texts: CorpusConfig, tmp_path: Path
) -> None:
    folder = run(student, tmp_path / "trimmed", texts=[texts])
    (student_alone := tmp_path / "tokenizer").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(student / name, student_alone / name)
    found = compare(student_alone, folder, held_out=texts, models=False)["held_out"]
    assert found.keys() == {"examples", "same_tokens", "tokens_before", "tokens"}
    assert found["same_tokens"] == 1


def test_bits_per_byte_are_those_of_the_whole_text(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    nats, texts = 0.0, ["the soup was good .", "Größe"]
    for text in texts:
        ids = torch.tensor([[0, *ids_of(llama, text)]])  # behind the end-of-text token: there is no other
        with torch.no_grad():
            log_probs = model(ids).logits[0, :-1].double().log_softmax(-1)
        nats -= float(log_probs.gather(1, ids[0, 1:, None]).sum())
    expected = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    assert bits_per_byte(llama, texts) == pytest.approx(expected, rel=1e-5)


def test_a_smaller_vocabulary_takes_fewer_bits_where_the_tokens_are_the_same(
    student: Path, texts: CorpusConfig, tmp_path: Path
) -> None:
    """The same logits share their probability out among fewer."""
    folder = run(student, tmp_path / "trimmed", texts=[texts])
    found = compare(student, folder, held_out=texts)["held_out"]
    assert found["same_tokens"] == 1
    assert found["bits_per_byte"] < found["bits_per_byte_before"]


# --- real tokenizers ---


def test_qwens_tokenizer_keeps_real_sentences_and_spells_others(
    shared_data: Path, make_student: Callable[..., Any], tmp_path: Path
) -> None:
    source = tmp_path / "student"
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "qwen")
    ends = {"eos_token_id": 151645, "pad_token_id": 151643}
    make_student("qwen3", vocab_size=151936, hidden_size=8, **ends).save_pretrained(source)
    tokenizer.save_pretrained(source)
    lines = (shared_data / "sst2" / "dev.tsv").read_text(encoding="utf-8").splitlines()[1:]
    sentences = [line.partition("\t")[0] for line in lines]
    (tmp_path / "half.txt").write_text("\n".join(sentences[::2]), encoding="utf-8")
    folder = run(source, tmp_path / "trimmed", texts=[CorpusConfig(source=str(tmp_path / "half.txt"))])
    trimmed, old_ids = AutoTokenizer.from_pretrained(folder), old_ids_of(folder)
    assert type(trimmed) is type(tokenizer)
    assert len(old_ids) < 10_000
    for old, new in zip(*(t(sentences[::2])["input_ids"] for t in (tokenizer, trimmed)), strict=True):
        assert [old_ids[i] for i in new] == old
    for sentence in (*sentences[1::2], "漢字 und Größe 🙂"):
        assert trimmed.decode(trimmed(sentence)["input_ids"]) == sentence
    assert old_ids[trimmed.eos_token_id] == tokenizer.eos_token_id


def test_a_trained_model_with_byte_fallback_tells_the_same_story(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "checkpoints" / "stories260K" / "hf"
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    (tmp_path / "story.txt").write_text(text, encoding="utf-8")
    folder = run(source, tmp_path / "trimmed", texts=[CorpusConfig(source=str(tmp_path / "story.txt"))])
    old_ids = old_ids_of(folder)
    old, new = ids_of(source, text), ids_of(folder, text)
    assert old[0] == 1  # a begin-of-text token, put there by the post-processor
    assert [old_ids[i] for i in new] == old
    assert torch.equal(logits_of(folder, new), logits_of(source, old)[:, old_ids])


# --- refusals ---


def test_refusals(
    student: Path, bert: Path, llama: Path, project: Path, texts: CorpusConfig, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (tmp_path / "blank.txt").write_text(" \n\n")
    blank, absent = (CorpusConfig(source=str(tmp_path / name)) for name in ("blank.txt", "absent.txt"))
    export(student, tmp_path / "packed")
    without = {}
    for name in ("tokenizer.json", "model.safetensors"):
        without[name] = tmp_path / f"without-{name}"
        shutil.copytree(student, without[name])
        (without[name] / name).unlink()
    for source, data, error, message in (
        (student, {}, ConfigError, "there are no data to choose tokens by: give --recipe, --text, or both"),
        (student, {"texts": [blank]}, DataError, "every document is empty"),
        (student, {"texts": [absent]}, DataError, "no .txt, .jsonl, .parquet file there"),
        (student, {"texts": [texts], "size": -1}, ConfigError, "--size -1"),
        (student, {"texts": [texts], "fill": texts}, ConfigError, "fill up to --size"),
        (tmp_path / "nothing", {"texts": [texts]}, CheckpointError, "no such folder"),
        (tmp_path / "packed", {"texts": [texts]}, CheckpointError, "trim the student it came from"),
        (bert, {"texts": [texts]}, CheckpointError, "is an encoder"),
        (without["tokenizer.json"], {"texts": [texts]}, CheckpointError, "tokenizer"),
        (without["model.safetensors"], {"texts": [texts]}, CheckpointError, "no model.safetensors there"),
    ):
        with pytest.raises(error, match=message):
            run(source, out, **data)
        assert not list(tmp_path.glob("out*")), message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "no data to choose tokens by"),
        (("--set", "seed=1"), "--set changes a recipe"),
        (("--text-column", "body"), "give it with them"),
        (("--skip-models",), "nothing to judge on"),
    ],
)
def test_the_verb_refuses_what_it_would_ignore(
    cli: Callable[..., Any], student: Path, options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    outcome = cli("trim", student, tmp_path / "out", *options)
    assert outcome.status == 1
    assert outcome.err.startswith("error: ")
    assert message in " ".join(outcome.err.split())
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_something_else_is_left_alone(
    student: Path, texts: CorpusConfig, tmp_path: Path
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("years of work")
    for output in (taken, student):
        before = {path: path.read_bytes() for path in output.iterdir()}
        with pytest.raises(CheckpointError, match="another name"):
            run(student, output, texts=[texts])
        assert {path: path.read_bytes() for path in output.iterdir()} == before
