"""Merging states on a GPU: time, rate, host time, against a plain copy of as many bytes.

One row for each entry of the `merge` list of an anchors file, which holds what FlashInfer took on
such a GPU. Times are medians of replays of a CUDA graph whose calls go through several sets of
random inputs (over 220 MB together, or as many sets as a graph has calls), launched while the
device still sleeps. GB/s counts every input read once and every output written once; the copy
moves as many bytes, half of them read and half written, in the same run. Host time is that of an
eager call, its launch included. Every case's output is compared with the reference in float64; a
case that is wrong has no times.

    python benchmarks/merge.py --anchors anchors/h100.json
    python benchmarks/merge.py --anchors anchors/h100.json --engine triton --json merge.json
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from timing import device_seconds, host_seconds
from torch import Tensor

import flashinfer_ops  # noqa: F401 (registers the operators)
from flashinfer_ops import reference

ROTATED_BYTES = 220e6  # of the sets of inputs and outputs, together: more than an L2 cache holds
MIN_CALLS, MAX_CALLS = 8, 64  # in a graph
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
LSE_TOLERANCE = 1e-4
CHECKED_TOKENS = 256  # of a case: from its start and as many from its end

Operator = Callable[..., tuple[Tensor, Tensor]]


@dataclass
class Case:
    kind: str
    n: int
    k: int  # states a token
    h: int
    d: int
    dtype: str

    @classmethod
    def of(cls, anchor: dict[str, Any]) -> Case:
        sizes = (anchor["n"], anchor.get("k", 2), anchor["h"], anchor["d"])
        return cls(anchor["kind"], *sizes, anchor.get("dtype", "float16"))

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def bytes(self) -> int:
        """k states read and one written: the output in its dtype and a float32 lse."""
        return self.n * self.h * (self.k + 1) * (self.d * self.torch_dtype.itemsize + 4)

    @property
    def sets(self) -> int:
        return max(2, min(MAX_CALLS, int(-(-ROTATED_BYTES // self.bytes))))

    @property
    def calls(self) -> int:
        return -(-MIN_CALLS // self.sets) * self.sets

    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        """v_a, s_a, v_b, s_b; or v and s with a dimension for the states."""
        if self.kind == "merge_state":
            shape: tuple[int, ...] = (self.n, self.h)
            num = 2
        else:
            shape, num = (self.n, self.k, self.h), 1
        tensors: list[Tensor] = []
        for _ in range(num):
            tensors.append(torch.randn(*shape, self.d, dtype=self.torch_dtype, device=device))
            tensors.append(torch.randn(*shape, device=device) * 4)
        return tuple(tensors)


def operator(kind: str, engine: str) -> Operator:
    if engine == "triton":
        from flashinfer_ops import triton_kernels

        function: Operator = triton_kernels.OPERATORS[kind]
    else:
        function = getattr(torch.ops.flashinfer_ops, kind).default
    return function


def is_right(run: Operator, inputs: tuple[Tensor, ...], dtype: torch.dtype, kind: str) -> bool:
    """Whether the output agrees with float64's, on the first and last tokens."""
    outputs = run(*inputs)
    n = inputs[0].shape[0]
    for part in (slice(0, CHECKED_TOKENS), slice(max(0, n - CHECKED_TOKENS), n)):
        v, s = (t[part].double() for t in outputs)
        v_ref, s_ref = reference.OPERATORS[kind](*(t[part].double() for t in inputs))
        error = float((v - v_ref).norm() / v_ref.norm())
        # Written so that NaN fails.
        if not (error < TOLERANCE[dtype] and float((s - s_ref).abs().max()) < LSE_TOLERANCE):
            return False
    return True


def measure(case: Case, engine: str, device: torch.device) -> dict[str, float] | None:
    """Seconds of a call, of a copy of as many bytes, and of the host; None if it is wrong."""
    run = operator(case.kind, engine)
    sets = [case.inputs(device) for _ in range(case.sets)]
    for inputs in (sets[0], sets[-1]):
        if not is_right(run, inputs, case.torch_dtype, case.kind):
            return None

    def calls() -> list[object]:
        # What a call returns is kept until the end, so that its memory is not the next one's.
        return [run(*sets[i % len(sets)]) for i in range(case.calls)]

    seconds, _ = device_seconds(calls, device)
    host = host_seconds(lambda: run(*sets[0]), device)
    sets.clear()  # the copies need the room
    half = case.bytes // 2
    sources = [
        torch.randint(256, (half,), dtype=torch.uint8, device=device) for _ in range(case.sets)
    ]
    targets = [torch.empty_like(source) for source in sources]

    def copies() -> None:
        for i in range(case.calls):
            targets[i % len(targets)].copy_(sources[i % len(sources)])

    copy, _ = device_seconds(copies, device)
    return {"seconds": seconds / case.calls, "copy": copy / case.calls, "host": host}


@click.command(context_settings={"show_default": True})
@click.option(
    "--anchors",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="JSON with a `merge` list: the cases, and what peers took.",
)
@click.option(
    "--engine",
    type=click.Choice(["default", "triton"]),
    default="default",
    help="The registered operators, or the Triton functions called directly.",
)
@click.option("--device", default="cuda", help="The CPU works too, for a trial of this program.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
@torch.inference_mode()
def main(anchors: Path, engine: str, device: str, json_path: Path | None) -> None:
    """Merging states on a GPU, against a copy and against FlashInfer's times."""
    where = torch.device(device)
    torch.manual_seed(0)
    reference_run = json.loads(anchors.read_text())
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "CPU"
    table = Table(title=f"{engine} on {name}; FlashInfer's on {reference_run['device']}")
    for column in ("case", "dtype", "us", "GB/s", "of a copy's rate", "host us",
                   "FlashInfer us", "times faster", "its host us"):  # fmt: skip
        table.add_column(column, justify="right")
    records, wrong = [], 0
    for anchor in reference_run["merge"]:
        case = Case.of(anchor)
        size = f"{case.n} x {case.k} x {case.h} x {case.d}"
        result = measure(case, engine, where)
        records.append(asdict(case) | {"engine": engine, "result": result, "anchor": anchor})
        if result is None:
            wrong += 1
            table.add_row(f"{case.kind} {size}", case.dtype, "wrong")
            continue
        seconds = result["seconds"]
        theirs, their_host = anchor.get("flashinfer_us"), anchor.get("flashinfer_host_us")
        table.add_row(
            f"{case.kind} {size}",
            case.dtype,
            f"{seconds * 1e6:.2f}",
            f"{case.bytes / seconds / 1e9:.0f}",
            f"{result['copy'] / seconds:.2f}",
            f"{result['host'] * 1e6:.1f}",
            "" if theirs is None else f"{theirs:.2f}",
            "" if theirs is None else f"{theirs / (seconds * 1e6):.2f}",
            "" if their_host is None else f"{their_host:.1f}",
        )
    Console(width=120).print(table)
    if json_path is not None:
        json_path.write_text(json.dumps(records, indent=1) + "\n")
    if wrong:
        raise click.ClickException(f"{wrong} cases are wrong")


if __name__ == "__main__":
    main()
