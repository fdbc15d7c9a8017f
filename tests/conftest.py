"""Fixtures: the devices to test on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

# The same examples on every run: a failure must be there again when one looks at it.
settings.register_profile("fixed", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("fixed")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return str(request.param)
