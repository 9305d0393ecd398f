"""The command line: it answers without torch, every verb works on its own, results are written as JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from transformers import AutoModelForCausalLM
from wheel_check import WITHOUT_TORCH

from bitdistill import __version__, pipeline
from bitdistill import cli as cli_module
from bitdistill.errors import CheckpointError
from bitdistill.train import inspection, loading, stage3_distill

VERBS = {
    "demo", "run", "base", "refine", "pretrain", "sft", "distill", "eval", "lm-eval", "inspect", "export", "report",
    "generate", "chat", "bench", "trim", "sweep",
}  # fmt: skip


# --- without torch ---


@pytest.mark.parametrize(
    "action",
    [
        "import bitdistill",
        "from bitdistill.recipe import build_recipe; build_recipe({'name': 'x'})",
        "from bitdistill import cli; run(cli, '--help')",
        "from bitdistill import cli; run(cli, 'distill', '--help')",
        "from bitdistill import cli; run(cli, '--version')",
        "from bitdistill import cli; run(cli, 'run', 'none.toml')",
        "from bitdistill import cli; run(cli, 'generate', '--help')",
        "from bitdistill import cli; run(cli, 'generate', 'none', 'text')",
        "from bitdistill import cli; run(cli, 'bench', '--help')",
        "from bitdistill import cli; run(cli, 'trim', '--help')",
    ],
)
def test_torch_is_not_imported_by(action):
    code = f"""
