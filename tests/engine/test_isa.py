"""Which room runs: forced by name, chosen by CPU features, refused with one message; and what a room exports."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bitdistill import _core

ROOT = Path(__file__).parents[2]
AVX2 = ["avx2", "fma", "f16c"]
AVX512 = [*AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni"]
X86 = pytest.mark.skipif("avx2" not in _core.compiled_isas(), reason="this build has no x86 rooms")
ARM = pytest.mark.skipif(
    "neon_dotprod" not in _core.compiled_isas(), reason="this build has no AArch64 rooms"
)


@X86
@pytest.mark.parametrize(
    ("features", "room"),
    [
        (AVX2, "avx2"),
        ([*AVX512[:-1]], "avx2"),
        (AVX512, "avx512_vnni"),
        ([*AVX512, "avx512vbmi"], "avx512_vbmi"),
        ([*AVX2, "avx512vbmi"], "avx2"),
        ([*AVX2, "avxvnni"], "avx_vnni"),
        ([*AVX512, "avxvnni"], "avx512_vnni"),
        # Enough for the twin of avx_vnni, which is for tests.
        ([*AVX2, "avx512f", "avx512vl", "avx512vnni"], "avx2"),
    ],
)
def test_the_best_room_that_the_features_allow(
    features: list[str], room: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BITDISTILL_ISA", raising=False)
    assert _core.select_isa(features=features) == room


@X86
def test_the_twin_of_avx_vnni_runs_by_name() -> None:
    assert _core.select_isa("avx_vnni_evex", features=AVX512) == "avx_vnni_evex"
    with pytest.raises(RuntimeError, match=r"avx_vnni_evex.*lacks avx512f, avx512vl, avx512vnni"):
        _core.select_isa("avx_vnni_evex", features=[*AVX2, "avxvnni"])


@ARM
def test_the_best_room_of_aarch64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BITDISTILL_ISA", raising=False)
    assert _core.select_isa(features=["dotprod"]) == "neon_dotprod"


def test_without_a_fast_room_one_clear_error_and_scalar_only_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BITDISTILL_ISA", raising=False)
    lacking = (
        r"no dot product instructions.*asimddp" if "neon_dotprod" in _core.compiled_isas() else "no AVX2"
    )
    with pytest.raises(RuntimeError, match=rf"{lacking}.*BITDISTILL_ISA=scalar"):
        _core.select_isa(features=[])
    assert _core.select_isa("scalar", features=[]) == "scalar"


@X86
def test_a_room_the_cpu_lacks_is_refused_with_what_is_missing() -> None:
    with pytest.raises(RuntimeError, match=r"avx512_vbmi.*this CPU lacks avx512vbmi"):
        _core.select_isa("avx512_vbmi", features=AVX512)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(RuntimeError, match="'sse2' is unknown; this build has scalar"):
        _core.select_isa("sse2")
    with pytest.raises(ValueError, match="'sse9' is not one of the CPU features avx2"):
        _core.select_isa(features=["sse9"])


# A model of random weights, and which room it runs: numpy and torch are not needed, so the process starts at once.
SHOW_ACTIVE = """
from bitdistill import _core
tensors = []
def add(name, dtype, *shape):
    size = {"U8": 1, "F32": 4}[dtype]
    for n in shape:
        size *= n
    tensors.append(_core.Tensor(name, dtype, shape, 0, size))
add("model.embed_tokens.weight", "F32", 16, 20)
add("model.norm.weight", "F32", 20)
for norm in ("input_layernorm", "post_attention_layernorm"):
    add(f"model.layers.0.{norm}.weight", "F32", 20)
for linear in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down"):
    add(f"model.layers.0.{linear}_proj.weight", "U8", 1, 1, 1, 128)
    add(f"model.layers.0.{linear}_proj.weight_scale", "F32", 1, 1)
config = _core.Config(
    vocab_size=16, hidden_size=20, intermediate_size=20, num_hidden_layers=1, num_attention_heads=1,
    num_key_value_heads=1, head_dim=20, max_context=8, rms_norm_eps=1e-6, hidden_act="silu", ropes=[([1.0] * 10, 1.0)],
    tie_word_embeddings=True,
)
print(_core.Model(None, tensors, config, threads=1).isa)
"""


def run_with(isa: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", SHOW_ACTIVE],
        env=os.environ | {"BITDISTILL_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_environment_forces_a_room_and_it_is_the_active_one(isa: str) -> None:
    done = run_with(isa)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa


def test_an_unknown_name_in_the_environment_is_an_error() -> None:
    done = run_with("mmx")
    assert done.returncode == 1
    assert "RuntimeError: BITDISTILL_ISA = 'mmx' is unknown; this build has scalar" in done.stderr


def compile_room(room: str, output: Path, *options: str) -> None:
    """Compiles a room with its own call of the build under test, or of the newest, without sanitizers."""
    if "BITDISTILL_CORE" in os.environ:
        files = [Path(os.environ["BITDISTILL_CORE"]).with_name("compile_commands.json")]
    else:
        files = sorted(ROOT.glob("build/*/compile_commands.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        pytest.skip("not a source checkout with a build folder")
    entries = json.loads(files[-1].read_text(encoding="utf-8"))
    name = Path("kernels", f"{room}.cc").parts
    call = next(shlex.split(entry["command"]) for entry in entries if Path(entry["file"]).parts[-2:] == name)
    command = [word for word in call if not word.startswith("-fsanitize")]
    command[command.index("-o") + 1] = str(output)
    subprocess.run([*command, *options], check=True, capture_output=True)


@pytest.mark.parametrize("room", _core.compiled_isas())
def test_a_room_exports_its_table_and_nothing_else(room: str, tmp_path: Path) -> None:
    """A weak symbol is a function compiled for this room that the linker may hand to baseline code."""
    output = tmp_path / "room.o"
    # Unoptimised: inlining would hide what the sources define.
    compile_room(room, output, "-O0")
    symbols = subprocess.run(["nm", output], check=True, capture_output=True, text=True).stdout.split("\n")
    kinds = [line.split()[-2:] for line in symbols if line]
    defined = [(kind, name) for kind, name in kinds if kind.isupper() and kind != "U"]
    assert defined == [("T", f"_ZN10bitdistill{len(f'kernels_{room}')}kernels_{room}Ev")]
    weak = [name for kind, name in kinds if kind in "vwu"]
    assert weak == []


@X86
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
@pytest.mark.parametrize(("room", "first_byte"), [("avx_vnni", "c4"), ("avx_vnni_evex", "62")])
def test_avx_vnni_is_in_the_encoding_of_cpus_without_avx512(
    room: str, first_byte: str, tmp_path: Path
) -> None:
    """Where the CPU has AVX-512's form of the instruction only, the other form is read, not run."""
    output = tmp_path / "room.o"
    compile_room(room, output)
    listing = subprocess.run(
        ["objdump", "-d", "-w", output], check=True, capture_output=True, text=True
    ).stdout
    # address, bytes, instruction
    lines = [line.split("\t") for line in listing.splitlines() if line.count("\t") == 2]
    dots = [encoded.split() for _, encoded, instruction in lines if "vpdpbusd" in instruction]
    assert len(dots) >= 2 * 4 * (1 + 2 + 3 + 4 + 5 + 6)  # the tiles alone: two registers of rows, four fields
    assert {encoded[0] for encoded in dots} == {first_byte}
    if room == "avx_vnni":
        # In 64-bit code a first byte of 62 is AVX-512, whichever instruction follows.
        assert not [line for line in lines if line[1].split()[0] == "62"]
        assert not re.search(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])|%k[0-7]", listing)
