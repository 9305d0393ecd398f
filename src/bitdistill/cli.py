"""The command line: one verb per step of the method, a recipe, and ``--set section.key=value``.

Modules that need torch are imported inside the commands, so that ``--help`` answers at once.
"""

import errno
import logging
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.logging import RichHandler

from . import __version__, cli_engine, cli_eval, cli_plan, cli_sweep, cli_trim
from .cli_output import JsonFile, Overrides, RecipeFile, console, load, stderr, write_json_to
from .errors import BitDistillError

if TYPE_CHECKING:
    from .config import Recipe

app = typer.Typer(
    name="bitdistill",
    help="Turn a Hugging Face language model into a 1.58-bit (ternary) model for a task.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Source = Annotated[str, typer.Option(help="Checkpoint folder or hub id to start from.")]
Output = Annotated[Path, typer.Option(help="Folder of the new checkpoint.")]

INTERRUPTED = 130
"""Exit status after Ctrl-C (128 + SIGINT), which typer turns into an exit."""

_EXTRAS = dict.fromkeys(("torch", "transformers", "accelerate", "datasets"), "train") | {"lm_eval": "eval"}
"""Packages that not every installation has -> the extra that brings them."""
_debug = False


def _is_first_process() -> bool:
    """``is_main_process`` by the launcher's word alone, without torch."""
    return os.environ.get("RANK", "0") == "0"


def _version(wanted: bool) -> None:
    if wanted:
        console.print(f"bitdistill {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and every log line.")] = False,
    version: Annotated[  # noqa: ARG001
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Options before the verb."""
    global _debug
    _debug = debug
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.INFO if _is_first_process() else logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=stderr, show_path=debug, show_level=debug, show_time=True)],
    )
    for noisy in (
        "accelerate",
        "httpx",
        "urllib3",
        "filelock",
        "matplotlib",
        "fontTools",
        "asyncio",
        "fsspec",
    ):
        logging.getLogger(noisy).setLevel(logging.WARNING)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs"),
    seed: Annotated[int, typer.Option(help="Seed of weights and sample order.")] = 0,
    name: Annotated[str, typer.Option(help="Name of the run.")] = "demo",
    set_: Overrides = None,
    json_path: JsonFile = None,
) -> None:
    """Everything on generated data, in minutes: base, FP16-SFT, FP16-CT-SFT, BitNet-SFT, the three stages, report."""
    from importlib import resources

    from .recipe import load_recipe

    with resources.as_file(resources.files("bitdistill") / "recipes" / "demo.toml") as path:
        options = {"output_dir": str(output), "seed": seed, "name": name}
        recipe = load_recipe(path, set_ or (), options)
    _run_recipe(recipe, json_path, deploy=True)


@app.command()
def run(
    recipe: RecipeFile,
    set_: Overrides = None,
    dry_run: cli_plan.DryRun = False,
    processes: cli_plan.Processes = None,
    flops: cli_plan.Flops = None,
    utilisation: cli_plan.Utilisation = None,
    device_memory: cli_plan.DeviceMemory = None,
    json_path: JsonFile = None,
) -> None:
    """Run a whole recipe: every method, the table, the report. A killed run continues where it was."""
    machine = {
        "processes": processes,
        "flops": flops,
        "utilisation": utilisation,
        "device_memory": device_memory,
    }
    if not dry_run:
        cli_plan.refuse_unused(**machine)
        _run_recipe(load(recipe, set_), json_path)
    elif _is_first_process():
        write_json_to(json_path, cli_plan.dry_run(load(recipe, set_), **machine))


@app.command()
def refine(
    recipe: RecipeFile,
    source: Source,
    output: Output,
    set_: Overrides = None,
    json_path: JsonFile = None,
) -> None:
    """Stage 1: make a ternary student of a model (SubLN surgery)."""
    from .train import stage1_refine

    _step(stage1_refine.run, load(recipe, set_), source, output, json_path)
    if not _is_first_process():
        return
    surgery = (output / "surgery.txt").read_text(encoding="utf-8")
    console.print(surgery.rstrip(), highlight=False, soft_wrap=True)


@app.command()
def base(
    recipe: RecipeFile,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder of the new checkpoint; `base` in the run's folder if not given."),
    ] = None,
    set_: Overrides = None,
    json_path: JsonFile = None,
) -> None:
    """Pre-train the recipe's [base] from scratch, in full precision or as a native BitNet b1.58."""
    from .train import base as base_step

    config = load(recipe, set_)
    folder = output or config.run_dir / "base"
    _step(lambda r, _, folder: base_step.run(r, folder), config, "", folder, json_path)


@app.command()
def pretrain(
    recipe: RecipeFile,
    source: Source,
    output: Output,
    teacher: Annotated[
        str | None, typer.Option(help="Full-precision teacher, where pretrain.lambda_logits asks for one.")
    ] = None,
    set_: Overrides = None,
    json_path: JsonFile = None,
) -> None:
    """Stage 2: continue the pre-training of a checkpoint on the recipe's corpus."""
    from .train import stage2_pretrain

    config = load(recipe, set_, {"pretrain.teacher": teacher} if teacher else None)
    _step(stage2_pretrain.run, config, source, output, json_path)


@app.command()
def sft(
    recipe: RecipeFile,
    source: Source,
    output: Output,
    set_: Overrides = None,
    json_path: JsonFile = None,
) -> None:
    """Fine-tune a checkpoint on the recipe's task with plain cross-entropy (teacher and baselines)."""
    from .train import sft as sft_stage

    _step(sft_stage.run, load(recipe, set_), source, output, json_path)


@app.command()
def distill(
    recipe: RecipeFile,
    source: Source,
    output: Output,
    teacher: Annotated[str, typer.Option(help="Fine-tuned full-precision teacher.")],
    set_: Overrides = None,
    json_path: JsonFile = None,
) -> None:
    """Stage 3: fine-tune a student on the recipe's task beside a teacher."""
    from .train import stage3_distill

    config = load(recipe, set_, {"distill.teacher": teacher})
    _step(stage3_distill.run, config, source, output, json_path)


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    json_path: JsonFile = None,
) -> None:
    """Show what a checkpoint or an exported model is: family, parameters, bytes per part, bits per weight."""
    from .packed import is_packed

    if is_packed(Path(source)):
        from .engine.facts import packed_facts

        result = packed_facts(source)
    else:
        from .train.inspection import inspect_checkpoint

        result = inspect_checkpoint(source)
    for key, value in result.items():
        console.print(f"{key:<24} {value}", highlight=False, soft_wrap=True)
    write_json_to(json_path, result)


