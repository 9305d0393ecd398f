"""Which room runs: forced by name, chosen by CPU features, refused with one message; and what a room exports."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bitdistill import _core

ROOT = Path(__file__).parents[2]
AVX2 = ["avx2", "fma", "f16c"]
AVX512 = [*AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni"]
X86 = pytest.mark.skipif("avx2" not in _core.compiled_isas(), reason="this build has no x86 rooms")


@X86
@pytest.mark.parametrize(
    ("features", "room"),
    [
        (AVX2, "avx2"),
        ([*AVX512[:-1]], "avx2"),
        (AVX512, "avx512_vnni"),
        ([*AVX512, "avx512vbmi"], "avx512_vbmi"),
        ([*AVX2, "avx512vbmi"], "avx2"),
    ],
)
def test_the_best_room_that_the_features_allow(
    features: list[str], room: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BITDISTILL_ISA", raising=False)
    assert _core.select_isa(features=features) == room


def test_without_avx2_one_clear_error_and_scalar_only_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BITDISTILL_ISA", raising=False)
    with pytest.raises(RuntimeError, match=r"no AVX2.*BITDISTILL_ISA=scalar"):
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


def compile_commands() -> dict[str, list[str]]:
    """Compiler call of each room, from the newest build."""
    files = sorted(ROOT.glob("build/*/compile_commands.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        pytest.skip("not a source checkout with a build folder")
    entries = json.loads(files[-1].read_text(encoding="utf-8"))
    return {
        Path(entry["file"]).stem: shlex.split(entry["command"])
        for entry in entries
        if Path(entry["file"]).parent.name == "kernels"
    }


@pytest.mark.parametrize("room", _core.compiled_isas())
def test_a_room_exports_its_table_and_nothing_else(room: str, tmp_path: Path) -> None:
    """A weak symbol is a function compiled for this room that the linker may hand to baseline code."""
    command = [word for word in compile_commands()[room] if not word.startswith("-fsanitize")]
    output = tmp_path / "room.o"
    command[command.index("-o") + 1] = str(output)
    # Unoptimised: inlining would hide what the sources define.
    subprocess.run([*command, "-O0"], check=True, capture_output=True)
    symbols = subprocess.run(["nm", output], check=True, capture_output=True, text=True).stdout.split("\n")
    kinds = [line.split()[-2:] for line in symbols if line]
    defined = [(kind, name) for kind, name in kinds if kind.isupper() and kind != "U"]
    assert defined == [("T", f"_ZN10bitdistill{len(f'kernels_{room}')}kernels_{room}Ev")]
    weak = [name for kind, name in kinds if kind in "vwu"]
    assert weak == []