import sys
def run(cli, *arguments):
    sys.argv = ["bitdistill", *arguments]
    try:
        cli.main()
    except SystemExit:
        pass
{action}
sys.exit(any(name in sys.modules for name in ("torch", "transformers", "datasets", "matplotlib")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_a_verb_that_needs_more_than_the_wheel_brings_names_the_extra(tmp_path):
    """What ``make smoke`` sees where the packages are not installed; here their import fails as it does there."""
    code = """
import json, sys
from command_line import run_cli
class NotInstalled:
    def find_spec(self, name, *_):
        if name in ("torch", "transformers", "accelerate", "datasets", "lm_eval"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NotInstalled())
verbs = json.loads(sys.argv[1])
print(json.dumps({verb: [(o := run_cli(verb, *arguments)).status, o.err] for verb, (arguments, _) in verbs.items()}))
"""
    (tmp_path / "recipe.toml").write_text('name = "x"\n', encoding="utf-8")
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(WITHOUT_TORCH)],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for verb, (status, message) in json.loads(done.stdout).items():
        extra = WITHOUT_TORCH[verb][1]
        assert status == 1, verb
        assert message.startswith("error: this verb needs "), verb
        assert message.endswith(f"; install it with: pip install 'bitdistill[{extra}]'\n"), verb
        assert message.count("\n") == 1, verb


def test_help_lists_every_verb(cli):
    outcome = cli("--help")
    assert outcome.status == 0
    listed = {line.strip("│ ").split()[0] for line in outcome.out.splitlines() if line.strip("│ ")}
    assert listed >= VERBS


def test_every_verb_writes_its_result_as_json_if_asked():
    commands = typer.main.get_command(cli_module.app).commands
    assert set(commands) == VERBS
    for name, command in commands.items():
        options = {option for parameter in command.params for option in parameter.opts}
        assert "--json" in options, name
        assert command.help, name


def test_version(cli):
    outcome = cli("--version")
    assert (outcome.status, outcome.out.strip()) == (0, f"bitdistill {__version__}")


@pytest.mark.parametrize("arguments", [("bake",), ("refine",), ("run", "a.toml", "--sett", "x=1")])
def test_a_wrong_command_line_exits_with_2(cli, arguments):
    outcome = cli(*arguments)
    assert outcome.status == 2
    assert "Usage:" in outcome.err
    assert "Traceback" not in outcome.err


# --- errors and interruptions ---


def test_debug_lets_the_traceback_through_and_only_then(cli, tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        cli("--debug", "inspect", tmp_path)
    assert cli("inspect", tmp_path).status == 1


def test_ctrl_c_says_how_to_continue(cli, llama, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(inspection, "load_model", interrupt)
    outcome = cli("inspect", llama)
    assert outcome.status == 130
    assert "run the same command again" in outcome.err


def test_a_bug_of_ours_is_not_dressed_up_as_bad_input(cli, llama, monkeypatch):
    def bug(*_):
        raise AssertionError("broken invariant")

    monkeypatch.setattr(inspection, "load_model", bug)
    with pytest.raises(AssertionError, match="broken invariant"):
        cli("inspect", llama)


# --- the verbs, one by one ---


@pytest.fixture(scope="module")
def chain(cli, project, llama, tmp_path_factory) -> dict[str, tuple]:
    """refine, pretrain, sft, distill, each from the one before: verb -> (outcome, folder, JSON file)."""
    folder = tmp_path_factory.mktemp("chain")
    done = {}

    def step(verb: str, source: Path, *more: object) -> Path:
        output, path = folder / verb, folder / f"{verb}.json"
        outcome = cli(verb, project, "--source", source, "--output", output, "--json", path, *more)
        done[verb] = (outcome, output, path)
        return output

    teacher = step("sft", llama)
    prepared = step("pretrain", step("refine", llama))
    step("distill", prepared, "--teacher", teacher)
    return done


@pytest.mark.parametrize(
    ("verb", "stage"),
    [
        ("refine", "stage1_refine"),
        ("pretrain", "stage2_pretrain"),
        ("sft", "sft"),
        ("distill", "stage3_distill"),
    ],
)
def test_a_step_writes_a_checkpoint_its_record_and_json(chain, verb, stage):
    outcome, folder, path = chain[verb]
    assert outcome.status == 0, outcome.err
    assert f"{folder}: done" in outcome.out
    record = json.loads(path.read_text())
    assert record == json.loads((folder / "run.json").read_text())
    assert record["status"] == "done"
    assert record["settings"]["stage"] == stage
    assert record["versions"]["bitdistill"] == __version__
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == ("llama" if verb == "sft" else "bit_llama")
    assert (folder / "tokenizer.json").is_file()
    assert not folder.with_name(f"{folder.name}.partial").exists()
    assert not (folder / "trainer").exists()


@pytest.mark.parametrize("verb", ["pretrain", "sft", "distill"])
def test_a_training_step_records_its_steps_and_last_loss(chain, verb):
    _, folder, path = chain[verb]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    metrics = json.loads(path.read_text())["metrics"]
    # 512 tokens in batches of 4 x 16; 48 of the 54 training rows in batches of 8.
    steps = {"pretrain": 8, "sft": 6, "distill": 6}[verb]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert metrics["steps"] == steps
    assert metrics["loss"] == lines[-1]["loss"]
    names = {name for name in lines[0] if name.startswith("loss/")}
    extra = {"loss/logits_kd", "loss/logits_kd_weighted", "loss/relation_kd", "loss/relation_kd_weighted"}
    assert names == {"loss/ce"} | (extra if verb == "distill" else set())


def test_refine_prints_what_surgery_did(chain):
    outcome, folder, path = chain["refine"]
    assert (folder / "surgery.txt").read_text().strip() in outcome.out
    metrics = json.loads(path.read_text())["metrics"]
    assert metrics["linears_replaced"] == 14
    assert metrics["bytes_after"] < metrics["bytes_before"]


def test_a_finished_step_is_not_made_again(cli, chain, project, llama):
    _, folder, _ = chain["sft"]
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert cli("sft", project, "--source", llama, "--output", folder).status == 0
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize("split", ["test", "validation"])
def test_eval_writes_accuracy(cli, chain, project, tmp_path, split):
    _, folder, _ = chain["distill"]
    outcome = cli("eval", project, folder, "--split", split, "--json", tmp_path / "eval.json")
    assert outcome.status == 0, outcome.err
    result = json.loads((tmp_path / "eval.json").read_text())
    assert set(result) == {"source", "split", "accuracy", "stderr", "items"}
    assert (result["source"], result["split"]) == (str(folder), split)
    assert 0 <= result["accuracy"] <= 1
    assert result["items"] == {"test": 18, "validation": 6}[split]


def test_eval_writes_perplexity(cli, project, llama, tmp_path):
    outcome = cli("eval", project, llama, "--perplexity", "--json", tmp_path / "eval.json")
    assert outcome.status == 0, outcome.err
    result = json.loads((tmp_path / "eval.json").read_text())
    assert set(result) == {"source", "split", "perplexity"}
    assert result["perplexity"] > 1


def test_inspect_writes_the_facts_of_a_checkpoint(cli, chain, tmp_path):
    _, folder, _ = chain["refine"]
    outcome = cli("inspect", folder, "--json", tmp_path / "facts.json")
    assert outcome.status == 0, outcome.err
    facts = json.loads((tmp_path / "facts.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert facts["model_type"] == "bit_llama"
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["ternary_linears"] == 14
    assert facts["sub_norms"] == 4
    assert sum(facts["trit_shares"].values()) == pytest.approx(1, abs=1e-3)
    assert all(key in outcome.out for key in facts)


# --- hub revisions ---


@pytest.fixture
def hub(monkeypatch, llama, teacher) -> list[tuple[str, str | None]]:
    """A hub of two models, ``org/model`` and ``org/teacher``; the list fills with what is loaded at which revision."""
    loaded, folders = [], {"org/model": llama, "org/teacher": teacher}

    def from_hub(load):
        def record(source, revision=None):
            loaded.append((str(source), revision))
            return load(folders.get(str(source), source))

        return record

    for module in (pipeline, stage3_distill):
        for name in ("load_config", "load_model", "load_tokenizer"):
            monkeypatch.setattr(module, name, from_hub(getattr(loading, name)))
    return loaded


def test_the_teacher_is_loaded_and_recorded_at_its_revision(cli, hub, project, student, tmp_path):
    outcome = cli(
        "distill", project, "--source", student, "--teacher", "org/teacher", "--output", tmp_path / "new",
        "--set", "distill.teacher_revision=v1", "--set", "distill.epochs=0.1",
        "--set", "model.source=org/model", "--set", "model.revision=v2",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert set(hub) == {("org/teacher", "v1"), (str(student), None)}
    settings = json.loads((tmp_path / "new" / "run.json").read_text())["settings"]
    assert settings["training"]["teacher"] == "org/teacher@v1"


@pytest.mark.parametrize("flag", [(), ("--perplexity",)], ids=["task", "perplexity"])
@pytest.mark.parametrize(("source", "revision"), [("org/model", "v2"), ("org/teacher", None)])
def test_eval_takes_the_recipes_revision_for_the_recipes_model_only(
    cli, hub, project, source, revision, flag
):
    outcome = cli(
        "eval", project, source, *flag, "--set", "model.source=org/model", "--set", "model.revision=v2"
    )
    assert outcome.status == 0, outcome.err
    assert set(hub) == {(source, revision)}


# --- whole runs ---


@pytest.fixture(scope="module")
def finished(cli, project, llama, tmp_path_factory) -> tuple:
    """``bitdistill run`` of two methods, the second with a learning-rate grid as the first."""
    folder = tmp_path_factory.mktemp("finished")
    command = (
        "run", project, "--json", folder / "result.json", "--set", f"output_dir={folder}",
        "--set", f"model.source={llama}", "--set", 'run.methods=["bitdistill", "bitnet_sft"]',
        "--set", "run.learning_rates=[1e-3, 1e-2]",
    )  # fmt: skip
    return command, cli(*command), folder


def test_run_writes_a_row_for_every_method_and_the_teacher(finished):
    _, outcome, folder = finished
    assert outcome.status == 0, outcome.err
    result = json.loads((folder / "result.json").read_text())
    assert result == json.loads((folder / "small" / "result.json").read_text())
    rows = {key: row for key, row in result.items() if key != "meta"}
    assert list(rows) == ["fp16_sft", "bitdistill", "bitnet_sft"]
    assert [row["label"] for row in rows.values()] == ["FP16-SFT", "BitDistill", "BitNet-SFT"]
    assert rows["bitdistill"]["steps"][:2] == ["refine-subln", "pretrain-subln"]
    assert rows["bitnet_sft"]["steps"][0] == "refine-none"
    assert rows["bitdistill"]["bytes"] < rows["fp16_sft"]["bytes"]
    for row in rows.values():
        assert row["label"] in outcome.out
        assert f"{100 * row['accuracy']:.2f} %" in outcome.out
        assert set(row["grid"]) == {"0.001", "0.01"}
        assert row["validation_accuracy"] == max(row["grid"].values())


def test_run_evaluates_the_checkpoint_of_the_best_rate(finished, cli, project, tmp_path):
    _, _, folder = finished
    row = json.loads((folder / "result.json").read_text())["bitdistill"]
    checkpoint = folder / "small" / row["steps"][-1]
    assert f"lr-{row['learning_rate']:g}" == checkpoint.name
    for split, value in (("test", row["accuracy"]), ("validation", row["validation_accuracy"])):
        cli("eval", project, checkpoint, "--split", split, "--json", tmp_path / "eval.json")
        assert json.loads((tmp_path / "eval.json").read_text())["accuracy"] == value


def test_a_finished_run_trains_nothing_again(finished, cli):
    command, _, folder = finished
    weights = {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")}
    before = json.loads((folder / "result.json").read_text())
    outcome = cli(*command)
    assert outcome.status == 0, outcome.err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")} == weights
    # Provenance included: nothing that the table shows was made by the second run.
    assert json.loads((folder / "result.json").read_text()) == before
    assert json.loads((folder / "small" / "result.json").read_text()) == before


def test_a_run_of_other_methods_is_recorded_anew(finished, cli, tmp_path):
    command, _, folder = finished
    path = folder / "small" / "result.json"
    before = path.read_text()
    outcome = cli(*command, "--json", tmp_path / "x.json", "--set", 'run.methods=["bitnet_sft"]')
    assert outcome.status == 0, outcome.err
    after = json.loads(path.read_text())
    path.write_text(before)
    assert after.keys() == {"meta", "bitnet_sft"}
    assert after["bitnet_sft"] == json.loads(before)["bitnet_sft"]
    assert after["meta"]["finished"] >= json.loads(before)["meta"]["finished"]
    assert after["meta"]["recipe"]["run"]["methods"] == ["bitnet_sft"]


def test_report_writes_its_pages(finished, cli, tmp_path):
    pytest.importorskip("matplotlib")
    _, _, folder = finished
    outcome = cli("report", folder / "small", "--json", tmp_path / "paths.json")
    assert outcome.status == 0, outcome.err
    paths = json.loads((tmp_path / "paths.json").read_text())
    assert set(paths) == {"html", "markdown"}
    for path in paths.values():
        assert path in outcome.out
        assert "BitDistill" in Path(path).read_text(encoding="utf-8")


def test_demo_takes_overrides_and_makes_its_own_base(cli, project, tmp_path):
    outcome = cli(
        "demo", "--output", tmp_path / "Ann's runs", "--name", "tiny", "--seed", "3", "--json",
        tmp_path / "demo.json", *(
            argument
            for setting in (
                'run.methods=["fp16_sft"]', "base.tokens=4096", "base.batch_size=8", "base.vocab_size=260",
                "base.hidden_size=16", "base.intermediate_size=16", "base.num_hidden_layers=1",
                "base.num_attention_heads=1", "base.num_key_value_heads=1", "base.head_dim=16",
                "corpus.max_documents=40", "task.name=jsonl", f"task.data_dir={project.parent / 'task'}",
                "task.template={text} It was", 'task.labels=[" bad", " good"]', "sft.epochs=1",
            )
            for argument in ("--set", setting)
        ),
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    result = json.loads((tmp_path / "demo.json").read_text())
    assert result["meta"]["recipe"]["seed"] == 3
    assert result["meta"]["eval_items"] == 18
    records = [json.loads(path.read_text()) for path in (tmp_path / "Ann's runs" / "tiny").rglob("run.json")]
    assert {record["settings"]["stage"] for record in records} == {"base", "stage2_pretrain", "sft"}
    seconds = [record["metrics"].get("train_time_s", record["time_s"]) for record in records]
    assert result["meta"]["total_time_s"] == pytest.approx(sum(seconds), abs=0.06)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "Ann's runs" / "tiny" / "base")
    assert (base.config.model_type, base.config.hidden_size) == ("qwen3", 16)
