"""``docs/scaling.md``: its FSDP2 file is one that accelerate takes and that shards as the text says."""

import re
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import prepare_multi_gpu_env
from tiny_families import families

from bitdistill.processes import _check_sharding
from bitdistill.train.objective import LanguageModelling

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"


@pytest.fixture
def config_file(tmp_path) -> Path:
    (block,) = re.findall(r"```yaml\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    path = tmp_path / "fsdp2.yaml"
    path.write_text(block, encoding="utf-8")
    return path


@pytest.fixture
def environment(config_file, monkeypatch) -> dict[str, str]:
    """What ``accelerate launch --config_file`` hands to every process."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    parser = launch_command_parser()
    arguments = parser.parse_args(
        ["--config_file", str(config_file), "-m", "bitdistill", "run", "recipe.toml"]
    )
    arguments, _, _ = _validate_launch_command(arguments)
    assert arguments.use_fsdp
    found = prepare_multi_gpu_env(arguments)
    for name, value in found.items():
        if name.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(name, value)
    return found


def test_accelerate_reads_the_file(config_file):
    config = load_config_from_file(str(config_file))
    assert config.distributed_type == DistributedType.FSDP
    assert config.num_processes == 8


def test_every_process_is_told_to_shard_as_we_need_it(environment, monkeypatch):
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    _check_sharding()


@families
def test_the_plugin_finds_the_decoder_layers_and_nothing_else(environment, make_student, family):
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    student = make_student(family)
    objective = LanguageModelling(student)
    plugin.set_auto_wrap_policy(objective)
    policy = fsdp2_prepare_auto_wrap_policy(plugin, objective)
    assert [module for module in objective.modules() if policy(module)] == list(student.model.layers)
