"""The benchmark of cascade attention: its limits, its shares, and that it checks outputs."""

from __future__ import annotations

import importlib
import itertools
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

testing = pytest.importorskip("click.testing")
for package in ("matplotlib", "numpy", "rich"):
    pytest.importorskip(package)

ROOT = Path(__file__).parent.parent

FLAT = {
    "set": "pairs",
    "name": "two_requests",
    "levels": [{"nodes": 1, "tokens": 32}, {"nodes": 2, "tokens": 16}],
    "qo_len": 1,
    "num_qo_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
    "page_size": 16,
    "dtype": "float16",
    "causal": False,
    "limit_us": 34.82,
    "us": {"flashinfer": 90.0, "flat": 70.0},
}
CAUSAL = FLAT | {
    "set": "drafts",
    "name": "two_drafts",
    "levels": [{"nodes": 1, "tokens": 16}, {"nodes": 2, "tokens": 7}],
    "qo_len": 3,
    "page_size": 4,
    "dtype": "float32",
    "causal": True,
    "limit_us": 46.61,
    "us": {"flashinfer": 1e9},
}
# K and V of 2 heads of 64, then q and out of 4; packed rows by the tokens that they see.
FLAT_BYTES = 2 * 2 * 64 * 64 * 2 + 2 * 2 * 4 * 64 * 2
FLAT_FLOPS = 4 * 64 * 4 * 2 * 48
CAUSAL_BYTES = 2 * 2 * 64 * 30 * 4 + 2 * 6 * 4 * 64 * 4
CAUSAL_FLOPS = 4 * 64 * 4 * 2 * (3 * 16 + 5 + 6 + 7)


