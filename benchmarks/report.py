"""What `benchmarks/cascade.py` prints, writes and draws of its results."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table
from workloads import Rates

SLOWER = 1.03  # than this many times a peer's time is slower


@dataclass
class Result:
    set: str
    name: str
    limit_us: float
    peers_us: dict[str, float]
    status: str = "ok"  # or WRONG, or FAILED
    detail: str = ""
    us: float = math.nan
    error: float = math.nan
    lse_error: float = math.nan
    plan_us: float = math.nan
    plan_host_us: float = math.nan
    plan_copying_host_us: float = math.nan
    eager_host_us: float = math.nan
    flashinfer_here_us: float | None = None
    flashinfer_here_plan_host_us: float | None = None

    @property
    def counts(self) -> bool:
        return self.status == "ok"

    @property
    def share(self) -> float:
        return self.limit_us / self.us

    @property
    def best_peer(self) -> tuple[str, float] | None:
        peers = dict(self.peers_us)
        if self.flashinfer_us is not None:
            peers["flashinfer"] = self.flashinfer_us
        return min(peers.items(), key=lambda peer: peer[1]) if peers else None

    @property
    def flashinfer_us(self) -> float | None:
        """As timed in this run, else as the anchors have it."""
        return self.flashinfer_here_us or self.peers_us.get("flashinfer")

    @property
    def times_best(self) -> float | None:
        return None if self.best_peer is None else self.best_peer[1] / self.us

    @property
    def times_flashinfer(self) -> float | None:
        return None if self.flashinfer_us is None else self.flashinfer_us / self.us


@dataclass
class Summary:
    """Of the right cases of one set; shares are geometric means."""

    cases: int
    void: int
    share: float | None
    best_peer: float | None
    flashinfer: float | None
    slower_than_best: int
    slower_than_flashinfer: int


def summarise(results: list[Result]) -> dict[str, Summary]:
    summaries = {}
    for name in (*dict.fromkeys(result.set for result in results), "all"):
        chosen = [result for result in results if name in (result.set, "all")]
        right = [result for result in chosen if result.counts]
        best = [result for result in right if result.best_peer is not None]
        against = [result for result in right if result.flashinfer_us is not None]
        summaries[name] = Summary(
            len(chosen),
            len(chosen) - len(right),
            geometric_mean([result.share for result in right]),
            geometric_mean([result.limit_us / result.best_peer[1] for result in best]),
            geometric_mean([result.limit_us / result.flashinfer_us for result in against]),
            sum(result.times_best < 1 / SLOWER for result in best),
            sum(result.times_flashinfer < 1 for result in against),
        )
    return summaries


def geometric_mean(values: list[float]) -> float | None:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None or math.isnan(value) else f"{value:{form}}"


def make_table(title: str, names: Sequence[str], words: int) -> Table:
    table = Table(title=title, box=None, title_justify="left", padding=(0, 2, 0, 0))
    for place, name in enumerate(names):
        table.add_column(name, justify="left" if place < words else "right", no_wrap=True)
    return table


def case_table(results: list[Result], title: str) -> Table:
    names = ("set", "name", "time us", "limit us", "share", "best peer", "its us", "best/ours")
    names += ("FlashInfer/ours", "plan GPU us", "plan host us", "copying", "eager us", "error", "")
    table = make_table(title, names, 2)
    for result in results:
        peer, peer_us = result.best_peer or ("-", None)
        right = result.counts
        table.add_row(
            result.set,
            result.name,
            number(result.us) if right else result.status,
            number(result.limit_us),
            number(result.share if right else None, ".3f"),
            peer,
            number(peer_us),
            number(result.times_best if right else None),
            number(result.times_flashinfer if right else None),
            number(result.plan_us),
            number(result.plan_host_us, ".1f"),
            number(result.plan_copying_host_us, ".1f"),
            number(result.eager_host_us, ".1f"),
            number(result.error, ".1e"),
            result.detail,
        )
    return table


def summary_table(summaries: dict[str, Summary]) -> Table:
    names = ("set", "cases", "void", "share", "best peer's", "FlashInfer's")
    names += (">3% slower than best", "slower than FlashInfer")
    table = make_table("Geometric-mean shares of the limit", names, 1)
    for name, summary in summaries.items():
        shares = (summary.share, summary.best_peer, summary.flashinfer)
        slower = (summary.slower_than_best, summary.slower_than_flashinfer)
        cells = [str(summary.cases), str(summary.void)]
        cells += [number(share, ".3f") for share in shares]
        table.add_row(name, *cells, *map(str, slower))
    return table


def brief(result: Result) -> str:
    cells = [number(result.us), number(result.share, ".3f"), number(result.times_best)]
    if not result.counts:
        cells = [result.status]
    return " ".join((result.name, *cells, result.detail)).rstrip()


def plot(summaries: dict[str, Summary], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = {"flashinfer_ops": "share", "best peer": "best_peer", "FlashInfer": "flashinfer"}
    figure, axes = pyplot.subplots(figsize=(9, 4.5))
    for place, (label, attribute) in enumerate(bars.items()):
        heights = [getattr(summary, attribute) or 0.0 for summary in summaries.values()]
        at = [index + 0.27 * (place - 1) for index in range(len(heights))]
        axes.bar_label(axes.bar(at, heights, 0.25, label=label), fmt="%.2f", fontsize=8)
    axes.set_xticks(range(len(summaries)), list(summaries))
    axes.set(ylim=(0, 1), ylabel="share of the machine's limit", title=title)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def write_json(path: Path, about: dict[str, str], rates: Rates, results: list[Result]) -> None:
    computed = ("share", "times_best", "times_flashinfer")
    cases = [
        {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in (
                *asdict(result).items(),
                *((name, getattr(result, name) if result.counts else None) for name in computed),
            )
        }
        for result in results
    ]
    summary = {name: asdict(of_set) for name, of_set in summarise(results).items()}
    content = {**about, "rates": asdict(rates), "summary": summary, "cases": cases}
    path.write_text(json.dumps(content, indent=1) + "\n")
