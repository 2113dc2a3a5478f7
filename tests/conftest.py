import os
from pathlib import Path

import pytest
import torch

# Most batches here are tiny, and a second thread makes them wait longer than they run. Subprocesses get the same.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

REAL = os.environ.get("CIFAR100_DIR")


@pytest.fixture(scope="session")
def cifar100_dir() -> Path:
    """The folder of the real set, where there is one."""
    if not REAL or not Path(REAL).is_dir():
        pytest.skip("CIFAR100_DIR does not name the real set")
    return Path(REAL).absolute()