@app.command()
def export(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="Finished ternary checkpoint.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the exported model.")],
    head: Annotated[str | None, typer.Option(help="Form of the head: bf16, int8, int4 or f32.")] = None,
    embedding: Annotated[
        str | None, typer.Option(help="Form of the embedding: bf16, int8, int4 or f32.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option("--license", help="Licence of the base model, if its card does not say.")
    ] = None,
    json_path: JsonFile = None,
) -> None:
    """Pack a student into the folder that the CPU engine runs: 1.6 bits a ternary weight."""
    from .export import export as export_model

    facts = export_model(student, output, head=head, embedding=embedding, licence=licence)  # type: ignore[arg-type]
    console.print(
        f"{output}: {facts['bytes']:,} bytes, {facts['bits_per_weight']} bits a weight "
        f"({facts['bytes_at_16_bit'] / facts['bytes']:.1f}x smaller than 16 bit)",
        highlight=False,
        soft_wrap=True,
    )
    write_json_to(json_path, facts)


@app.command()
def report(
    run_dir: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a run, such as runs/demo, or of records.")
    ],
    json_path: JsonFile = None,
) -> None:
    """Write report.html and report.md: of a run, of the records of a sweep, or of models pre-trained in a folder."""
    from .report.write import write_report

    paths = [str(path) for path in write_report(run_dir)]
    for path in paths:
        console.print(path, highlight=False, soft_wrap=True)
    write_json_to(json_path, dict(zip(("html", "markdown", "summary"), paths, strict=False)))


cli_eval.add_verbs(app)
cli_engine.add_verbs(app)
cli_trim.add_verbs(app)
cli_sweep.add_verbs(app)


