"""Cascade attention on a GPU against the limit of the machine and against other implementations.

    python benchmarks/cascade.py --anchors anchors.json --ragged --json times.json --plot times.png
    python benchmarks/cascade.py --anchors anchors.json --set gqa --select B8_ --brief
    python benchmarks/cascade.py --ragged --device cpu --select heads      # without graphs

An anchors file holds forests of shared KV and the times that other implementations took. A case's
time is that of one layer: a CUDA graph goes through KV caches that are together larger than the L2
cache, an ordinary small kernel writes q before each call, and the time of those kernels alone is
subtracted. Every output is checked against dense attention in plain PyTorch; a case with a wrong
one counts for nothing. The limit is explained in `workloads.py`; share = limit / time.

Columns: plan GPU and plan host are the planner's times for index arrays filled in place; copying
is the host's where they are copied in; eager is the time that a call outside of a graph keeps the
host. A ratio of peer to ours above 1 is a win.
"""

from __future__ import annotations

import datetime
import importlib.util
import math
import platform
import re
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import torch
from report import Result, brief, case_table, plot, summarise, summary_table, write_json
from rich.console import Console
from timing import device_seconds, host_seconds
from torch import Tensor
from workloads import (
    TOLERANCES,
    Data,
    Forest,
    Pool,
    Rates,
    build,
    check,
    ragged_forests,
    read_anchors,
)

import flashinfer_ops
from flashinfer_ops import CascadePlan

MIN_CALLS = 8  # in a graph
PLANS = 8
CPU_COPIES = 2
WORKSPACE_BYTES = 256 << 20

Attend = Callable[[Tensor, Tensor], Any]


def public(q: Tensor, cache: Tensor, plan: CascadePlan) -> tuple[Tensor, Tensor]:
    return flashinfer_ops.cascade_attention(q, cache, plan)


def portable(q: Tensor, cache: Tensor, plan: CascadePlan) -> tuple[Tensor, Tensor]:
    from flashinfer_ops import triton_kernels

    arrays = (plan.qo_indptr, plan.kv_indptr, plan.kv_indices, plan.kv_last_page_len)
    attend = triton_kernels.OPERATORS["cascade_attention"]
    scales = (plan.sm_scale, 1.0)
    return attend(q, cache[:, 0], cache[:, 1], *arrays, plan.schedule, plan.causal, *scales)


ENGINES = {"default": public, "triton": portable}


def make_plan(forest: Forest, arrays: Sequence[list[Tensor]], **kwargs: Any) -> CascadePlan:
    return flashinfer_ops.plan_cascade(
        *arrays,
        num_qo_heads=forest.num_qo_heads,
        num_kv_heads=forest.num_kv_heads,
        head_dim=forest.head_dim,
        page_size=forest.page_size,
        causal=forest.causal,
        **kwargs,
    )


def layer_us(attend: Attend, data: Data) -> tuple[float, Any, int]:
    """The time of one layer, what the last layer gave in a run of its own, and that one's cache."""
    copies = len(data.caches)
    layers = max(MIN_CALLS, copies) if data.q.is_cuda else copies
    q = torch.empty_like(data.q)
    state: Any = None

    def small_kernel() -> None:
        torch.mul(data.q, 1, out=q)  # copy_ would be a copy by the driver, not a kernel

    def run() -> None:
        nonlocal state
        for layer in range(layers):
            small_kernel()
            state = attend(q, data.caches[layer % copies])

    def small_kernels() -> None:
        for _ in range(layers):
            small_kernel()

    before, _ = device_seconds(small_kernels, data.q.device)
    seconds, again = device_seconds(run, data.q.device)
    after, _ = device_seconds(small_kernels, data.q.device)
    subtracted = min(before, after)  # one that something held up would make the layers look faster
    for tensor in state if isinstance(state, tuple) else (state,):
        tensor.fill_(math.nan)  # what the next run does not write shows
    again()
    if seconds <= subtracted:
        raise ValueError("the layers took no longer than the small kernels between them")
    return 1e6 * (seconds - subtracted) / layers, state, (layers - 1) % copies


def measure_attention(forest: Forest, data: Data, engine: str, result: Result) -> None:
    plan = make_plan(forest, data.arrays)
    attend = ENGINES[engine]
    result.us, (out, lse), copy = layer_us(lambda q, cache: attend(q, cache, plan), data)
    errors = check(forest, data, copy, out, lse)
    result.error, result.lse_error = errors.out, errors.lse
    if not errors.within(TOLERANCES[forest.dtype]):
        result.status = "WRONG"
        result.detail = f"error {errors.out:.2e}, lse {errors.lse:.2e}"
    cache = data.caches[0]
    eager = host_seconds(lambda: attend(data.q, cache, plan), data.q.device)
    result.eager_host_us = 1e6 * eager


