import sys
from pathlib import Path

import pytest
import torch

for part in ("score", "lower", "runtime"):  # their kits serve here, too
    sys.path.insert(0, str(Path(__file__).parents[1] / part))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
