"""``bitdistill run RECIPE --dry-run``: the plan of a run as tables."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .cli_output import console, stderr
from .errors import ConfigError

if TYPE_CHECKING:
    from .config import Recipe

DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print steps, shapes, memory, tokens and time; do nothing.")
]
Processes = Annotated[
    int | None, typer.Option(help="With --dry-run: processes, one for each device. Default 1.")
]
Flops = Annotated[
    float | None,
    typer.Option(help="With --dry-run: peak operations/s of one device. Default: measured here."),
]
Utilisation = Annotated[
    float | None, typer.Option(help="With --dry-run: share of that peak that training reaches. Default 0.4.")
]
DeviceMemory = Annotated[
    float | None, typer.Option(help="With --dry-run: bytes of one device. Default: this machine's.")
]


def refuse_unused(**options: float | None) -> None:
    """Options of a dry run mean nothing without one.

    Raises:
        ConfigError: one was given.
    """
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"--{name.replace('_', '-')} {value:g}: it is not used here; add --dry-run")


def dry_run(recipe: "Recipe", *, device_memory: float | None = None, **options: Any) -> dict[str, Any]:
    """Plan a run and print the plan; returns it. ``options`` are those of `Machine`; None leaves its default."""
    from .plan import Machine, plan_run

    given = {name: value for name, value in options.items() if value is not None}
    with stderr.status("working it out"):
        plan = plan_run(recipe, Machine(memory=device_memory, **given))
    for part in (_models(plan), _memory(plan), _work(plan)):
        console.print(part, "")
    for line in _remarks(plan):
        console.print(line, highlight=False, soft_wrap=True)
    for name, memory in _memory_left(plan).items():
        _warn_of_memory(name, memory, plan["device_memory"], plan["processes"])
    return plan


def _models(plan: dict[str, Any]) -> Table:
    table = _table("student", "linears", "SubLN", "parameters", "ternary", "fp32", "packed")
    for m in plan["models"]:
        table.add_row(
            m["family"],
            str(m["linears"]),
            str(m["norms"]),
            f"{m['parameters']:,}",
            f"{m['ternary_share']:.1%}",
            _bytes(4 * m["parameters"]),
            _bytes(m["bytes_packed"]),
        )
    return table


def _memory(plan: dict[str, Any]) -> Table:
    trained = {step["folder"].partition("/")[0]: step["memory"] for step in plan["steps"] if "memory" in step}
    small = max(memory["ddp"] for memory in trained.values()) < 1e9
    unit, size = ("MB", 1e6) if small else ("GB", 1e9)
    several = plan["processes"] > 1
    items = ["weights", "gradients", "optimizer", "teacher", "activations", "losses", "ddp"]
    names = ["weights", "grads", "AdamW", "teacher", "kept", "losses", "DDP" if several else "peak"]
    if several:
        items.append("fsdp2")
        names.append("FSDP2")
    table = _table(f"{unit} a device", *names)
    for name, memory in trained.items():  # learning rates take the same memory
        table.add_row(name, *(f"{memory[item] / size:.2f}" for item in items))
    return table


def _work(plan: dict[str, Any]) -> Table:
    table = _table("step", "state", "batch", "steps", "tokens", "FLOPs", "estimate")
    for step in plan["steps"]:
        if "memory" not in step:
            table.add_row(step["folder"], step["state"])
            continue
        table.add_row(
            step["folder"],
            step["state"],
            f"{step['global_batch']:,}",
            f"{step['optimizer_steps']:,}",
            f"{step['tokens']:,}",
            f"{step['flops']:.2g}",
            _duration(step["seconds"]),
        )
    return table


def _remarks(plan: dict[str, Any]) -> list[str]:
    origin = "measured here" if plan["flops_measured"] else "as given"
    speeds = ", ".join(f"{value / 1e12:g} TFLOP/s {key}" for key, value in plan["flops_per_second"].items())
    task = plan["task"]
    return [
        f"run folder   {plan['folder']}; done or not by the folders alone",
        f"task         {task['name']}: {task['examples']:,} training examples of up to {task['longest']} tokens; "
        f"{task['basis']}",
        f"time left    {_duration(plan['seconds_left'])}, an estimate: {plan['processes']} x {speeds} ({origin}) at "
        f"{plan['utilisation']:.0%}; tokenising, saving and evaluation come on top",
        "memory       of a traced step; kept: by the student for its backward pass; losses: on top, the teacher's pass "
        "included. Neither what gradient_checkpointing nor what distill.teacher_cache would spare is taken off; a CUDA "
        "context and fragments come on top",
    ]


def _memory_left(plan: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Memory of the steps that are not done; learning rates take the same."""
    left = (step for step in plan["steps"] if "memory" in step and step["state"] != "done")
    return {step["folder"].partition("/")[0]: step["memory"] for step in left}


def _warn_of_memory(name: str, memory: dict[str, int], device: float | None, processes: int) -> None:
    if device is None or memory["ddp"] <= device:
        return
    shard = ", or shard with FSDP2" if processes > 1 and memory["fsdp2"] <= device else ""
    stderr.print(
        f"warning: {name} takes {_bytes(memory['ddp'])} a device, which has {_bytes(device)}; lower batch_size and "
        f"raise gradient_accumulation_steps{shard}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, title_justify="left")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="left" if column == "state" else "right", no_wrap=True)
    return table


def _bytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.2f} MB"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
