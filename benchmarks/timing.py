"""Timing for `benchmarks/cascade.py`: the device's time from graph replays, and the host's time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

CYCLES_PER_S = 2e9  # at least the clock of the GPU: a sleep lasts as long as asked for, or longer
SECONDS_A_TIMING = 0.3
MAX_REPLAYS = 40
MIN_REPLAYS = 5
SHORTEST_SLEEP, LONGEST_SLEEP = 2e-4, 5e-3  # that hides a launch; it may wait for the sleep to end
HOST_CALLS = 8  # few enough to fit into the launch queue while the device sleeps
HOST_ROUNDS = 5
HOST_SLEEP = 6e-3

Call = Callable[[], object]


def sleep(seconds: float) -> None:
    torch.cuda._sleep(int(seconds * CYCLES_PER_S))


def capture(run: Call) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `run`, which must have run before: nothing is compiled while it captures."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def device_seconds(run: Call, device: torch.device) -> tuple[float, Call]:
    """The median time of `run` without its launches, and what runs it once more.

    On a GPU `run` is captured, and every replay is launched while the device still sleeps.
    On the CPU it is called.
    """
    if device.type == "cpu":
        run()
        return _median(lambda: _clocked(run)), run
    run()
    graph = capture(run)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    hidden = 1e-3

    def replay() -> float:
        nonlocal hidden
        sleep(hidden)
        start.record()
        launch = _clocked(graph.replay)
        end.record()
        end.synchronize()
        hidden = min(max(SHORTEST_SLEEP, 2 * launch), LONGEST_SLEEP)
        return start.elapsed_time(end) / 1e3

    for _ in range(3):  # uploads the graph, and finds how long its launch takes
        if replay() > SECONDS_A_TIMING:
            break
    return _median(replay), graph.replay


def host_seconds(call: Call, device: torch.device) -> float:
    """The median time that one call keeps the host, with the device too busy to be waited for."""

    def batch() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
            sleep(HOST_SLEEP)
        start = time.perf_counter()
        for _ in range(HOST_CALLS):
            call()
        return (time.perf_counter() - start) / HOST_CALLS

    batch()
    seconds = statistics.median(batch() for _ in range(HOST_ROUNDS))
    if device.type == "cuda":
        torch.cuda.synchronize()
    return seconds


def _clocked(run: Call) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _median(timing: Callable[[], float]) -> float:
    """Of as many as `SECONDS_A_TIMING` has room for, within bounds."""
    seconds = [timing()]
    rounds = max(MIN_REPLAYS, min(MAX_REPLAYS, int(SECONDS_A_TIMING / max(seconds[0], 1e-9))))
    seconds.extend(timing() for _ in range(rounds - 1))
    return statistics.median(seconds)
