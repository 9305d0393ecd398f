"""What every test shares: reproducible examples, one torch thread, a fixed seed, no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

# Derandomised: a test that passed on one machine draws the same examples on the next.
# No deadline: a busy machine is not a bug.
settings.register_profile("bitdistill", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("bitdistill")

# Equality to the last bit is asserted between processes; a sum split over threads may round otherwise.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
