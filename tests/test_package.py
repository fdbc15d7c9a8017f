"""The package: version, loading of the libraries, `python -m flashinfer_ops`, a wheel elsewhere."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
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
    assert f"flashinfer_ops {flashinfer_ops.__version__}, torch {torch.__version__}" in printed
    for operator in flashinfer_ops.reference.OPERATORS:
        line = next(line for line in printed.splitlines() if line.split()[:1] == [operator])
        assert f"C++ from _C ({native.cpu_capability()}" in line
    assert printed.count("self-check") == printed.count(": passed") >= 3


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
