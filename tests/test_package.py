"""The package: version, loading of the libraries, `python -m flashinfer_ops`, a wheel elsewhere."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import flashinfer_ops
from flashinfer_ops import native

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, cwd: Path) -> str:
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_version() -> None:
    assert flashinfer_ops.__version__ == importlib.metadata.version("flashinfer-ops")


def test_module_says_what_serves_each_operator(tmp_path: Path) -> None:
    printed = run(sys.executable, "-m", "flashinfer_ops", cwd=tmp_path)
    printed = printed.split("\ncuda:0 ")[0]
    assert f"flashinfer_ops {flashinfer_ops.__version__}, torch {torch.__version__}" in printed
    for operator in flashinfer_ops.reference.OPERATORS:
        line = next(line for line in printed.splitlines() if line.split()[:1] == [operator])
        assert f"C++ from _C ({native.cpu_capability()}" in line
    assert printed.count("self-check") == printed.count(": passed") >= 3


@pytest.mark.gpu
def test_module_says_what_serves_cuda(cuda: str, tmp_path: Path) -> None:
    """Compiled kernels or Triton's on the GPU; the self-check there passes too."""
    printed = run(sys.executable, "-m", "flashinfer_ops", cwd=tmp_path)
    on_gpu = printed.split("\ncuda:0 ")[1]
    for operator in flashinfer_ops.reference.OPERATORS:
        line = next(line for line in on_gpu.splitlines() if line.split()[:1] == [operator])
        assert "C++ from _C_cuda" in line or "Triton" in line
    assert on_gpu.count("self-check") == on_gpu.count(": passed") >= 3


def test_missing_library_is_loud() -> None:
    with pytest.raises(ImportError, match="library _missing is missing. Install the package again"):
        native.load("_missing")


def test_library_that_does_not_load_is_loud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "_broken.so"
    broken.write_bytes(b"no library")
    spec = importlib.machinery.ModuleSpec("flashinfer_ops._broken", None, origin=str(broken))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ImportError, match="_broken does not load under torch .* Install the pack"):
        native.load("_broken")


@pytest.fixture(scope="module")
def cuda_library() -> Path:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc: the CUDA library is not built")
    spec = importlib.util.find_spec("flashinfer_ops._C_cuda")
    assert spec is not None and spec.origin is not None, "nvcc is here, but _C_cuda was not built"
    return Path(spec.origin)


def test_cuda_library_has_code_for_hopper(cuda_library: Path) -> None:
    triton = importlib.util.find_spec("triton")
    tools = Path(str(triton.origin)).parent / "backends/nvidia/bin" if triton else None
    cuobjdump = shutil.which("cuobjdump", path=tools) or shutil.which("cuobjdump")
    if cuobjdump is None:
        pytest.skip("cuobjdump is neither in triton's package nor on the path")
    architectures = run(cuobjdump, "--list-elf", cuda_library, cwd=ROOT)
    assert "sm_90a" in architectures and "sm_80" in architectures
    assert "sm_90" in run(cuobjdump, "--list-ptx", cuda_library, cwd=ROOT)


def test_cuda_library_asks_torch_for_nothing_unknown(cuda_library: Path) -> None:
    """What it leaves undefined of torch is in libtorch_cpu, or is the one CUDA function it uses."""
    if shutil.which("nm") is None:
        pytest.skip("no nm")

    def symbols(library: Path, *options: str) -> set[str]:
        printed = run("nm", "-D", "--format=posix", *options, library, cwd=ROOT)
        return {line.split()[0].split("@")[0] for line in printed.splitlines()}

    wanted = {s for s in symbols(cuda_library, "--undefined-only") if "torch" in s or "c10" in s}
    libraries = Path(torch.__file__).parent / "lib"
    found = set[str]().union(
        *(
            symbols(libraries / f"{name}.so", "--defined-only")
            for name in ("libtorch", "libtorch_cpu")
        )
    )
    assert wanted - found <= {"aoti_torch_get_current_cuda_stream"}
    assert "aoti_torch_library_init_impl" in wanted


def test_cuda_library_is_left_alone_by_a_cpu_only_torch(
    cuda_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert native.load_cuda.__wrapped__() == frozenset()


def test_cuda_library_that_is_missing_leaves_cuda_to_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert native.load_cuda.__wrapped__() == frozenset()


@pytest.mark.skipif(torch.version.cuda is not None, reason="loads under a torch with CUDA")
def test_cuda_library_that_does_not_load_is_loud(
    cuda_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ImportError, match="_C_cuda does not load under torch .*cuda_stream"):
        native.load_cuda.__wrapped__()


def test_wheel_works_away_from_the_repository(tmp_path: Path) -> None:
    """Built, installed into another environment that sees this one's torch, run from elsewhere."""
    wheels = tmp_path / "wheels"
    pip = (sys.executable, "-m", "pip")
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", wheels, ROOT, cwd=tmp_path)
    (wheel,) = wheels.glob("flashinfer_ops-*-py3-none-*.whl")
    run(sys.executable, "-m", "venv", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path)
    # Only the path: the hooks of this environment, its editable install among them, stay out.
    (Path(site.strip()) / "torch.pth").write_text(sysconfig.get_path("purelib"))
    run(python, "-m", "pip", "install", "--no-deps", wheel, cwd=tmp_path)
    where = run(python, "-c", "import flashinfer_ops; print(flashinfer_ops.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(tmp_path)
    printed = run(python, "-m", "flashinfer_ops", cwd=tmp_path)
    assert printed.count(": passed") >= 3
