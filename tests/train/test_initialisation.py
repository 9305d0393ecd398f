"""Stage 1 with GPTQ and AWQ: the order of layers, what the report says, checkpoints, training from there."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_encoders import small_encoder
from tiny_families import small_model
from transformers import PreTrainedModel

from bitdistill.config import RefineConfig
from bitdistill.data.corpus import PackedSequences, build_shards
from bitdistill.errors import SurgeryError
from bitdistill.model import BitLinear, TernarySpec
from bitdistill.recipe import load_recipe
from bitdistill.train import initialisation
from bitdistill.train.callbacks import StepSchedules
from bitdistill.train.initialisation import initialise
from bitdistill.train.loading import load_model, load_tokenizer
from bitdistill.train.surgery import refine

GPTQ = RefineConfig(initialisation="gptq")


def texts() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(5)
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[1, 7:] = mask[2, 2:] = 0
    return [
        {"input_ids": torch.randint(5, 80, (3, 12)), "attention_mask": mask},
        {"input_ids": torch.randint(5, 80, (2, 12))},
    ]


@pytest.mark.parametrize(
    ("make", "query", "norm_path"),
    [
        (lambda: small_model("gemma3_text"), "model.layers.{}.self_attn.q_proj", True),
        (lambda: small_encoder(), "bert.encoder.layer.{}.attention.self.query", False),
    ],
    ids=["decoder", "encoder"],
)
def test_a_layer_is_fitted_to_what_the_quantised_ones_before_it_make_of_the_text(
    make: Callable[[], PreTrainedModel], query: str, norm_path: bool, monkeypatch
):
    """The Hessians of layer 1 are those of the finished student's own inputs there, over real tokens."""
    student, _ = refine(make(), TernarySpec(scale="learned"))
    grams, fit = [], initialisation.gptq
    monkeypatch.setattr(
        initialisation, "gptq", lambda w, gram, *a, **k: (grams.append(gram), fit(w, gram, *a, **k))[1]
    )
    initialise(student, texts(), GPTQ)
    inputs: dict[str, list[torch.Tensor]] = {query.format(i): [] for i in range(2)}
    for name, found in inputs.items():
        student.get_submodule(name).register_forward_pre_hook(lambda _, args, f=found: f.append(args[0]))
    with torch.no_grad():
        for batch in texts():
            student(**batch)
    masks = [b.get("attention_mask", torch.ones_like(b["input_ids"])).bool() for b in texts()]
    per_layer = len(grams) // 2
    for index, found in enumerate(inputs.values()):
        x = torch.cat([x[mask] for x, mask in zip(found, masks, strict=True)]).double()
        torch.testing.assert_close(grams[index * per_layer], x.T @ x, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(grams[0], grams[per_layer], rtol=0.1)


@pytest.mark.parametrize("scale", ["absmean", "learned"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_the_student_has_the_codes_and_scales_that_gptq_found(granularity, scale, monkeypatch):
    student, _ = refine(
        small_model("qwen3"), TernarySpec(granularity=granularity, block_size=20, scale=scale)
    )
    found, fit = [], initialisation.gptq

    def watched(*args, **kwargs):
        found.append(fit(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(initialisation, "gptq", watched)
    findings = initialise(student, texts(), GPTQ)
    linears = [m for m in student.modules() if isinstance(m, BitLinear)]
    assert len(linears) == len(found) == 14
    for linear, (_, codes, expected) in zip(linears, found, strict=True):
        code, got = linear.ternarized()
        used = codes.any(dim=1) if granularity == "channel" else slice(None)
        assert torch.equal(code, codes)
        if granularity != "block":  # a block of 8 columns may have no code at all
            torch.testing.assert_close(got[used], expected[used], rtol=1e-6, atol=0)
    before, after = findings.means
    assert after < before


def test_gptq_names_the_linear_whose_hessian_cannot_be_inverted():
    student, _ = refine(small_model("llama"), TernarySpec())
    with pytest.raises(
        SurgeryError, match=r"gptq_damping = 0\.0: the Hessian of model\.layers\.0\.mlp\.down_proj"
    ):
        initialise(student, texts(), RefineConfig(initialisation="gptq", gptq_damping=0.0))


# --- from the command line ---


def refined(cli, project: Path, source: Path, output: Path, **settings: object) -> Path:
    given = [f"refine.{key}={value}" for key, value in {"calibration_sequences": 12, **settings}.items()]
    outcome = cli(
        "refine", project, "--source", source, "--output", output, *(x for s in given for x in ("--set", s))
    )
    assert outcome.status == 0, outcome.err
    return output


@pytest.mark.parametrize(
    "settings",
    [
        {"initialisation": "gptq", "scale": "learned", "gain": "rms"},
        {"initialisation": "gptq", "granularity": "channel", "gptq_act_order": "true"},
        {"initialisation": "awq", "norm_sites": "all"},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_refine_reports_errors_and_writes_a_student_that_loads_with_its_codes(
    cli, project, qwen3, tmp_path, settings
):
    folder = refined(cli, project, qwen3, tmp_path / "student", **settings)
    config, record = (json.loads((folder / name).read_text()) for name in ("config.json", "run.json"))
    assert config["ternary"]["scale"] == settings.get("scale", "absmean")
    assert record["settings"]["calibration"]["sequence_length"] == 16
    report, method = (folder / "surgery.txt").read_text(), settings["initialisation"]
    lines = [line for line in report.splitlines() if f"({method})" in line]
    assert len(lines) == 14
    pairs = [tuple(map(float, line.partition("  error ")[2].split()[::2])) for line in lines]
    means = np.mean(pairs, axis=0)
    assert record["metrics"]["output_error_absmean"] == pytest.approx(means[0], abs=1e-4)
    assert record["metrics"]["output_error"] == pytest.approx(means[1], abs=1e-4)
    assert means[1] < means[0]
    # The first linear's error, from the files: no norm of a student changes its input, and nothing is before it.
    if settings.get("norm_sites") is None:
        dense, first = load_model(qwen3), "model.layers.0.self_attn.q_proj"
        found: list[torch.Tensor] = []
        dense.get_submodule(first).register_forward_pre_hook(lambda _, args: found.append(args[0]))
        recipe = load_recipe(project)
        tokens = PackedSequences(
            build_shards(recipe.corpus, "pretrain", load_tokenizer(qwen3), tmp_path / "shards"), 16
        )
        with torch.no_grad():
            dense(torch.stack([torch.as_tensor(tokens[i]["input_ids"]) for i in range(12)]))
        x = found[0].flatten(0, 1).double().numpy().T
        code, scale = load_model(folder).get_submodule(first).ternarized()
        weight, quantised = (
            m.double().numpy() for m in (dense.get_submodule(first).weight.detach(), code * scale)
        )
        expected = np.linalg.norm((quantised - weight) @ x) / np.linalg.norm(weight @ x)
        assert pairs[0][1] == pytest.approx(expected, abs=1e-4)


def test_an_absmean_student_with_calibrated_gains_has_its_errors_in_the_report(cli, project, bert, tmp_path):
    folder = refined(cli, project, bert, tmp_path / "student", gain="rms")
    report = (folder / "surgery.txt").read_text()
    assert report.count("  error 0.") == 12
    assert "->" not in report.partition("\nparameters")[0]


def test_a_run_is_planned_with_what_stage_1_makes(cli, project, llama, tmp_path):
    settings = (
        "refine.initialisation=gptq",
        "refine.scale=learned",
        "refine.granularity=channel",
        "run.methods=['bitnet_sft']",
        f"model.source={llama}",
        f"output_dir={tmp_path}",
    )
    outcome = cli(
        "run", project, "--dry-run", "--flops", "1e12", *(x for s in settings for x in ("--set", s))
    )
    assert outcome.status == 0, outcome.err
    assert "refine-none" in outcome.out


def test_awq_of_an_encoder_is_refused_before_anything_is_trained(cli, encoder_project, bert, tmp_path):
    settings = ("refine.initialisation=awq", f"model.source={bert}", f"output_dir={tmp_path / 'runs'}")
    outcome = cli("run", encoder_project, *(x for s in settings for x in ("--set", s)))
    assert outcome.status == 1
    assert "refine.initialisation = 'awq'" in outcome.err
    assert not (tmp_path / "runs").exists()


def test_training_moves_learned_scales_and_a_stopped_step_goes_on_to_the_same_weights(
    cli, project, llama, tmp_path, monkeypatch
):
    source = refined(cli, project, llama, tmp_path / "student", initialisation="gptq", scale="learned")

    def pretrain(name: str):
        settings = ("pretrain.save_every=2", "pretrain.quant_warmup_ratio=0.5")
        return cli(
            "pretrain", project, "--source", source, "--output", tmp_path / name,
            *(x for s in settings for x in ("--set", s)),
        )  # fmt: skip

    outcome = pretrain("whole")
    assert outcome.status == 0, outcome.err
    begin = StepSchedules.on_step_begin

    def full_disk(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise OSError(28, "No space left on device")
        return begin(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StepSchedules, "on_step_begin", full_disk)
        assert pretrain("stopped").status == 1
    assert (tmp_path / "stopped.partial" / "trainer" / "checkpoint-4").is_dir()
    outcome = pretrain("stopped")
    assert outcome.status == 0, outcome.err
    before, whole, stopped = (
        load_file(tmp_path / name / "model.safetensors") for name in ("student", "whole", "stopped")
    )
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    scales = [name for name in whole if name.endswith(".weight_scale")]
    assert len(scales) == 14
    for name in scales:
        assert whole[name].item() > 0
        assert not torch.equal(whole[name], before[name])
        absmean = whole[name.removesuffix("_scale")].abs().mean()
        assert not torch.isclose(whole[name].squeeze(), absmean, rtol=1e-4)
    stats = json.loads((tmp_path / "whole" / "weights.json").read_text())
    model = load_model(tmp_path / "whole")
    codes = torch.cat([m.ternarized()[0].flatten() for m in model.modules() if isinstance(m, BitLinear)])
    assert stats["zero_frac"] == pytest.approx((codes == 0).float().mean().item(), abs=1e-6)
    assert cli("inspect", tmp_path / "whole", "--json", tmp_path / "facts.json").status == 0
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["ternary_spec"]["scale"] == "learned"
    assert facts["trit_shares"]["0"] == pytest.approx(stats["zero_frac"], abs=1e-4)
