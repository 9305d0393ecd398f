"""A sweep: a run and a record for every point, shared steps made once, what is finished left alone."""

import copy
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bitdistill.checkpoint import read_run
from bitdistill.config import RunConfig
from bitdistill.errors import ConfigError
from bitdistill.locks import locked
from bitdistill.recipe import build_recipe, split_grid, to_dict
from bitdistill.sweep import changes, points

PREFIX = "jsonl_qwen3_"
METHODS = 'run.methods=["fp16_sft", "bitdistill"]'


def sweep_command(project: Path, model: Path, folder: Path, *words: str) -> list[str]:
    settings = (f"model.source={model}", f"output_dir={folder}", METHODS, "run.judged_on=validation")
    sets = [word for setting in settings for word in ("--set", setting)]
    return ["sweep", str(project), *sets, "--name", "gamma", *words]


def steps_made(folder: Path, stage: str) -> list[Path]:
    return sorted(path.parent for path in (folder / "gamma" / "steps").glob(f"{stage}-*/run.json"))


@pytest.fixture(scope="module")
def swept(cli, project, qwen3, tmp_path_factory) -> SimpleNamespace:
    """Two weights of the relation loss and two seeds; the learning rate is chosen at the first seed."""
    folder = tmp_path_factory.mktemp("sweep")
    words = ("--grid", "distill.gamma_relation=1.0,10.0", "--seeds", "2", "--tune-once", "--title", "Which gamma?",
             "--set", "run.learning_rates=[1e-3,1e-2]", "--set", "pretrain.seed=0")  # fmt: skip
    command = sweep_command(project, qwen3, folder, *words)
    outcome = cli(*command)
    assert outcome.status == 0, outcome.err
    found = (folder / "gamma/records/gamma").iterdir()
    records = {path.stem.removeprefix(PREFIX): json.loads(path.read_text()) for path in found}
    return SimpleNamespace(folder=folder, command=command, records=records)


def test_every_point_has_a_record(swept):
    names = {f"gamma_relation-{gamma}_s{seed}" for gamma in ("1.0", "10.0") for seed in (0, 1)}
    assert swept.records.keys() == names
    for record in swept.records.values():
        assert (record["study"], record["title"], record["preset"]) == ("gamma", "Which gamma?", "default")
        assert record["point"] == {
            "distill.gamma_relation": record["meta"]["recipe"]["distill"]["gamma_relation"]
        }
        assert record["reference"] == (record["point"] == {"distill.gamma_relation": 1.0})
        assert set(record["rows"]) == {"fp16_sft", "bitdistill"}


def test_steps_that_do_not_differ_are_made_once(swept):
    """One stage 2 for all, as pretrain.seed says; FP16-SFT for each seed and rate that it tried."""
    assert (
        len(steps_made(swept.folder, "stage1_refine"))
        == len(steps_made(swept.folder, "stage2_pretrain"))
        == 1
    )
    assert len(steps_made(swept.folder, "sft")) == 2 + 1
    assert len(steps_made(swept.folder, "stage3_distill")) == 2 * (2 + 1)


def test_the_first_seed_chooses_the_learning_rate_for_the_second(swept):
    for gamma in ("1.0", "10.0"):
        first, second = (swept.records[f"gamma_relation-{gamma}_s{seed}"]["rows"] for seed in (0, 1))
        for method in first:
            grid = first[method]["grid"]
            assert set(grid) == {"0.001", "0.01"} and "grid" not in second[method]
            assert first[method]["validation_accuracy"] == max(grid.values())
            assert "validation_accuracy" not in second[method]  # there was nothing left to choose
            assert float(max(grid, key=grid.get)) == first[method]["learning_rate"]
            assert second[method]["learning_rate"] == first[method]["learning_rate"]


