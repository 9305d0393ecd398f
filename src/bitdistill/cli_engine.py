"""The verbs that run exported models: generate, chat, bench. None of them imports torch."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_output import JsonFile, KvCache, console, stderr, write_json_to
from .errors import BitDistillError, ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from .engine import Generation

ModelFolder = Annotated[Path, typer.Argument(metavar="MODEL", help="Folder that `bitdistill export` wrote.")]
Threads = Annotated[int | None, typer.Option(help="Worker threads; one for each CPU if not given.")]
Mmap = Annotated[bool, typer.Option("--mmap", help="Share the file's pages instead of copying them.")]
Screening = Annotated[
    bool,
    typer.Option(
        "--screening", help="Greedy decoding by an int8 copy of a bf16 head: the same text, faster."
    ),
]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Most tokens to write.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopK = Annotated[int, typer.Option("--top-k", help="Only the k likeliest tokens; 0 for all.")]
TopP = Annotated[float, typer.Option("--top-p", help="The likeliest tokens that hold this probability.")]
Seed = Annotated[int, typer.Option(help="Of the random numbers.")]


def add_verbs(app: typer.Typer) -> None:
    """Register the verbs."""
    for verb in (generate, chat, bench):
        app.command()(verb)


def generate(
    model: ModelFolder,
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from standard input.")],
    chat_: Annotated[
        bool, typer.Option("--chat", help="The prompt is a message: use the chat template.")
    ] = False,
    max_new_tokens: NewTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; repeatable.")] = None,
    threads: Threads = None,
    kv_cache: KvCache = "auto",
    mmap: Mmap = False,
    screening: Screening = False,
    json_path: JsonFile = None,
) -> None:
    """Continue a text with an exported model, on the CPU."""
    from .engine import Conversation, Engine

    text = sys.stdin.read() if prompt == "-" else prompt
    engine = Engine(model, threads=threads, kv_cache=kv_cache, mmap=mmap, screening=screening)
    conversation = Conversation(engine)
    pieces = conversation.stream(
        [{"role": "user", "content": text}] if chat_ else text,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=tuple(stop or ()),
    )
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    assert conversation.last is not None
    record = _record(conversation.last)
    stderr.print(_speed(conversation.last), highlight=False, markup=False)
    write_json_to(json_path, record | {"load_s": engine.load_s, "threads": engine.core.threads})


def chat(
    model: ModelFolder,
    system: Annotated[str, typer.Option(help="System message.")] = "",
    max_new_tokens: NewTokens = 512,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    threads: Threads = None,
    kv_cache: KvCache = "auto",
    mmap: Mmap = False,
    screening: Screening = False,
    json_path: JsonFile = None,
) -> None:
    """Talk to an exported model. An empty line or end of input ends the chat; --json keeps it."""
    from .engine import Conversation, Engine

    engine = Engine(model, threads=threads, kv_cache=kv_cache, mmap=mmap, screening=screening)
    if not engine.text.has_chat_template:
        raise ConfigError(f"{model}: this model has no chat template; use: bitdistill generate")
    conversation = Conversation(engine)
    messages = [{"role": "system", "content": system}] if system else []
    turns: list[dict[str, Any]] = []
    while question := _ask():
        asked = [*messages, {"role": "user", "content": question}]
        try:
            pieces = conversation.stream(
                asked,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
            )
            for piece in pieces:
                print(piece, end="", flush=True)
        except BitDistillError as error:  # one turn that does not fit does not end the chat
            if not turns:
                raise
            stderr.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
            continue
        print()
        answer = conversation.last
        assert answer is not None
        messages = [*asked, {"role": "assistant", "content": answer.text}]
        turns.append({"prompt": question} | _record(answer))
    write_json_to(json_path, {"messages": messages, "turns": turns})


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def _record(answer: "Generation") -> dict[str, Any]:
    return asdict(answer) | {"decode_tok_s": answer.decode_tok_s}


def _speed(answer: "Generation") -> str:
    return (
        f"{answer.prompt_tokens} tokens read in {answer.prefill_s:.2f} s, {len(answer.tokens)} written at "
        f"{answer.decode_tok_s:.1f} tokens/s ({answer.finish_reason})"
    )


def bench(
    model: Annotated[
        Path | None, typer.Argument(metavar="[MODEL]", help="Exported model; or give --shape.")
    ] = None,
    shape: Annotated[str | None, typer.Option(help="Random weights of a known model's shape.")] = None,
    threads: Annotated[
        list[int] | None, typer.Option(help="Thread counts to measure; 1 to all CPUs if not given.")
    ] = None,
    head: Annotated[
        str, typer.Option(help="With --shape: form of embedding and head, bf16, int8 or int4.")
    ] = "int8",
    kv_cache: KvCache = "auto",
    screening: Screening = False,
    vocabulary: Annotated[
        int | None, typer.Option(help="With --shape: of a trimmed vocabulary, this many tokens.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Also decode so many sequences together; repeatable.")
    ] = None,
    labels: Annotated[
        int | None, typer.Option(help="Classification alone: logits of so many tokens after a text.")
    ] = None,
    load: Annotated[
        bool, typer.Option("--load", help="Also time loading a file in the page cache, to the first token.")
    ] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Also show where the time goes.")] = False,
    versus: Annotated[
        str | None, typer.Option(help="llama.cpp: the same shape in turns with a peer.")
    ] = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="Of the peer: TQ2_0, BF16; both if not given.")
    ] = None,
    json_path: JsonFile = None,
) -> None:
    """Measure prefill and decode beside the machine's roofline of the same moment."""
    from .engine.bench import Measured, run_bench

    records = run_bench(
        model,
        shape,
        threads or [],
        Measured(
            head=head,
            kv=kv_cache,
            screening=screening,
            vocabulary=vocabulary,
            batches=tuple(batch or ()),
            labels=labels,
            load=load,
            profile=profile,
        ),
        versus=versus,
        formats=formats or (),
    )
    for r in records:
        console.print(_bench_line(r), highlight=False, soft_wrap=True)
        if "profile" in r:
            console.print(_profile_table(r["profile"]))
    write_json_to(json_path, records)


def _bench_line(r: dict[str, Any]) -> str:
    what = f"{r['shape']}  {r['threads']} threads  {r['phase']} {r['tokens']}"
    if r["phase"] == "load":
        return f"{what}: first token after {r['first_token_s']:.2f} s"
    if "context" in r:
        what += f" after {r['context']}, {r['kv']} keys and values ({r['kv_bytes'] / 1e6:.0f} MB)"
    if r["batch"] > 1:
        what += f" x {r['batch']}"
    line = f"{what}: {r['tok_s']:.1f} tokens/s, {100 * r['roofline_share']:.0f} % of the roofline"
    v = r["versus"]
    return f"{line}  {v['ratio']:.2f}x {v['name']} {v['format'] or ''}".rstrip() if v else line


def _profile_table(profile: dict[str, dict[str, float | None]]) -> "Table":
    from rich.table import Table

    table = Table("phase", "ms a token", "of the time", "of its roofline", box=None)
    for name, row in profile.items():
        roofline = "" if row["roofline_share"] is None else f"{row['roofline_share']:.0%}"
        table.add_row(name, f"{row['ms_per_token']:.3f}", f"{row['time_share']:.1%}", roofline)
    return table
