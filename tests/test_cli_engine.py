"""export, inspect, generate, chat, eval --engine, bench on the command line."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitdistill import Engine, _core
from bitdistill.data.tasks import load_task
from bitdistill.deploy import engine_record
from bitdistill.engine.bench import Measured, run_bench
from bitdistill.engine.bench_worker import OwnModel
from bitdistill.engine.facts import packed_facts
from bitdistill.engine.loading import PackedModel
from bitdistill.engine.shapes import SHAPES, find_shape, random_model, ternary_weights, write_random
from bitdistill.errors import ConfigError
from bitdistill.recipe import load_recipe

RECORD = {
    "shape", "threads", "phase", "tokens", "batch", "tok_s", "roofline_share", "probe_gb_s", "probe_gmac_s",
    "head_bits",
    "kv", "activation_bits", "weight_bits", "peak_rss_bytes", "first_token_s", "versus",
    "samples", "disturbed_samples", "weight_bytes", "kv_bytes", "screening",
}  # fmt: skip


@pytest.fixture(scope="module")
def packed(
    cli: Callable[..., Any], student: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("cli_engine")
    outcome = cli("export", student, folder / "packed", "--head", "f32", "--json", folder / "facts.json")
    assert outcome.status == 0, outcome.err
    (folder / "packed" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}. {% endfor %}"
    )
    return folder / "packed", json.loads((folder / "facts.json").read_text())


def test_export_and_inspect_state_bytes_per_part(
    cli: Callable[..., Any], packed: tuple, tmp_path: Path
) -> None:
    folder, facts = packed
    outcome = cli("inspect", folder, "--json", tmp_path / "facts.json")
    assert outcome.status == 0, outcome.err
    assert json.loads((tmp_path / "facts.json").read_text()) == facts
    # 2 layers of q 32x32, k and v 16x32, o 32x32, gate and up 48x32, down 32x48, in blocks of 32 rows and 20 columns.
    blocks = 2 * (1 * 2 + 2 * 1 * 2 + 1 * 2 + 2 * 2 * 2 + 1 * 3)
    assert facts["bytes_by_part"]["ternary"] == blocks * 128
    assert facts["bytes_by_part"]["scales"] == 2 * 7 * 4
    weights = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    assert facts["bits_per_ternary_weight"] == round(8 * (blocks * 128 + 56) / weights, 4)
    assert all(key in outcome.out for key in ("bytes_by_part", "bits_per_weight"))


def test_generate_prints_what_the_engine_writes(
    cli: Callable[..., Any], packed: tuple, tmp_path: Path
) -> None:
    folder, _ = packed
    options = ("--max-new-tokens", 12, "--temperature", 1.5, "--seed", 3, "--threads", 1)
    outcome = cli("generate", folder, "the soup", *options, "--json", tmp_path / "out.json")
    assert outcome.status == 0, outcome.err
    expected = Engine(folder, threads=1).generate("the soup", max_new_tokens=12, temperature=1.5, seed=3)
    assert outcome.out == expected.text + "\n"
    record = json.loads((tmp_path / "out.json").read_text())
    assert (record["text"], record["tokens"]) == (expected.text, expected.tokens)


def test_generate_reads_standard_input(
    cli: Callable[..., Any], packed: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = packed
    given = cli("generate", folder, "the room was", "--max-new-tokens", 4)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the room was"))
    assert cli("generate", folder, "-", "--max-new-tokens", 4).out == given.out


def test_chat_keeps_the_conversation(
    cli: Callable[..., Any], packed: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = packed
    monkeypatch.setattr(sys, "stdin", io.StringIO("the soup\nthe room\n"))
    outcome = cli(
        "chat", folder, "--system", "be brief", "--max-new-tokens", 6, "--json", tmp_path / "chat.json"
    )
    assert outcome.status == 0, outcome.err
    chat = json.loads((tmp_path / "chat.json").read_text())
    assert [m["role"] for m in chat["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    second = Engine(folder).generate(chat["messages"][:4], max_new_tokens=6)
    assert chat["turns"][1]["tokens"] == second.tokens


def test_eval_in_the_engine_is_torchs(
    cli: Callable[..., Any], packed: tuple, project: Path, student: Path, tmp_path: Path
) -> None:
    folder, _ = packed
    found = {}
    for name, arguments in (("engine", (folder, "--engine", "--kv-cache", "fp32")), ("torch", (student,))):
        outcome = cli("eval", project, *arguments, "--json", tmp_path / f"{name}.json")
        assert outcome.status == 0, outcome.err
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())
    keys = ("accuracy", "stderr", "items")
    assert [found["engine"][k] for k in keys] == [found["torch"][k] for k in keys]


def test_perplexity_in_the_engine_is_torchs(
    cli: Callable[..., Any], packed: tuple, project: Path, student: Path, tmp_path: Path
) -> None:
    found = {}
    for name, arguments in (("engine", (packed[0], "--engine", "--kv-cache", "fp32")), ("torch", (student,))):
        outcome = cli("eval", project, *arguments, "--perplexity", "--json", tmp_path / f"{name}.json")
        assert outcome.status == 0, outcome.err
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())["perplexity"]
    assert found["engine"] == pytest.approx(found["torch"], rel=1e-3)


def test_a_finished_student_is_recorded_beside_torch_and_full_precision(
    student: Path, teacher: Path, project: Path, tmp_path: Path
) -> None:
    """What the demo prints after its table."""
    copy = Path(shutil.copytree(student, tmp_path / "student"))
    recipe = load_recipe(project, [])
    record = engine_record(recipe, load_task(recipe.task), copy, teacher)
    assert record["accuracy"] == record["torch_accuracy"]
    assert record["outcomes_that_differ"] == []
    assert record["items"] == 18
    assert record["bytes"] < record["full_precision_bytes"]
    assert record["decode_tok_s"] > 0
    assert record["full_precision_decode_tok_s"] > 0
    assert Engine(record["folder"]).generate("the soup", max_new_tokens=2).prompt_tokens > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "{packed}", ""), "prompt is empty"),
        (("generate", "{packed}", "x", "--top-p", "2"), "top_p"),
        (("generate", "{student}", "x"), "not an exported model"),
        (("eval", "{project}", "{student}", "--engine"), "not an exported model"),
        (("eval", "{project}", "{student}", "--kv-cache", "fp32"), "give it with --engine"),
        (("export", "{student}", "{student}"), "is there already"),
        (("bench",), "name an exported model or a --shape"),
        (("bench", "--shape", "gpt-5"), "--shape gpt-5: use one of"),
        (("bench", "--shape", "qwen3-0.6b", "--head", "int3"), "--head int3"),
        (("bench", "--shape", "qwen3-0.6b", "--threads", "0"), "--threads 0"),
        (("bench", "--shape", "qwen3-0.6b", "--batch", "0"), "--batch 0"),
        (("bench", "--shape", "qwen3-0.6b", "--labels", "0"), "--labels 0"),
        (("bench", "--shape", "qwen3-0.6b", "--screening"), "leave one out"),
        (("bench", "{packed}", "--vocabulary", "9"), "a model has its own"),
        (("bench", "--shape", "qwen3-0.6b", "--format", "BF16"), "with --versus"),
        (("bench", "--shape", "qwen3-0.6b", "--labels", "2", "--batch", "2"), "leave out --versus, --batch"),
        (("bench", "--shape", "qwen3-0.6b", "--versus", "vllm"), "the one peer is llama.cpp"),
        (("bench", "{packed}", "--versus", "llama.cpp"), "name one"),
    ],
)
def test_one_message_for_what_cannot_be(
    cli: Callable[..., Any], packed: tuple, student: Path, project: Path, arguments: tuple, message: str
) -> None:
    places = {"packed": packed[0], "student": student, "project": project}
    outcome = cli(*(argument.format(**places) for argument in arguments))
    assert outcome.status == 1
    assert message in outcome.err
    assert "Traceback" not in outcome.err


def test_bench_writes_records(packed: tuple) -> None:
    records = run_bench(packed[0], None, [2])
    assert [(r["phase"], r["tokens"]) for r in records] == [("prefill", 128), ("decode", 128)]
    for record in records:
        assert set(record) == RECORD
        assert (record["threads"], record["batch"], record["head_bits"], record["versus"]) == (2, 1, 32, None)
        assert record["tok_s"] > 0
        assert record["roofline_share"] > 0
        assert record["peak_rss_bytes"] > 1 << 20


def test_a_profile_accounts_for_the_time_and_the_work(packed: tuple) -> None:
    records = run_bench(packed[0], None, [1], Measured(kv="int8", profile=True))
    for record in records:
        assert record["kv"] == "int8"
        profile = record["profile"]
        assert sum(phase["time_share"] for phase in profile.values()) == pytest.approx(1)
        assert all(phase["ms_per_token"] >= 0 for phase in profile.values())
        linears = {"qkv", "o_proj", "gate_up", "down_proj"}
        bound = {name for name, phase in profile.items() if phase["roofline_share"] is not None}
        assert bound == (linears if record["phase"] == "prefill" else linears | {"head"})
        assert all(profile[name]["roofline_share"] > 0 for name in bound)


def test_bench_measures_batches_loading_and_classification(packed: tuple) -> None:
    folder, _ = packed
    records = run_bench(folder, None, [1], Measured(batches=(3,), load=True))
    batch, load = records[-2:]
    assert (batch["phase"], batch["batch"], batch["versus"]["name"]) == ("decode", 3, "batch 1")
    assert batch["kv_bytes"] > 2 * records[1]["kv_bytes"]  # three texts
    assert (load["phase"], load["roofline_share"]) == ("load", None)
    assert load["first_token_s"] > 0
    parts = packed_facts(folder)["bytes_by_part"]
    assert load["weight_bytes"] == pytest.approx(sum(parts.values()), rel=0.1)  # norms and rows are padded
    with pytest.raises(ConfigError, match="context is too short"):
        run_bench(folder, None, [1], Measured(labels=2))
    worker = OwnModel(str(folder), None, 1, head="int8", kv="auto")
    assert worker.facts()["kv"] == "fp16"
    assert worker.answer({"linears": 20})["seconds"] > 0
    growth = [worker.answer({"decode_bytes": context})["decode_bytes"] for context in (0, 10)]
    config = worker.core.config
    heads = config["num_key_value_heads"] * config["num_hidden_layers"]
    assert growth[1] - growth[0] == 10 * heads * 2 * config["head_dim"] * 2  # keys and values of two bytes
    worker = OwnModel(str(folder), None, 1, head="int8", kv="int8", labels=2)
    assert worker.answer({"classify": 20})["seconds"] > 0
    assert worker.answer({"memory": True})["kv_bytes"] == 0  # no session


def test_a_bitnet_v2_shape_runs_with_either_number_of_bits(tmp_path: Path) -> None:
    small = {"hidden_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1}
    blocks = {"hadamard": {"o_proj": 64, "down_proj": 8192}}
    for bits in (8, 4):
        shape = find_shape("bitnet-v2-1.3b", bits) | small | {"vocab_size": 100}
        shape["packed"] |= blocks
        packed = PackedModel.open(write_random(tmp_path / str(bits), shape, "int8"))
        assert packed.config["packed"]["activation_bits"] == bits
        assert packed.load(threads=1).memory() == random_model(shape, "int8", threads=1).memory()
    assert find_shape("bitnet-v2-1.3b")["packed"]["activation_bits"] == 4
    with pytest.raises(ConfigError, match="leave out --versus"):
        run_bench(None, "bitnet-v2-1.3b", [1], Measured(kv="int8"))


def test_a_random_file_has_the_shape_s_sizes_and_loads(tmp_path: Path) -> None:
    shape = find_shape("qwen3-0.6b") | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    for head in ("bf16", "int8", "int4"):
        folder = write_random(tmp_path / head, shape | {"vocab_size": 100}, head)
        model = PackedModel.open(folder).load(threads=1)
        made = random_model(shape | {"vocab_size": 100}, head, threads=1)
        assert model.memory() == made.memory()
        logits = _core.Session(model).forward(np.arange(5, dtype=np.int32))
        assert np.isfinite(logits).all() and logits.std() > 0


def test_shapes_have_the_published_sizes() -> None:
    """Ternary weights of BitNet b1.58 2B4T as its paper's table of layers gives them; Qwen3 without embeddings."""
    billions = {name: ternary_weights(shape) / 1e9 for name, shape in SHAPES.items()}
    assert billions["bitnet-2b4t"] == pytest.approx(2.084, abs=1e-3)
    assert billions["qwen3-0.6b"] == pytest.approx(0.44, abs=5e-3)
    assert billions["qwen3-1.7b"] == pytest.approx(1.4, abs=2e-2)
    assert billions["bitnet-v2-1.3b"] == pytest.approx(
        1.208, abs=1e-3
    )  # table 8: 18 x (4 x 2048^2 + 3 x 2048 x 8192)
    assert billions["qwen3-4b"] == pytest.approx(3.6, abs=5e-2)


def test_an_unknown_form_of_the_peer_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match="both"):
        run_bench(Path("x"), "qwen3-0.6b")