def test_a_record_holds_the_items_that_its_scores_are_means_of(swept):
    assert (
        len({record["items_digest"] for record in swept.records.values()}) == 1
    )  # seeds and points draw none
    for record in swept.records.values():
        assert record["judged_on"] == "validation"
        for row in record["rows"].values():
            packed = np.frombuffer(bytes.fromhex(row["items_hex"]), dtype=np.uint8)
            items = np.unpackbits(packed)[: record["num_items"]]
            assert items.mean() == pytest.approx(row["accuracy"])
            assert len(packed) == -(-record["num_items"] // 8)


def test_a_record_holds_curves_and_weights_of_its_steps(swept):
    record = swept.records["gamma_relation-10.0_s1"]
    steps = record["steps"]
    assert set(steps) == {step for row in record["rows"].values() for step in row["steps"]}
    distilled = record["rows"]["bitdistill"]["steps"][-1]
    folder = swept.folder / "gamma" / f"{PREFIX}gamma_relation-10.0_s1" / distilled
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = steps[distilled]["curves"]["loss/ce"]
    values, at = (list(map(float, curve[key].split())) for key in ("value", "step"))
    assert at[-1] == log[-1]["step"] and len(at) == len(values) <= 40
    assert (
        np.mean([line["loss/ce"] for line in log]) == pytest.approx(np.mean(values), rel=1e-3)
        or len(log) > 40
    )
    weights = json.loads((folder / "weights.json").read_text())
    assert list(map(int, steps[distilled]["weights"]["counts"].split())) == weights["counts"]
    assert record["base"]["parameters"] > record["base"]["non_embedding_parameters"] > 0


def test_the_report_reads_what_a_sweep_writes(swept, cli):
    """Means and deviations over the seeds, from the records' own scores; the runs beside the records are no studies."""
    outcome = cli("report", swept.folder / "gamma")
    assert outcome.status == 0, outcome.err
    text = (swept.folder / "gamma" / "report.md").read_text()
    assert "4 runs of 1 study; 0 failed." in text and "damaged" not in text and "no record" not in text
    assert json.loads((swept.folder / "gamma" / "summary.json").read_text()) == []  # judged on held-out items
    lines = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    shown = {line[1]: line[3] for line in lines if len(line) > 4 and line[2] == "BitDistill"}
    for gamma in ("1.0", "10.0"):
        rows = [swept.records[f"gamma_relation-{gamma}_s{seed}"]["rows"]["bitdistill"] for seed in (0, 1)]
        mean, deviation = (
            f(100 * row["accuracy"] for row in rows) for f in (statistics.mean, statistics.stdev)
        )
        assert shown[f"gamma_relation {float(gamma):g}"] == f"{mean:.2f} ± {deviation:.2f}"


def test_a_finished_sweep_does_nothing_and_a_killed_one_makes_what_is_missing(swept, cli):
    made = {path: read_run(path)["finished"] for path in steps_made(swept.folder, "*")}
    lost = swept.folder / f"gamma/records/gamma/{PREFIX}gamma_relation-10.0_s1.json"
    before = lost.read_text()
    lost.unlink()
    outcome = cli(*swept.command)
    assert outcome.status == 0, outcome.err
    found, old = json.loads(lost.read_text()), json.loads(before)
    assert (found["rows"], found["steps"]) == (old["rows"], old["steps"])
    assert {path: read_run(path)["finished"] for path in steps_made(swept.folder, "*")} == made


def test_a_run_that_another_process_leaves_is_taken_while_an_earlier_one_is_still_held(swept):
    runs = {gamma: f"{PREFIX}gamma_relation-{gamma}_s1" for gamma in ("1.0", "10.0")}
    records = {gamma: swept.folder / f"gamma/records/gamma/{run}.json" for gamma, run in runs.items()}
    locks = {gamma: swept.folder / "gamma" / f"{run}.lock" for gamma, run in runs.items()}
    assert all(lock.is_file() for lock in locks.values())
    for record in records.values():
        record.unlink()
    with locked(locks["1.0"]):
        with locked(locks["10.0"]):
            command = [sys.executable, "-m", "bitdistill", *swept.command]
            process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
            assert process.stderr is not None and any("waiting" in line for line in process.stderr)
        late = time.monotonic() + 120
        while not records["10.0"].is_file() and process.poll() is None and time.monotonic() < late:
            time.sleep(0.1)
        assert records["10.0"].is_file() and not records["1.0"].is_file()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0 and records["1.0"].is_file(), err


def test_a_record_of_another_recipe_is_not_taken_for_this_one(swept, cli):
    outcome = cli(*swept.command, "--set", "distill.temperature=2.0")
    assert outcome.status == 1 and "distill.temperature: 5.0 there, 2.0 now" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_point_wins_over_a_setting_of_all_points(project, cli, tmp_path):
    words = ("--set", "sft.epochs=3", "--grid", "sft.epochs=2,3", "--list")
    outcome = cli("sweep", str(project), "--set", f"output_dir={tmp_path}", *words)
    assert outcome.status == 0, outcome.err  # two points, not the same twice


def test_points_are_listed_without_a_run(project, cli, tmp_path):
    words = (
        "--grid",
        "sft.epochs=2",
        "--point",
        "",
        "--point",
        "distill.preset=paper refine.norm_sites=all",
        "--list",
    )
    outcome = cli("sweep", str(project), "--set", f"output_dir={tmp_path}", *words)
    assert outcome.out.split() == [
        "jsonl_base_epochs-2_s0",
        "jsonl_base_preset-paper_norm_sites-all_epochs-2_s0",
    ]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--grid", "distill.gamma_relation"), "write section.key=a,b,c"),
        (("--grid", "distill.gama=1,2"), "distill.gama: unknown key"),
        (("--grid", "distill.gamma_relation=1,-1"), "distill.gamma_relation = -1"),
        (("--grid", "sft.epochs=1", "--grid", "sft.epochs=2"), "given twice"),
        (("--grid", "sft.epochs=1,1.0"), "the same run"),
        (("--point", "sft.epochs=1,2"), "has 2 values"),
        (("--point", "sft.epochs=1", "--grid", "sft.epochs=1"), "both set sft.epochs"),
        (("--grid", "seed=0,1"), "give --seeds"),
        (("--tune-once",), "run.learning_rates"),
        (("--set", 'run.method_rates=["bitdistill"]'), "write METHOD=RATE"),
    ],
)
def test_a_bad_grid_costs_no_training(project, cli, tmp_path, words, named):
    outcome = cli("sweep", str(project), "--set", f"output_dir={tmp_path}", "--set", "model.source=x", *words)
    assert outcome.status == 1 and named in outcome.err and "Traceback" not in outcome.err
    assert not list(tmp_path.iterdir())


