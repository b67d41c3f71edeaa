"""One torch thread for every test: models of a few thousand weights gain nothing from more and lose much under load."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def profile_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where the servers of all tests keep measured latencies: each checkpoint is measured once."""
    return tmp_path_factory.mktemp("profiles")
