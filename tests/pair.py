"""Run by torchrun on two processes: command lines one after the other, each under DDP or FSDP2.

    torchrun --nproc-per-node 2 pair.py '[{"arguments": ["pretrain", ...], "sharded": true, "stop_at": 4}]'

accelerate offers FSDP2 to accelerators only; a sharded command tells it that processes on CPUs are some. What follows
is accelerate's and Trainer's own way: its plugin, its wrapping, its checkpoints. ``stop_at`` ends the training after
that step was logged. The main process prints JSON: the status of each command, and how often FSDP2 was told to keep
gradients whole.
"""

import contextlib
import json
import sys
from collections.abc import Iterator

import accelerate.state
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from command_line import run_cli
from torch.distributed.fsdp import FSDPModule

from bitdistill.train.callbacks import MetricsFile

STOPPED = 75

unreduced: list[bool] = []
"""Whether FSDP2 was told to keep gradients whole, at every such call."""
initialise = accelerate.state.AcceleratorState.__init__


def initialise_sharded(self, *arguments, **keywords):
    initialise(self, *arguments, **keywords)
    if self.distributed_type == DistributedType.MULTI_CPU:
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
        if self.mixed_precision != "no":
            plugin.set_mixed_precision(self.mixed_precision)
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin
        accelerate.PartialState._shared_state["distributed_type"] = DistributedType.FSDP


@contextlib.contextmanager
def stopped_at(step: int | None) -> Iterator[None]:
    """Training ends with status ``STOPPED`` once ``step`` was logged."""
    log = MetricsFile.on_log

    def on_log(self, args, state, control, logs=None, **kwargs):
        log(self, args, state, control, logs=logs, **kwargs)
        if state.global_step == step:
            sys.exit(STOPPED)

    MetricsFile.on_log = on_log
    try:
        yield
    finally:
        MetricsFile.on_log = log


def main(jobs: list[dict]) -> None:
    FSDPModule.set_requires_gradient_sync = lambda module, on, **_: unreduced.append(not on)
    statuses = []
    for job in jobs:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        sharded = job.get("sharded", False)
        accelerate.state.AcceleratorState.__init__ = initialise_sharded if sharded else initialise
        with stopped_at(job.get("stop_at")):
            outcome = run_cli(*job["arguments"])
        statuses.append(outcome.status)
    if accelerate.PartialState().is_main_process:
        json.dump({"statuses": statuses, "unreduced": sum(unreduced)}, sys.stdout)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
