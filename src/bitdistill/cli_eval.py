"""The verbs that judge models, and the table of a run."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .cli_output import (
    JsonFile,
    KvBits,
    KvCache,
    Overrides,
    QueryBits,
    RecipeFile,
    console,
    load,
    write_json_to,
)
from .errors import ConfigError


def add_verbs(app: typer.Typer) -> None:
    """Register the verbs."""
    app.command("eval")(evaluate)
    app.command("lm-eval")(lm_eval)


def evaluate(
    recipe: RecipeFile,
    source: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    split: Annotated[str, typer.Option(help="test or validation.")] = "test",
    perplexity: Annotated[
        bool, typer.Option(help="Perplexity on the corpus's held-out part instead.")
    ] = False,
    sparsity: Annotated[
        bool, typer.Option(help="Share of zeros among the inputs of ternary linears on that part, too.")
    ] = False,
    engine: Annotated[
        bool, typer.Option("--engine", help="SOURCE is an exported model: run it in the CPU engine.")
    ] = False,
    kv_cache: KvCache = "auto",
    query_bits: QueryBits = None,
    kv_bits: KvBits = None,
    set_: Overrides = None,
    json_path: JsonFile = None,
) -> None:
    """Evaluate a checkpoint on the recipe's task, or its perplexity; in torch, or an exported one in the engine."""
    from . import deploy, pipeline
    from .data.tasks import load_task
    from .evaluate import OWN_BITS, StateBits

    config = load(recipe, set_)
    if split not in ("test", "validation"):
        raise ConfigError(f"--split {split}: use test or validation")
    if kv_cache != "auto" and not engine:
        raise ConfigError("--kv-cache is of the engine; give it with --engine")
    bits = StateBits(query_bits, kv_bits)
    if engine and bits != OWN_BITS:
        raise ConfigError("--query-bits and --kv-bits are of torch; leave out --engine")
    if sparsity and (engine or not perplexity):
        raise ConfigError(
            "--sparsity is counted in torch on the held-out part: give it with --perplexity alone"
        )
    if perplexity:
        if engine:
            value = deploy.engine_perplexity(config, source, kv_cache=kv_cache)
        else:
            value = pipeline.heldout_perplexity(config, source, bits)
        result: dict[str, Any] = {"perplexity": value}
        if sparsity:
            result |= pipeline.heldout_sparsity(config, source, bits)
    else:
        task = load_task(config.task)
        if engine:
            found = deploy.evaluate_engine(config, task, source, split, kv_cache=kv_cache)
        else:
            found = pipeline.evaluate_model(config, task, source, split, bits)
        result = {found.metric: found.value, "stderr": found.stderr, "items": len(found.items)}
        result |= {name: score.value for name, score in found.others.items()}
    result = {"source": source, "split": "heldout" if perplexity else split} | result
    result |= {key: value for key, value in bits._asdict().items() if value is not None}
    console.print(
        "  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in result.items()),
        highlight=False,
        soft_wrap=True,
    )
    write_json_to(json_path, result)


def lm_eval(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint, hub id, or exported model.")],
    tasks: Annotated[str, typer.Option(help="Tasks of lm-eval, separated by commas.")],
    include_path: Annotated[
        Path | None, typer.Option("--include-path", help="Folder with further task files (YAML).")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option("--num-fewshot", help="Examples in the prompt.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first items of every task.")] = None,
    kv_cache: KvCache = "auto",
    query_bits: QueryBits = None,
    kv_bits: KvBits = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts into the model's chat template.")] = False,
    json_path: JsonFile = None,
) -> None:
    """Judge a model on tasks of the lm-eval harness; an exported one in the engine."""
    from . import harness

    result, table = harness.run(
        source,
        [task.strip() for task in tasks.split(",")],
        include_path=include_path,
        num_fewshot=num_fewshot,
        limit=limit,
        kv_cache=kv_cache,
        query_bits=query_bits,
        kv_bits=kv_bits,
        chat=chat,
    )
    console.print(table, highlight=False, soft_wrap=True)
    write_json_to(json_path, result)


def result_table(result: dict[str, Any]) -> Table:
    """The table of a run, with baselines that take no model below it."""
    meta = result["meta"]
    table = Table(
        title=f"{meta['task']}, seed {meta['seed']}, {meta['eval_items']} test items", title_justify="left"
    )
    metric = meta["metric"]
    columns = ("method", metric.replace("_", " "), "+-", "bytes", "smaller", "learning rate", "time")
    for column in columns:
        table.add_column(column, justify="left" if column == "method" else "right")
    rows = {key: row for key, row in result.items() if key != "meta"}
    biggest = max(row["bytes"] for row in rows.values())
    for row in rows.values():
        table.add_row(
            row["label"],
            f"{100 * row[metric]:.2f} %",
            f"{100 * row['stderr']:.2f}",
            f"{row['bytes']:,}",
            f"{biggest / row['bytes']:.2f}x",
            f"{row['learning_rate']:g}",
            " + ".join(f"{seconds:.0f}" for seconds in row["time_s"].values()) + " s",
        )
    known = (f"{name} {100 * scores[metric]:.2f} %" for name, scores in meta["baselines"].items())
    table.caption = "; ".join(known) or None
    return table
