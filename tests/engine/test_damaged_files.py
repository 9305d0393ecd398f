"""Damaged, hostile and foreign packed folders: one error that names the place, never a crash."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitdistill import Engine
from bitdistill.engine.loading import PackedModel
from bitdistill.errors import BitDistillError, CheckpointError
from bitdistill.export import export
from bitdistill.packed import read_header

PROJ = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def whole(save_student: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    source = save_student(folder / "student", "qwen3", {"granularity": "channel"})
    export(source, folder / "packed")
    return folder / "packed"


@pytest.fixture
def packed(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "packed"))


def split(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(path: Path, header: dict | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def edit_header(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        header, data = split(folder / "model.safetensors")
        change(header)
        join(folder / "model.safetensors", header, data)

    return apply


def edit_config(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def edit_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return apply


def flip_last_bit(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def nan_scale(folder: Path) -> None:
    """With its checksum taken away, so that the value itself is what is found."""
    header, data = split(folder / "model.safetensors")
    begin, _ = header[f"{PROJ}.weight_scale"]["data_offsets"]
    sums = json.loads(header["__metadata__"]["checksums"])
    del sums[f"{PROJ}.weight_scale"]
    header["__metadata__"]["checksums"] = json.dumps(sums)
    nan = np.array([np.nan], "<f4").tobytes()
    join(folder / "model.safetensors", header, data[:begin] + nan + data[begin + 4 :])


def drop_tensor(header: dict) -> None:
    del header[f"{PROJ}.weight_scale"]
    sums = json.loads(header["__metadata__"]["checksums"])
    del sums[f"{PROJ}.weight_scale"]
    header["__metadata__"]["checksums"] = json.dumps(sums)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def entry(name: str, **changes: Any) -> Callable[[Path], None]:
    return edit_header(lambda h: h[name].update(changes))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (edit_bytes(lambda d: d[:-100]), "ends beyond the file's .* truncated"),
    "empty": (edit_bytes(lambda d: b""), "truncated or not a safetensors file"),
    "bit flipped": (edit_bytes(flip_last_bit), "checksum"),
    "oversized header": (edit_bytes(lambda d: (2**62).to_bytes(8, "little") + d[8:]), "its header claims"),
    "header not JSON": (lambda f: join(f / "model.safetensors", b"{oops", b""), "damaged header"),
    "header a list": (lambda f: join(f / "model.safetensors", b"[1]", b""), "not a JSON object"),
    "header nested": (lambda f: join(f / "model.safetensors", b"[" * 100_000, b""), "damaged header"),
    "wrong dtype": (entry(f"{PROJ}.weight", dtype="I8"), f"{PROJ}.weight .*expected U8"),
    "unknown dtype": (entry(f"{PROJ}.weight", dtype="F64"), "dtype 'F64' is not one of"),
    "wrong shape": (entry(f"{PROJ}.weight", shape=[1, 1, 128, 2]), f"{PROJ}.weight .*shape"),
    "shape of other bytes": (entry(f"{PROJ}.weight", shape=[1, 1, 9, 128]), "does not take"),
    "negative shape": (entry(f"{PROJ}.weight", shape=[-1, -1, 2, 128]), "not a list of sizes"),
    "shape not numbers": (entry(f"{PROJ}.weight", shape="big"), "not a list of sizes"),
    "offsets backwards": (entry(f"{PROJ}.weight", data_offsets=[256, 0]), "does not take"),
    "offsets missing": (edit_header(lambda h: h[f"{PROJ}.weight"].pop("data_offsets")), "data_offsets None"),
    "missing tensor": (edit_header(drop_tensor), f"{PROJ}.weight_scale is missing"),
    "checksum of nothing": (edit_header(lambda h: h.pop(f"{PROJ}.weight_scale")), "has a checksum and is not there"),
    "NaN scale": (nan_scale, f"{PROJ}.weight_scale .*not finite"),
    "file's layout": (edit_header(lambda h: h["__metadata__"].update(layout="x")), "layout 'x' is not 't5x32-v1'"),
    "no weights": (remove("model.safetensors"), "model.safetensors: cannot read it"),
    "no config": (remove("config.json"), "no config.json"),
    "config not JSON": (write("config.json", "{"), "config.json: not valid JSON"),
    "config a list": (write("config.json", "[]"), "expected a JSON object, found list"),
    "not exported": (edit_config(lambda c: c.pop("packed")), "not an exported model.*bitdistill export"),
    "unknown family": (edit_config(lambda c: c.update(model_type="mamba")), "model_type 'mamba' is not one of"),
    "format version": (edit_config(lambda c: c["packed"].update(format_version=3)), "format_version 3 is not 1 or 2"),
    "no version": (edit_config(lambda c: c["packed"].pop("format_version")), "packed.format_version is missing"),
    "layout": (edit_config(lambda c: c["packed"].update(layout="t5x64-v1")), "layout 't5x64-v1'"),
    "activation bits": (edit_config(lambda c: c["packed"].update(activation_bits=3)), "packed.activation_bits = 3"),
    "granularity": (edit_config(lambda c: c["packed"].update(granularity="row")), "packed.granularity = 'row'"),
    "block size": (edit_config(lambda c: c["packed"].update(block_size=16)), "does not go with granularity"),
    "rounding": (edit_config(lambda c: c["packed"].update(activation_rounding="up")), "activation_rounding"),
    "hidden size": (edit_config(lambda c: c.update(hidden_size="wide")), "hidden_size = 'wide'"),
    "other sizes": (edit_config(lambda c: c.update(hidden_size=64)), "shape"),
    "eps": (edit_config(lambda c: c.update(rms_norm_eps="small")), "config.json"),
    "sliding window": (
        edit_config(lambda c: c.update(layer_types=["sliding_attention"] * 2, sliding_window=0)),
        "sliding_window = 0",
    ),
    "chunked attention": (
        edit_config(lambda c: c.update(layer_types=["chunked_attention"] * 2)),
        "'chunked_attention' is not what the engine runs",
    ),
    "layer types": (edit_config(lambda c: c.update(layer_types=["full_attention"])), "layer_types"),
    "rope": (edit_config(lambda c: c.update(rope_parameters={"rope_type": "su"})), "rope_type 'su'"),
    "rope a list": (edit_config(lambda c: c.update(rope_parameters=[1])), "rope_parameters = "),
    "stop token": (write("generation_config.json", '{"eos_token_id": "end"}'), "eos_token_id 'end'"),
    "no tokenizer": (remove("tokenizer.json"), "no tokenizer.json"),
    "tokenizer": (write("tokenizer.json", "{}"), "the tokenizer does not load"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_one_error_says_what_is_wrong(name: str, packed: Path) -> None:
    damage, message = DAMAGES[name]
    damage(packed)
    with pytest.raises(CheckpointError, match=message) as caught:
        Engine(packed, threads=1)
    assert str(packed) in str(caught.value)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        Engine(tmp_path / "none")


def test_two_thousand_mutated_files(whole: Path, packed: Path) -> None:
    """Header and data changed anywhere: a BitDistillError, or a model whose logits are computed."""
    good = (whole / "model.safetensors").read_bytes()
    config = (whole / "config.json").read_bytes()
    header_end = 8 + int.from_bytes(good[:8], "little")
    rng = np.random.default_rng(0)
    refused = ran = 0
    for trial in range(2000):
        data, settings = bytearray(good), bytearray(config)
        for _ in range(int(rng.integers(1, 4))):
            if trial % 4 == 3:
                settings[int(rng.integers(len(settings)))] = int(rng.integers(32, 127))
            else:  # mostly the header: the data's own mutations are tested with the core
                end = header_end if trial % 4 else len(data)
                data[int(rng.integers(end))] = int(rng.integers(256))
        if trial % 20 == 0:
            del data[int(rng.integers(len(data))) :]
        (packed / "model.safetensors").write_bytes(data)
        (packed / "config.json").write_bytes(settings)
        try:
            core = PackedModel.open(packed).load(threads=1)
        except BitDistillError:
            refused += 1
            continue
        ran += 1
        assert core.memory()["ternary"] > 0
    assert refused + ran == 2000
    assert refused >= 1000
    assert ran >= 20  # settings that no arithmetic depends on


def test_the_undamaged_model_loads(packed: Path) -> None:
    assert read_header(packed / "model.safetensors")[f"{PROJ}.weight"].dtype == "U8"
    assert Engine(packed, threads=1).generate([5, 6], max_new_tokens=2).prompt_tokens == 2