def _step(
    step: "Callable[[Recipe, str | Path, Path], Path]",
    recipe: "Recipe",
    source: str,
    output: Path,
    json_path: Path | None,
) -> None:
    from .checkpoint import read_run

    finished = step(recipe, source, output)
    if not _is_first_process():
        return
    record = read_run(finished)
    heldout = record["metrics"].get("heldout/loss")
    perplexity = "" if heldout is None else f", held-out perplexity {math.exp(heldout):.2f}"
    console.print(f"{finished}: done{perplexity}", highlight=False, soft_wrap=True)
    write_json_to(json_path, record)


def _run_recipe(recipe: "Recipe", json_path: Path | None, *, deploy: bool = False) -> None:
    from . import pipeline
    from .report.write import write_report

    result = pipeline.run(recipe)
    if not _is_first_process():
        return
    console.print(cli_eval.result_table(result))
    if deploy and {"bitdistill", "fp16_sft"} <= result.keys():
        _deploy(recipe, result)
    write_json_to(json_path, result)
    try:
        html, *_ = write_report(recipe.run_dir)
        console.print(f"report: {html}", highlight=False, soft_wrap=True)
    except BitDistillError as error:  # the run is done and recorded; a missing plot library must not fail it
        stderr.print(f"no report: {_escape(str(error))}", highlight=False, soft_wrap=True)


def _deploy(recipe: "Recipe", result: dict[str, Any]) -> None:
    """The student of a run in the CPU engine, beside torch and the full-precision model; recorded under ``meta``."""
    from .checkpoint import write_json
    from .data.tasks import load_task
    from .deploy import engine_record

    student, teacher = (recipe.run_dir / result[key]["steps"][-1] for key in ("bitdistill", "fp16_sft"))
    record = engine_record(recipe, load_task(recipe.task), student, teacher)
    result["meta"]["engine"] = record
    write_json(recipe.run_dir / "result.json", result)
    same = record["items"] - len(record["outcomes_that_differ"])
    console.print(
        f"in the engine ({record['isa']}, {record['threads']} threads): {same} of {record['items']} test items come "
        f"out as in torch\n  memory     {record['bytes']:,} bytes; full precision {record['full_precision_bytes']:,}\n"
        f"  decoding   {record['decode_tok_s']:,.0f} tokens/s; full precision in torch "
        f"{record['full_precision_decode_tok_s']:,.0f}\n  try it     bitdistill generate {record['folder']} 'PROMPT'",
        highlight=False,
        soft_wrap=True,
    )


def _remedy(error: BaseException) -> str | None:
    """The message for errors that are the machine's, not the program's; None for everything else."""
    if isinstance(error, ModuleNotFoundError) and error.name in _EXTRAS:
        return (
            f"this verb needs {error.name}; install it with: pip install 'bitdistill[{_EXTRAS[error.name]}]'"
        )
    text = str(error)
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text or "os error 28" in text:
        return (
            "the disk is full; nothing finished was lost. Free some space and run the same command again: "
            "it continues at its last checkpoint"
        )
    if "PytorchStreamWriter failed" in text or "unexpected pos" in text:
        return (
            "a checkpoint could not be written (is the disk full?); the one before it is kept. "
            "Free some space and run the same command again"
        )
    if type(error).__name__ == "OutOfMemoryError" or any(
        sign in text for sign in ("can't allocate memory", "size calculation overflowed")
    ):
        return (
            "there is not enough memory; nothing finished was lost. Lower batch_size and raise "
            "gradient_accumulation_steps, or take a smaller model: bitdistill run RECIPE --dry-run says what "
            f"every step takes. Reason: {text.splitlines()[0]}"
        )
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}; check the path and its permissions"
    return None


def main() -> None:
    """Entry point: one message and exit status 1 for errors, 2 for a wrong command line."""
    try:
        app(prog_name="bitdistill", standalone_mode=True)
    except BitDistillError as error:
        if _debug:
            raise
        stderr.print(f"[bold red]error:[/] {_escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            stderr.print("stopped; run the same command again to continue", highlight=False)
        raise
    except Exception as error:
        remedy = _remedy(error)
        if _debug or remedy is None:
            raise
        stderr.print(f"[bold red]error:[/] {_escape(remedy)}", highlight=False, soft_wrap=True)
        sys.exit(1)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
