"""The main job on a model of random weights: one compilation, the same tokens as transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_shared_prefix_chat(tmp_path: Path) -> None:
    result = subprocess.run(
        [
            sys.executable,
            ROOT / "examples" / "shared_prefix_chat.py",
            *("--random-model", "--requests", "3", "--new-tokens", "6", "--no-plot"),
            *("--output", tmp_path / "chat"),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "CHECK: all 18 greedy tokens are the same" in result.stdout
    assert "Compilations of the decode step: 1." in result.stdout
    table = (tmp_path / "chat.md").read_text() if (tmp_path / "chat.md").exists() else ""
    assert "KV read in a step" in table
