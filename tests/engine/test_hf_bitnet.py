"""Hugging Face's own BitNet checkpoints, in both forms they come in, exported and run beside transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity import differing_codes, differing_trits, torch_codes
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.bitnet import pack_weights

from bitdistill import Engine
from bitdistill.export import export
from bitdistill.model.quant import ternarize

TEXT = "the soup was cold and the host seemed very tired of the room"


def save_bitnet(folder: Path, model: Any, tokenizer: PreTrainedTokenizerFast, mode: str) -> Path:
    """As the published ones: master weights that are quantised in the forward pass (``online``), or four trits a byte
    and a scale (``offline``)."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": mode,
        "modules_to_not_convert": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    if mode == "offline":
        path = folder / "model.safetensors"
        tensors = load_file(path)
        for name in [n for n in tensors if n.endswith("_proj.weight")]:
            code, scale = ternarize(tensors[name])
            tensors[name] = pack_weights(code)
            tensors[f"{name}_scale"] = scale.reshape(1)
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_hugging_face_bitnet_is_exported_and_runs_as_in_transformers(
    bitnet: Any, tokenizer: PreTrainedTokenizerFast, mode: str, tmp_path: Path
) -> None:
    source = save_bitnet(tmp_path / "bitnet", bitnet, tokenizer, mode)
    export(source, tmp_path / "packed", head="f32")
    engine = Engine(tmp_path / "packed", kv_cache="fp32")
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    assert differing_trits(model, tmp_path / "packed") == 0
    ids = list(tokenizer(TEXT)["input_ids"])
    got, taps = engine.session().forward_tapped(np.array(ids, np.int32))
    _, codes = torch_codes(model, ids, taps)
    assert differing_codes(codes, taps) <= 1e-3 * sum(code.size for code in codes.values())
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(got[0], expected[0], atol=1e-4 * expected.std(), rtol=0)
    assert np.abs(got - expected).mean() < 0.01 * expected.std()
