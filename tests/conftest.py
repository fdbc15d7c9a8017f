"""Fixtures: the devices to test on."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from flashinfer_ops import native

# The same examples on every run: a failure must be there again when one looks at it.
settings.register_profile("fixed", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("fixed")


def share_processors() -> None:
    """Where pytest-xdist runs several workers, each takes its share of the processors."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    share_processors()
    config.addinivalue_line(
        "markers", "sanitize: short cases to run under compute-sanitizer (see tests/sanitize.sh)"
    )


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return str(request.param)


@pytest.fixture
def cuda() -> str:
    """For tests that make sense on a GPU only; their files are marked `gpu`."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return "cuda"


@pytest.fixture(params=["avx512_bf16", "avx512", "avx2", "baseline"])
def cpu_capability(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with each instruction set's CPU kernels, those that this machine has."""
    before = native.cpu_capability()
    try:
        native.set_cpu_capability(request.param)
    except ValueError:
        pytest.skip(f"this machine does not run {request.param}")
    yield request.param
    native.set_cpu_capability(before)