@pytest.fixture
def cascade(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("cascade")


@pytest.fixture
def workloads(cascade: ModuleType) -> ModuleType:
    return importlib.import_module("workloads")


@pytest.fixture
def anchors(tmp_path: Path) -> Path:
    return write_anchors(tmp_path, FLAT, CAUSAL)


def write_anchors(folder: Path, *cases: dict[str, Any]) -> Path:
    path = folder / "anchors.json"
    rates = {"hbm_bytes_per_s": 1e9, "flops_per_s": 2.9e9}
    path.write_text(json.dumps(rates | {"attention": cases}))
    return path


def run(cascade: ModuleType, *arguments: object, device: str = "cpu") -> Any:
    arguments = ("--device", device, *arguments)
    return testing.CliRunner().invoke(cascade.main, list(map(str, arguments)))


def test_limits(workloads: ModuleType, anchors: Path) -> None:
    rates, (flat, causal) = workloads.read_anchors(anchors)
    assert (flat.bytes, flat.flops) == (FLAT_BYTES, FLAT_FLOPS) == (34816, 98304)
    assert (causal.bytes, causal.flops) == (CAUSAL_BYTES, CAUSAL_FLOPS) == (43008, 135168)
    assert flat.limit_us(rates) == pytest.approx(34.816)  # bound by memory
    assert causal.limit_us(rates) == pytest.approx(135168 / 2.9e3)  # bound by arithmetic


def test_a_limit_that_the_forest_does_not_have(workloads: ModuleType, tmp_path: Path) -> None:
    path = write_anchors(tmp_path, FLAT | {"limit_us": 36.0})
    with pytest.raises(ValueError, match="two_requests: the limit is 34.816 us, 36.0 in"):
        workloads.read_anchors(path)


def test_ragged_forests_are_forests(workloads: ModuleType) -> None:
    for forest in workloads.ragged_forests():
        requests = len(forest.qo_lens)
        borders = [set(level.requests.cumsum()) for level in forest.levels]
        assert all(level.requests.sum() == requests for level in forest.levels)
        assert all(len(level.tokens) == len(level.requests) for level in forest.levels)
        assert all(outer <= inner for outer, inner in itertools.pairwise(borders))
        assert borders[-1] == set(range(1, requests + 1))
        assert forest.limit_us(workloads.Rates()) > 0


def test_page_tables_hold_each_page_once(workloads: ModuleType, anchors: Path) -> None:
    for forest in workloads.read_anchors(anchors)[1]:
        data = workloads.build(forest, workloads.Pool(torch.device("cpu")), max_copies=2)
        pages = torch.cat(data.kv_indices)
        assert pages.sort().values.tolist() == list(range(forest.num_pages))
        assert data.caches.shape == (2, *forest.cache_shape)
    assert [last.tolist() for last in data.kv_last_page_len] == [[4], [3, 3]]


def test_run(cascade: ModuleType, anchors: Path, tmp_path: Path, device: str) -> None:
    json_path, plot_path = tmp_path / "times.json", tmp_path / "times.png"
    arguments = ("--anchors", anchors, "--json", json_path, "--plot", plot_path)
    result = run(cascade, *arguments, device=device)
    assert result.exit_code == 0, result.output
    assert plot_path.read_bytes().startswith(b"\x89PNG")
    content = json.loads(json_path.read_text())
    assert content["torch"] == torch.__version__
    assert content["rates"] == {"bytes_per_s": 1e9, "flops_per_s": 2.9e9}
    flat, causal = content["cases"]
    for case, limit in ((flat, 34.816), (causal, 135168 / 2.9e3)):
        assert case["status"] == "ok"
        assert case["name"] in result.output
        assert case["us"] > 0
        assert case["limit_us"] == pytest.approx(limit)
        assert case["share"] == pytest.approx(limit / case["us"])
        assert min(case["plan_us"], case["plan_host_us"], case["eager_host_us"]) > 0
    assert flat["times_best"] == pytest.approx(70 / flat["us"])
    assert flat["times_flashinfer"] == pytest.approx(90 / flat["us"])
    summary = content["summary"]
    assert list(summary) == ["pairs", "drafts", "all"]
    shares = flat["share"] * causal["share"]
    assert summary["all"]["share"] == pytest.approx(shares**0.5)
    assert summary["pairs"]["best_peer"] == pytest.approx(34.816 / 70)
    assert summary["drafts"]["slower_than_flashinfer"] == 0


def test_a_wrong_output_voids_its_row(
    cascade: ModuleType, anchors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = cascade.public(*inputs)
        out[-1] *= 1.01
        return out, lse

    monkeypatch.setitem(cascade.ENGINES, "default", wrong)
    json_path = tmp_path / "times.json"
    result = run(cascade, "--anchors", anchors, "--set", "pairs", "--brief", "--json", json_path)
    assert result.exit_code == 1
    assert "two_requests WRONG error" in result.output
    content = json.loads(json_path.read_text())
    assert content["cases"][0]["status"] == "WRONG"
    assert content["cases"][0]["share"] is None
    assert content["summary"]["all"]["void"] == 1
    assert content["summary"]["all"]["share"] is None


@pytest.mark.parametrize("broken", ["lse", "unwritten"])
def test_what_is_checked(
    workloads: ModuleType, cascade: ModuleType, anchors: Path, broken: str
) -> None:
    forest = workloads.read_anchors(anchors)[1][1]
    data = workloads.build(forest, workloads.Pool(torch.device("cpu")), max_copies=1)
    plan = cascade.make_plan(forest, data.arrays)
    out, lse = cascade.public(data.q, data.caches[0], plan)
    assert workloads.check(forest, data, 0, out, lse).within(1e-5)
    if broken == "lse":
        lse[0, 0] += 0.1
    else:
        out[3, 1] = torch.nan
    assert not workloads.check(forest, data, 0, out, lse).within(1e-3)


def test_brief_and_selection(cascade: ModuleType, anchors: Path) -> None:
    result = run(cascade, "--anchors", anchors, "--select", "drafts$", "--brief")
    assert result.exit_code == 0, result.output
    name, us, share, ratio = result.output.splitlines()[0].split()
    assert name == "two_drafts"
    # The line is rounded: the share to 0.001, the time to 0.01.
    assert float(share) == pytest.approx(135168 / 2.9e3 / float(us), abs=6e-4, rel=1e-3)
    assert float(ratio) > 1
    assert run(cascade, "--anchors", anchors, "--select", "nothing").exit_code == 2
    assert run(cascade, "--anchors", anchors, "--profile", "two_drafts").exit_code == 0
