"""The exported folder against the numpy codec, the torch student and the format page; and what is refused."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from bitdistill import export as exporting
from bitdistill import layout
from bitdistill.errors import CheckpointError, ConfigError
from bitdistill.export import export
from bitdistill.model.quant import ternarize
from bitdistill.packed import read_header
from bitdistill.train.loading import load_model

SHAPES = [
    ({}, {}),
    ({"granularity": "channel", "norm_sites": "all"}, {"tie_word_embeddings": False}),
    ({"granularity": "block", "block_size": 7, "skip": ["*.down_proj"]}, {"attention_bias": True}),
    ({"granularity": "channel", "scale": "learned"}, {}),
]


@pytest.fixture(params=SHAPES, ids=["tensor", "channel", "block", "learned"])
def made(
    request: pytest.FixtureRequest, save_student: Callable[..., Path], tmp_path: Path
) -> tuple[Path, Path]:
    ternary, changes = request.param
    source = save_student(tmp_path / "student", "qwen3", ternary, **changes)
    export(source, tmp_path / "out")
    return source, tmp_path / "out"


def test_the_trits_and_scales_are_the_students(made: tuple[Path, Path]) -> None:
    source, out = made
    model = load_model(source)
    with safe_open(out / "model.safetensors", "np") as stored:
        names = set(stored.keys())
        checked = 0
        for name, module in model.named_modules():
            if not hasattr(module, "spec"):
                continue
            spec = module.spec
            code, scale = ternarize(module.weight.detach(), spec.granularity, spec.block_size)
            if spec.scale == "learned":
                absmean, scale = scale, module.weight_scale.detach()
                assert not torch.allclose(absmean, scale)
                code = (module.weight.detach() / scale).round().clip(-1, 1)
            block = spec.block_size if spec.granularity == "block" else None
            got = layout.unpack(stored.get_tensor(f"{name}.weight"), *module.weight.shape, block)
            np.testing.assert_array_equal(got, code.numpy())
            np.testing.assert_array_equal(stored.get_tensor(f"{name}.weight_scale"), scale.numpy())
            checked += 1
    assert checked
    # Nothing else than the model's own tensors and the scales is there.
    own = {name for name, _ in model.named_parameters() if not name.endswith("_scale")}
    assert {n for n in names if not n.endswith("_scale")} == own


def test_every_other_tensor_is_the_students_in_bf16_or_f32(made: tuple[Path, Path]) -> None:
    source, out = made
    model = load_model(source)
    with safe_open(out / "model.safetensors", "pt") as stored:
        for name, parameter in model.named_parameters():
            got = stored.get_tensor(name)
            if got.dtype == torch.uint8 or name.endswith("_scale"):
                continue
            wide = "embed_tokens" in name or "lm_head" in name or name.endswith("_proj.weight")
            assert got.dtype == (torch.bfloat16 if wide else torch.float32), name
            torch.testing.assert_close(got, parameter.detach().to(got.dtype), rtol=0, atol=0)


def test_int8_rows_are_absmax(save_student: Callable[..., Path], tmp_path: Path) -> None:
    source = save_student(tmp_path / "student", "llama", {}, tie_word_embeddings=False)
    model = load_model(source)
    with torch.no_grad():
        model.lm_head.weight[5] = 0  # padding
    model.save_pretrained(source)
    export(source, tmp_path / "out", head="int8")
    weight = load_model(source).lm_head.weight.detach().numpy().astype(np.float64)
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as stored:
        code, scale = stored.get_tensor("lm_head.weight"), stored.get_tensor("lm_head.weight_scale")
    assert (code.dtype, scale.shape) == (np.int8, (300, 1))
    assert not code[5].any()
    assert (scale > 0).all()
    # absmax: the largest of a row is 127, and nothing is further from its code than half a step.
    filled = np.abs(weight).max(1) > 0
    assert (np.abs(code[filled]).max(1) == 127).all()
    assert (np.abs(weight - code * scale) <= 0.5001 * scale).all()


def test_int4_groups_are_no_worse_than_absmax(save_student: Callable[..., Path], tmp_path: Path) -> None:
    source = save_student(tmp_path / "student", "llama", {}, tie_word_embeddings=False)
    model = load_model(source)
    with torch.no_grad():
        model.lm_head.weight[5] = 0  # padding
        model.lm_head.weight[6, 3] = 40  # an outlier
    model.save_pretrained(source)
    export(source, tmp_path / "out", head="int4")
    weight = load_model(source).lm_head.weight.detach().numpy().astype(np.float64)
    stored = {
        name: np.frombuffer(
            (tmp_path / "out" / "model.safetensors").read_bytes()[e.offset :][: e.nbytes],
            {"U8": np.uint8, "BF16": np.uint16}[e.dtype],
        ).reshape(e.shape)
        for name, e in read_header(tmp_path / "out" / "model.safetensors").items()
        if name.startswith("lm_head")
    }
    code = layout.unpack_int4(stored["lm_head.weight"], *weight.shape)
    scale = (stored["lm_head.weight_scale"].astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    scale = scale.transpose(0, 2, 1).reshape(-1, scale.shape[1])[: len(weight)]
    assert (scale > 0).all()
    assert not code[5].any()

    def errors(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
        padded = np.zeros((len(weight), scale.shape[1] * 64))
        padded[:, : weight.shape[1]] = codes * scales.repeat(64, 1)[:, : weight.shape[1]] - weight
        return (padded.reshape(len(weight), -1, 64) ** 2).sum(2)

    padded = np.zeros((len(weight), scale.shape[1] * 64))
    padded[:, : weight.shape[1]] = weight
    absmax = np.abs(padded).reshape(len(weight), -1, 64).max(2).clip(1e-30) / 7
    absmax = torch.from_numpy(absmax).bfloat16().double().numpy()  # as the page asks
    plain = np.round(weight / absmax.repeat(64, 1)[:, : weight.shape[1]])
    found, reference = errors(code, scale), errors(plain, absmax)
    assert (found <= reference * 1.0001 + 1e-12).all()
    assert found.sum() < 0.97 * reference.sum()


def test_config_says_how_to_read_it(made: tuple[Path, Path]) -> None:
    source, out = made
    config, student = (json.loads((folder / "config.json").read_text()) for folder in (out, source))
    assert config["model_type"] == "bit_qwen3"
    ternary = student["ternary"]
    assert config["packed"] == {
        "format_version": 1,
        "layout": "t5x32-v1",
        "granularity": ternary["granularity"],
        "block_size": ternary["block_size"] if ternary["granularity"] == "block" else None,
        "activation_bits": 8,
        "activation_rounding": "divide",
    }
    assert "auto_map" not in config  # transformers must not read packed bytes as weights
    for key in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "rope_parameters", "ternary"):
        assert config[key] == student[key]


def test_header_is_aligned_and_u8_comes_first(made: tuple[Path, Path]) -> None:
    _, out = made
    data = (out / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert (8 + length) % 64 == 0
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    assert (metadata["format_version"], metadata["layout"]) == ("1", "t5x32-v1")
    sums = json.loads(metadata["checksums"])
    assert set(sums) == set(header)
    by_place = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    kinds = [entry["dtype"] == "U8" for _, entry in by_place]
    assert kinds == sorted(kinds, reverse=True)
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        part = data[8 + length + begin : 8 + length + end]
        words = [int.from_bytes(part[i : i + 8], "little") for i in range(0, len(part), 8)]
        expected = sum((2 * i + 1) * w for i, w in enumerate(words)) % 2**64
        assert int(sums[name], 16) == expected, name
        assert len(sums[name]) == 16


def test_digests_are_sha256_of_every_other_file(made: tuple[Path, Path]) -> None:
    _, out = made
    stored = json.loads((out / "digests.json").read_text())
    files = {path.name for path in out.iterdir()} - {"digests.json"}
    assert files >= {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
        "README.md",
    }  # fmt: skip
    assert stored == {
        "algorithm": "sha256",
        "files": {n: hashlib.sha256((out / n).read_bytes()).hexdigest() for n in files},
    }


def test_tokenizer_and_generation_settings_are_the_students(made: tuple[Path, Path]) -> None:
    source, out = made
    text = "the soup was very good ."
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (out, source))
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 0


@pytest.mark.parametrize(
    ("card", "option", "expected", "absent"),
    [
        (
            "---\nlicense: mit\nbase_model: acme/tiny\n---\nText\n", None,
            ["license: mit", "base_model: acme/tiny", "Licence of the base model: mit"], "not recorded",
        ),
        ("---\nlicense: mit\n---\n", "apache-2.0", ["license: apache-2.0"], "mit\n"),
        (None, None, ["licence of the base model is not recorded"], "\nlicense:"),
        ("no front matter, license: mit", None, ["licence of the base model is not recorded"], "\nlicense:"),
    ],
)  # fmt: skip
def test_the_card_carries_the_licence_if_it_is_known(
    student: Path, card: str | None, option: str | None, expected: list[str], absent: str, tmp_path: Path
) -> None:
    source = tmp_path / "student"
    shutil.copytree(student, source)
    if card is not None:
        (source / "README.md").write_text(card, encoding="utf-8")
    export(source, tmp_path / "out", licence=option)
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\n")
    assert all(part in text for part in expected)
    assert absent not in text


# --- whole or not at all ---


def test_an_export_that_fails_leaves_nothing(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "_digests", full)
    with pytest.raises(OSError, match="No space"):
        export(student, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_export_is_replaced_and_kept_when_the_new_one_fails(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(student, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    export(student, tmp_path / "out", head="int8")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before
    monkeypatch.setattr(exporting, "_digests", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(student, tmp_path / "out")
    assert read_header(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"].dtype == "I8"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_same_student_gives_the_same_bytes(student: Path, tmp_path: Path) -> None:
    export(student, tmp_path / "a")
    export(student, tmp_path / "b")
    assert (tmp_path / "a" / "digests.json").read_text() == (tmp_path / "b" / "digests.json").read_text()


@pytest.mark.parametrize(
    ("ternary", "version", "keys"),
    [
        ({"activation_bits": 4}, 2, {"activation_bits": 4}),
        (
            {"hadamard": {"o_proj": 8, "down_proj": 0}},
            2,
            {"activation_bits": 8, "hadamard": {"o_proj": 8, "down_proj": 16}},
        ),
        ({}, 1, {"activation_bits": 8}),
    ],
    ids=["a4", "hadamard", "plain"],
)
def test_a_file_says_what_a_reader_must_compute(
    save_student: Callable[..., Path], tmp_path: Path, ternary: dict, version: int, keys: dict
) -> None:
    """Version 2 where a reader of version 1 would compute something else; the weights are packed as ever."""
    student = save_student(tmp_path / "student", "llama", ternary)
    export(student, tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    packed = config["packed"]
    assert packed["format_version"] == version
    assert {key: packed[key] for key in ("activation_bits", "hadamard") if key in packed} == keys
    with safe_open(tmp_path / "packed" / "model.safetensors", "numpy") as stored:
        assert stored.metadata()["format_version"] == str(version)
        name = "model.layers.0.mlp.down_proj.weight"
        latent = load_model(student).get_parameter(name).detach()
        code = (latent / latent.abs().mean()).round().clamp(-1, 1)
        assert np.array_equal(layout.unpack(stored.get_tensor(name), *latent.shape), code.numpy())


# --- refusals ---


def test_refusals(llama: Path, student: Path, save_student: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    half = tmp_path / "half.partial"
    shutil.copytree(student, half)
    running = tmp_path / "running"
    shutil.copytree(student, running)
    record = json.loads((running / "run.json").read_text())
    (running / "run.json").write_text(json.dumps(record | {"status": "running"}))
    incomplete = tmp_path / "incomplete"
    shutil.copytree(student, incomplete)
    (incomplete / "model.safetensors").unlink()
    sixteen_bit = save_student(tmp_path / "a16", "llama", {"activation_bits": 16})
    biased = save_student(tmp_path / "biased", "llama", {"dead_zone_bias": 1e-3})
    export(student, tmp_path / "packed")
    for source, message in (
        (llama, "is not a ternary model .*bitdistill refine"),
        (half, "has not finished"),
        (running, "has not finished"),
        (incomplete, "does not load"),
        (sixteen_bit, "activations of 16 bits"),
        (biased, "no place for. .* refine.dead_zone_bias = 0"),
        (tmp_path / "packed", "exported model already"),
        (tmp_path / "nothing", "no such folder"),
    ):
        with pytest.raises(CheckpointError, match=message):
            export(source, out)
        assert not out.exists()
    for options, message in (
        ({"head": "int3"}, "--head int3: use one of"),
        ({"head": "int8", "embedding": "bf16"}, "give one form"),
    ):
        with pytest.raises(ConfigError, match=message):
            export(student, out, **options)


@pytest.mark.parametrize("kind", ["file", "folder", "student"])
def test_something_else_at_the_output_is_left_alone(student: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "folder":
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    else:
        shutil.copytree(student, out)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match="is there already"):
        export(student, out)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
