"""What tests of models share."""

import pytest
import torch


@pytest.fixture
def cuda_autocast():
    """Switch it on and off; torch.autocast itself does so only where there is a GPU."""
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield lambda enabled: torch.set_autocast_enabled("cuda", enabled)
    torch.set_autocast_enabled("cuda", False)
    torch.set_autocast_dtype("cuda", before)