def test_a_run_that_diverges_is_recorded_and_the_others_go_on(cli, project, qwen3, tmp_path):
    command = sweep_command(project, qwen3, tmp_path, "--grid", "sft.learning_rate=1e30,1e-3", "--set",
                            'run.methods=["fp16_sft"]', "--set", "sft.max_grad_norm=0")  # fmt: skip
    outcome = cli(*command)
    assert outcome.status == 1 and "Traceback" not in outcome.err
    records = sorted((tmp_path / "gamma/records/gamma").iterdir())
    failed = [
        record for record in map(json.loads, (path.read_text() for path in records)) if "failed" in record
    ]
    assert len(records) == 2
    assert [record["point"]["sft.learning_rate"] for record in failed] == [1e30]
    assert failed[0]["rows"] == {} and "Lower the learning rate" in failed[0]["failed"]


def test_a_step_folder_of_its_own_is_not_replaced_by_a_link(cli, project, qwen3, tmp_path):
    run = ["run", str(project), "--set", f"model.source={qwen3}", "--set", f"output_dir={tmp_path}"]
    run += ["--set", 'run.methods=["fp16_sft"]']
    assert cli(*run).status == 0
    outcome = cli(*run, "--set", f"steps_dir={tmp_path / 'steps'}")
    assert outcome.status == 1 and "fp16_sft is a folder of its own" in outcome.err


def test_a_lock_is_held_by_one_process_and_freed_when_it_dies(tmp_path):
    path = tmp_path / "point.lock"
    code = "import sys, time; from pathlib import Path; from bitdistill.locks import locked\n"
    code += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with locked(path, wait=False) as mine:
            assert not mine
    finally:
        other.kill()
        other.wait()
    with locked(path, wait=False) as mine:
        assert mine


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b=1,2.5,true", ("a.b", (1, 2.5, True))),
        ("a.b=[-1],[-1, -2]", ("a.b", ([-1], [-1, -2]))),
        ("a.b=subln,all", ("a.b", ("subln", "all"))),
        ('a.b="x,y",z', ("a.b", ("x,y", "z"))),
        ("a.b=path=with=signs", ("a.b", ("path=with=signs",))),
    ],
)
def test_a_grid_is_split_at_commas_outside_brackets_and_quotes(text, expected):
    assert split_grid(text) == expected


@pytest.mark.parametrize("text", ["a.b", "=1", "a.b=", "a.b=1,,2"])
def test_a_grid_without_key_or_value_is_refused(text):
    with pytest.raises(ConfigError, match="write section"):
        split_grid(text)


def test_a_record_from_before_an_option_is_of_the_same_recipe_while_the_option_is_off():
    """Of options that came or went, and of one whose value differs."""
    recipe = to_dict(build_recipe({"name": "x", "sft": {"epochs": 3}}))
    older = copy.deepcopy(recipe)
    del older["sft"]["schedule"], older["refine"]
    older["distill"]["gone"] = 1
    assert changes(older, recipe | {"name": "y", "output_dir": "elsewhere"}) == []
    now = to_dict(build_recipe({"name": "x", "sft": {"epochs": 2, "schedule": "linear"}}))
    assert [text.split(":")[0] for text in changes(older, now)] == ["sft.epochs", "sft.schedule"]


def test_points_are_all_combinations_seed_by_seed():
    found = points({"x.a": (1, 2)}, [{}, {"y.b": "p", "y.c": "q"}], (3, 4))
    values = [{"x.a": 1}, {"x.a": 2}, {"y.b": "p", "y.c": "q", "x.a": 1}, {"y.b": "p", "y.c": "q", "x.a": 2}]
    assert [(dict(point.values), point.seed) for point in found] == [(v, s) for s in (3, 4) for v in values]
    assert [point.reference for point in found] == [True, False, False, False] * 2


def test_points_whose_keys_differ_in_the_section_alone_have_names_of_their_own():
    found = points({}, [{"x.a": 1}, {"y.a": 1}, {"y.a": 2}], (0,))
    assert [point.name for point in found] == ["x.a-1_s0", "y.a-1_s0", "a-2_s0"]


def test_a_rate_of_one_method_replaces_the_grid():
    config = RunConfig(learning_rates=(1e-3, 1e-2), method_rates=("bitdistill=0.5",))
    assert config.rates_of("bitdistill") == (0.5,)
    assert config.rates_of("fp16_sft") == (1e-3, 1e-2)
