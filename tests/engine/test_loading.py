"""Damaged, hostile or misshapen files: one ValueError or OSError that names the tensor, never a crash."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed_student import config_of, core_model, entries_of, tensors_of, write

from bitdistill import _core

PROJ = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def model(make_student: Callable[..., Any]) -> Any:
    return make_student("qwen3", {"granularity": "channel"}, attention_bias=True)


def load(path: Path, model: Any, **options: Any) -> _core.Model:
    return _core.Model(str(path), entries_of(path), config_of(model), **({"threads": 1} | options))


@pytest.fixture
def tensors(model: Any) -> dict[str, np.ndarray]:
    return tensors_of(model)


Change = Callable[[dict[str, np.ndarray]], None]


def put(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    def apply(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = change(tensors[name].copy())

    return apply


def poke(name: str, value: float) -> Change:
    def change(array: np.ndarray) -> np.ndarray:
        array.reshape(-1)[-1] = value
        return array

    return put(name, change)


def drop(name: str) -> Change:
    def apply(tensors: dict[str, np.ndarray]) -> None:
        del tensors[name]

    return apply


DAMAGES: list[tuple[Change, str]] = [
    (drop(f"{PROJ}.weight"), rf"{PROJ}.weight is missing"),
    (drop(f"{PROJ}.weight_scale"), rf"{PROJ}.weight_scale is missing"),
    (drop("model.norm.weight"), r"model.norm.weight is missing"),
    (lambda t: t.update(extra=np.zeros(3, np.float32)), r"extra \(F32 \[3\]\) belongs to no part"),
    (poke(f"{PROJ}.weight_scale", np.nan), rf"{PROJ}.weight_scale .*not finite"),
    (poke(f"{PROJ}.weight_scale", np.inf), rf"{PROJ}.weight_scale .*not finite"),
    (poke(f"{PROJ}.weight_scale", 0), rf"{PROJ}.weight_scale .*not positive"),
    (poke(f"{PROJ}.weight_scale", -1), rf"{PROJ}.weight_scale .*not positive"),
    (poke("model.layers.0.input_layernorm.weight", np.nan), "input_layernorm.weight .*not finite"),
    (poke(f"{PROJ}.bias", np.nan), rf"{PROJ}.bias .*not finite"),
    (poke(f"{PROJ}.weight", 243), rf"{PROJ}.weight .*above 242"),
    (
        put(f"{PROJ}.weight", lambda a: a[:, :, :1].copy()),
        rf"{PROJ}.weight .*configuration gives it the shape",
    ),
    (put(f"{PROJ}.weight", lambda a: a.astype(np.int8)), rf"{PROJ}.weight .*expected U8"),
    (put(f"{PROJ}.weight_scale", lambda a: a[:-1].copy()), rf"{PROJ}.weight_scale .*shape"),
    (put(f"{PROJ}.weight_scale", lambda a: a.astype(np.int8)), rf"{PROJ}.weight_scale .*expected F32"),
    (put("model.embed_tokens.weight", lambda a: a.T.copy()), r"embed_tokens.weight .*shape"),
    (put("model.embed_tokens.weight", lambda a: a.astype(np.uint8)), r"embed_tokens.weight \(U8.*shape"),
    (put("model.embed_tokens.weight", lambda a: a.astype(np.int8)), r"embed_tokens.weight_scale is missing"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[message for _, message in DAMAGES])
def test_a_tensor_that_does_not_fit_is_named(
    damage: Change, message: str, model: Any, tensors: dict[str, np.ndarray], tmp_path: Path
) -> None:
    damage(tensors)
    path = write(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=message):
        load(path, model)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (put("model.embed_tokens.weight", lambda a: a[:, :, :-1].copy()), r"embed_tokens.weight .*shape"),
        (put("model.embed_tokens.weight_scale", lambda a: a[:-1].copy()), r"weight_scale .*shape"),
        (
            put("model.embed_tokens.weight_scale", lambda a: a.astype(np.float32)),
            r"weight_scale .*expected BF16",
        ),
        (poke("model.embed_tokens.weight_scale", 0), r"weight_scale .*scale 303 is not positive and finite"),
        (poke("model.embed_tokens.weight_scale", 0x7F80), r"weight_scale .*scale 303 is not positive"),
        (poke("model.embed_tokens.weight_scale", 0xBF80), r"weight_scale .*scale 303 is not positive"),
    ],
)
def test_an_int4_table_that_does_not_fit_is_named(
    damage: Change, message: str, model: Any, tmp_path: Path
) -> None:
    tensors = tensors_of(model, "I4")
    damage(tensors)
    path = write(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=message):
        load(path, model)


@pytest.mark.parametrize("isa_name", _core.available_isas())
def test_every_flipped_bit_is_found_by_its_checksum(
    isa_name: str, model: Any, tensors: dict[str, np.ndarray], tmp_path: Path
) -> None:
    path = write(tmp_path / "model.safetensors", tensors)
    entries = entries_of(path)
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    for position in rng.integers(start, len(data), 30):
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"checksum|not finite|not positive|above 242"):
            _core.Model(str(path), entries, config_of(model), threads=1, isa=isa_name)
    path.write_bytes(data)
    assert _core.Model(str(path), entries, config_of(model), threads=1, isa=isa_name).isa == isa_name


def test_a_truncated_file(model: Any, tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", tensors)
    entries = entries_of(path)
    size = path.stat().st_size
    for length in (0, 7, size // 2, size - 1):
        os.truncate(path, length)
        with pytest.raises(ValueError, match=r"ends beyond the file .* truncated"):
            _core.Model(str(path), entries, config_of(model), threads=1)


def test_a_file_that_is_not_there_or_a_folder(
    model: Any, tensors: dict[str, np.ndarray], tmp_path: Path
) -> None:
    path = write(tmp_path / "model.safetensors", tensors)
    entries, config = entries_of(path), config_of(model)
    with pytest.raises(FileNotFoundError):
        _core.Model(str(tmp_path / "other"), entries, config)
    with pytest.raises((OSError, ValueError)):
        _core.Model(str(tmp_path), entries, config)


@pytest.mark.parametrize(
    ("shape", "offset", "nbytes", "message"),
    [
        ([300, 32], 0, 2**63, "takes 38400 bytes"),
        ([300, 32], 2**64 - 10, 38400, "ends beyond"),
        ([2**33, 2**33], 0, 38400, "impossible shape"),
        ([0, 32], 0, 0, "impossible shape"),
        ([30, 32], 0, 3840, "shape of"),
        ([], 0, 4, "shape of"),
    ],
)
def test_headers_that_lie(
    shape: list[int],
    offset: int,
    nbytes: int,
    message: str,
    model: Any,
    tensors: dict[str, np.ndarray],
    tmp_path: Path,
) -> None:
    name = "model.embed_tokens.weight"
    kept = {other: value for other, value in tensors.items() if other != name}
    path = write(tmp_path / "model.safetensors", kept)
    entries = [*entries_of(path), _core.Tensor(name, "F32", shape, offset, nbytes)]
    with pytest.raises(ValueError, match=message):
        _core.Model(str(path), entries, config_of(model), threads=1)


def test_a_tensor_listed_twice_and_an_unknown_dtype(
    model: Any, tensors: dict[str, np.ndarray], tmp_path: Path
) -> None:
    path = write(tmp_path / "model.safetensors", tensors)
    entries = entries_of(path)
    with pytest.raises(ValueError, match="is there twice"):
        _core.Model(str(path), [*entries, entries[3]], config_of(model), threads=1)
    with pytest.raises(ValueError, match="dtype 'F64' is not one of"):
        _core.Tensor("x", "F64", [1], 0, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, "hidden_size = 0"),
        ({"hidden_size": 2**40}, "hidden_size"),
        ({"head_dim": 7}, "head_dim = 7 is odd"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads = 3"),
        ({"ropes": [([1.0], 1.0)]}, "a rope has 1 frequencies"),
        ({"ropes": [([float("nan")] * 4, 1.0)]}, "frequency that is not finite"),
        ({"ropes": []}, "layer_ropes holds 0; there are 0 ropes"),
        ({"layer_ropes": [0, 1]}, "layer_ropes holds 1; there are 1 ropes"),
        ({"layer_ropes": [0]}, "must have num_hidden_layers = 2 values"),
        ({"layer_windows": [3, 3, 3]}, "must have num_hidden_layers = 2 values"),
        ({"attention_scale": float("nan")}, "attention_scale is not finite"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"ropes": [([1.0] * 4, float("inf"))]}, "scale of a rope"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not one of silu, relu2, gelu_tanh"),
        ({"block_size": 0}, "block_size = 0"),
        ({"vocab_size": 2**40}, "vocab_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"activation_rounding": "floor"}, "activation_rounding"),
    ],
)
def test_impossible_settings(change: dict, message: str, model: Any) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(model, **change)


def test_more_threads_than_anyone_has(model: Any, tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match="threads = 5000"):
        load(path, model, threads=5000)
    with pytest.raises(ValueError, match="threads = -1 is negative"):
        load(path, model, threads=-1)


def test_shared_pages_give_the_same_logits_at_any_alignment(
    isa: str, model: Any, tensors: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """The header's length moves the data section over every residue of 8; a reader relies on no alignment."""
    path = write(tmp_path / "model.safetensors", tensors)
    text = np.arange(20, dtype=np.int32)
    expected = _core.Session(load(path, model, isa=isa)).forward(text)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    for extra in (0, 1, 3, 62):
        moved = tmp_path / f"moved{extra}.safetensors"
        header = data[8 : 8 + length] + b" " * extra
        moved.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
        engine = load(moved, model, isa=isa, mmap=True)
        assert engine.memory()["mapped"] > 0
        np.testing.assert_array_equal(_core.Session(engine).forward(text), expected)


