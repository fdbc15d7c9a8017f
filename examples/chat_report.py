"""Tables, plot and token check of the demo."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor

MB = 1e6


class Run(NamedTuple):
    """One way of answering all questions, and what it took."""

    prefill_seconds: float
    decode_seconds: float
    kv_bytes: int  # memory of the KV cache
    kv_bytes_read: int  # KV read in the last decode step


class SweepPoint(NamedTuple):
    """Seconds a decode step and bytes of KV memory at one number of requests."""

    requests: int
    shared_seconds: float
    copied_seconds: float
    transformers_seconds: float | None
    shared_bytes: int
    copied_bytes: int


def compare_runs(ours: Run, theirs: Run | None, requests: int, new_tokens: int) -> str:
    """The two runs side by side, as a markdown table."""
    steps = new_tokens - 1
    rows = [
        ["prefill, s", lambda run: f"{run.prefill_seconds:.2f}"],
        ["decode step, ms", lambda run: f"{run.decode_seconds / steps * 1e3:.1f}"],
        ["decode, tokens/s", lambda run: f"{requests * steps / run.decode_seconds:.0f}"],
        ["all, s", lambda run: f"{run.prefill_seconds + run.decode_seconds:.2f}"],
        ["KV memory, MB", lambda run: f"{run.kv_bytes / MB:.1f}"],
        ["KV read in a step, MB", lambda run: f"{run.kv_bytes_read / MB:.1f}"],
    ]
    headers = [f"{requests} requests, {new_tokens} tokens each", "shared prefix (flashinfer_ops)"]
    table = [[name, cell(ours)] for name, cell in rows]
    if theirs is not None:
        headers += ["transformers `generate` (sdpa)", "ratio"]
        for row, (name, cell) in zip(table, rows, strict=True):
            a, b = float(row[1]), float(cell(theirs))
            row += [cell(theirs), f"{(a / b if 'tokens/s' in name else b / a):.1f}x"]
    return tabulate(table, headers, tablefmt="github", disable_numparse=True)


def sweep_table(points: list[SweepPoint]) -> str:
    """Step time and KV memory against the number of requests, as a markdown table."""
    headers = [
        "requests",
        "step, prefix shared, ms",
        "step, prefix copied, ms",
        "step, transformers sdpa, ms",
        "KV, prefix shared, MB",
        "KV, prefix copied, MB",
    ]
    table = [
        [
            str(p.requests),
            f"{p.shared_seconds * 1e3:.1f}",
            f"{p.copied_seconds * 1e3:.1f}",
            "" if p.transformers_seconds is None else f"{p.transformers_seconds * 1e3:.1f}",
            f"{p.shared_bytes / MB:.1f}",
            f"{p.copied_bytes / MB:.1f}",
        ]
        for p in points
    ]
    return tabulate(table, headers, tablefmt="github", disable_numparse=True)


def plot_sweep(points: list[SweepPoint], title: str, path: Path) -> None:
    """Draw step time (left) and KV memory (right) against the number of requests."""
    requests = [p.requests for p in points]
    figure = Figure(figsize=(10, 4.2), layout="tight")
    time_axes, memory_axes = figure.subplots(1, 2)
    shared, copied, other = "#1b6ca8", "#d1495b", "#8d99ae"
    time_axes.plot(
        requests, [p.copied_seconds * 1e3 for p in points], "o-", c=copied, label="prefix copied"
    )
    if all(p.transformers_seconds is not None for p in points):
        times = [p.transformers_seconds * 1e3 for p in points]
        time_axes.plot(requests, times, "s--", c=other, label="transformers, sdpa")
    time_axes.plot(
        requests, [p.shared_seconds * 1e3 for p in points], "o-", c=shared, label="prefix shared"
    )
    time_axes.set_ylabel("time per decode step (ms)")
    memory_axes.plot(
        requests, [p.copied_bytes / MB for p in points], "o-", c=copied, label="prefix copied"
    )
    memory_axes.plot(
        requests, [p.shared_bytes / MB for p in points], "o-", c=shared, label="prefix shared"
    )
    memory_axes.set_ylabel("KV memory (MB)")
    for axes in (time_axes, memory_axes):
        axes.set_xscale("log", base=2)
        axes.set_xticks(requests, [str(n) for n in requests])
        axes.set_xlabel("requests")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)


class Check(NamedTuple):
    """How our greedy tokens compare with the reference's."""

    same: int
    total: int
    notes: list[str]  # one for each request that differs
    passed: bool  # no difference but at ties

    def __str__(self) -> str:
        if self.same == self.total:
            return f"CHECK: all {self.total} greedy tokens are the same as transformers'."
        verdict = "only at ties" if self.passed else "FAILED"
        head = f"CHECK {verdict}: {self.same} of {self.total} greedy tokens are the same."
        return "\n".join([head, *self.notes])


def check_tokens(ours: Tensor, theirs: Tensor, logits: Tensor, tie: float) -> Check:
    """Compare answers, [requests, tokens]; the logits are [requests, tokens, vocabulary], theirs.

    Where an answer first differs, the margin is how much higher the reference's logit of its own
    token is than that of ours. Up to `tie` it is rounding, which the order of a sum decides. What
    follows in that answer is not counted either way.
    """
    notes, passed = [], True
    for request, (a, b) in enumerate(zip(ours.tolist(), theirs.tolist(), strict=True)):
        if a == b:
            continue
        step = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
        margin = (logits[request, step, b[step]] - logits[request, step, a[step]]).item()
        passed &= margin <= tie
        notes.append(
            f"  request {request}, token {step}: {a[step]} against {b[step]}, "
            f"logit margin {margin:.2e} ({'a tie' if margin <= tie else 'an error'})"
        )
    return Check(int((ours == theirs).sum()), ours.numel(), notes, passed)