def measure_plan(forest: Forest, data: Data, result: Result) -> None:
    device = data.q.device
    plan = make_plan(forest, data.arrays)
    own = (plan.qo_indptr, plan.kv_indptr, plan.kv_indices, plan.kv_last_page_len)

    def plans() -> None:
        for _ in range(PLANS):
            make_plan(forest, own, out=plan)

    result.plan_us = 1e6 * device_seconds(plans, device)[0] / PLANS
    result.plan_host_us = 1e6 * host_seconds(lambda: make_plan(forest, own, out=plan), device)
    result.plan_copying_host_us = 1e6 * host_seconds(
        lambda: make_plan(forest, data.arrays, out=plan), device
    )


def measure_flashinfer(forest: Forest, data: Data, result: Result) -> None:
    import flashinfer

    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=data.q.device)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(len(forest.levels), workspace, "NHD")
    heads = (forest.num_qo_heads, forest.num_kv_heads, forest.head_dim, forest.page_size)
    options = {"causal": forest.causal, "q_data_type": forest.torch_dtype}

    def plan() -> None:
        wrapper.plan(*data.arrays, *heads, **options)

    plan()
    result.flashinfer_here_us = layer_us(wrapper.run, data)[0]
    # Its planner waits for the device: one that is not asleep.
    host = host_seconds(plan, torch.device("cpu"))
    result.flashinfer_here_plan_host_us = 1e6 * host


def profile(forest: Forest, data: Data, engine: str) -> None:
    """Three calls and nothing else, for a profiler that starts where it is told to."""
    plan = make_plan(forest, data.arrays)
    if data.q.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    for call in range(3):
        ENGINES[engine](data.q, data.caches[call % len(data.caches)], plan)
    if data.q.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def setting(device: torch.device, engine: str) -> dict[str, str]:
    def found(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "none"

    name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu ({platform.machine()})"
    versions = {package: found(package) for package in ("triton", "flashinfer-python")}
    date = datetime.date.today().isoformat()
    return {"device": name, "torch": torch.__version__, **versions, "date": date, "engine": engine}


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:160]


@click.command(context_settings={"show_default": True})
@click.option("--anchors", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--select", default="", help="Cases whose name has a match of this expression.")
@click.option("--set", "sets", multiple=True, help="Cases of this set; may be repeated.")
@click.option("--ragged", is_flag=True, help="The built-in ragged forests too.")
@click.option("--engine", type=click.Choice(list(ENGINES)), default="default")
@click.option("--peers", is_flag=True, help="Time FlashInfer in the same run, where installed.")
@click.option("--device", type=click.Choice(("cuda", "cpu")), default="cuda")
@click.option("--profile", "profiled", help="Run the case of this name three times, untimed.")
@click.option(
    "--brief", "is_brief", is_flag=True, help="A short line a case: name, us, share, best/ours."
)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path))
@torch.inference_mode()
def main(
    anchors: Path | None,
    select: str,
    sets: tuple[str, ...],
    ragged: bool,
    engine: str,
    peers: bool,
    device: str,
    profiled: str | None,
    is_brief: bool,
    json_path: Path | None,
    plot_path: Path | None,
) -> None:
    """Cascade attention against the machine's limit and other implementations."""
    torch.manual_seed(0)
    console = Console()
    if not console.is_terminal:
        console = Console(width=220, no_color=True)
    rates, forests = Rates(), []
    if anchors is not None:
        rates, forests = read_anchors(anchors)
    forests += ragged_forests() if ragged else []
    chosen = [
        forest
        for forest in forests
        if re.search(select, forest.name)
        and (not sets or forest.set in sets)
        and profiled in (None, forest.name)
    ]
    if not chosen:
        raise click.UsageError("no case is selected; see --anchors, --ragged, --set and --select")

    pool = Pool(torch.device(device))
    copies = {"max_copies": CPU_COPIES} if device == "cpu" else {}
    if profiled is not None:
        profile(chosen[0], build(chosen[0], pool, **copies), engine)
        return
    about = setting(pool.device, engine)
    others = {"plan": measure_plan}
    if peers and importlib.util.find_spec("flashinfer") is None:
        console.print("FlashInfer is not installed: its times are the anchors'.")
    elif peers:
        others["flashinfer"] = measure_flashinfer
    results: list[Result] = []
    for forest in chosen:
        result = Result(forest.set, forest.name, forest.limit_us(rates), forest.peers_us)
        results.append(result)
        try:
            data = build(forest, pool, **copies)
            measure_attention(forest, data, engine, result)
        except Exception as error:  # the other cases are still worth their time
            result.status = "FAILED"
            result.detail = first_line(error)
        else:
            for name, measure in others.items():
                try:
                    measure(forest, data, result)
                except Exception as error:
                    result.detail += f" {name}: {first_line(error)}"
        if is_brief:
            click.echo(brief(result))
        if json_path is not None:
            write_json(json_path, about, rates, results)  # what a run that is cut off leaves

    title = ", ".join(f"{name} {value}" for name, value in about.items())
    if not is_brief:
        console.print(case_table(results, title))
    console.print(summary_table(summarise(results)))
    if plot_path is not None:
        plot(summarise(results), about["device"], plot_path)
    if not all(result.counts for result in results):
        raise click.exceptions.Exit(1)


if __name__ == "__main__":
    main()