def test_random_weights_of_a_files_shapes(model: Any, tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", tensors)
    entries = entries_of(path, checksums=False)
    engine = _core.Model(None, entries, config_of(model), threads=1, seed=3)
    logits = _core.Session(engine).forward(np.arange(10, dtype=np.int32))
    assert np.isfinite(logits).all()
    assert logits.std() > 0
    other = _core.Model(None, entries, config_of(model), threads=1, seed=4)
    assert not np.array_equal(_core.Session(other).forward(np.arange(10, dtype=np.int32)), logits)


def test_two_thousand_mutated_files(model: Any, tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    """Bytes changed, cut and added anywhere in the data, without checksums: an error, or a model that still runs."""
    path = write(tmp_path / "model.safetensors", tensors)
    entries, config = entries_of(path, checksums=False), config_of(model)
    data = path.read_bytes()
    rng = np.random.default_rng(1)
    text = np.arange(5, dtype=np.int32)
    loaded = refused = 0
    for trial in range(2000):
        mutated = bytearray(data)
        for _ in range(int(rng.integers(1, 20))):
            mutated[int(rng.integers(len(mutated)))] = int(rng.integers(256))
        if trial % 10 == 0:
            mutated = mutated[: int(rng.integers(len(mutated)))]
        path.write_bytes(mutated)
        try:
            engine = _core.Model(str(path), entries, config, threads=1, mmap=trial % 2 == 0)
        except ValueError:
            refused += 1
            continue
        loaded += 1
        _core.Session(engine).forward(text)
    assert loaded + refused == 2000
    assert refused >= 200  # every truncation
    assert loaded >= 100


def test_a_model_loads_again_after_errors(model: Any, tmp_path: Path) -> None:
    with pytest.raises(OSError):
        _core.Model(str(tmp_path / "none"), [], config_of(model))
    assert core_model(model, tmp_path).threads == 1
