"""Every operator has all its parts: schema, fake, kernels, reference, public face, test, docs."""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline

import flashinfer_ops
from flashinfer_ops import meta, reference

ROOT = Path(__file__).parents[1]
OPERATORS = sorted(
    name.removeprefix("flashinfer_ops::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("flashinfer_ops::")
)
PUBLIC = {
    "append_paged_kv_cache_": "append_paged_kv_cache",
    "cascade_attention": "cascade_attention",
    "cascade_attention.out": "cascade_attention",
    "cascade_plan": "plan_cascade",
    "cascade_plan.out": "plan_cascade",
    "merge_state": "merge_state",
    "merge_state.omd": "merge_state",
    "merge_state_": "merge_state_in_place",
    "merge_state_.omd": "merge_state_in_place",
    "merge_states": "merge_states",
    "merge_states.list": "merge_states",
    "merge_states.ragged": "variable_length_merge_states",
}
# What other operators' kernels call, and no public function.
INTERNAL = ["cascade_attention.portable"]
every_operator = pytest.mark.parametrize("name", OPERATORS)


def overload(name: str) -> torch._ops.OpOverload:
    packet, _, suffix = name.partition(".")
    return getattr(getattr(torch.ops.flashinfer_ops, packet), suffix or "default")


def stem(name: str) -> str:
    """The file in each folder that holds the operator."""
    schema_of = {
        path.stem: path.read_text() for path in (ROOT / "meta").glob("*.py") if path.stem[0] != "_"
    }
    [found] = [s for s, text in schema_of.items() if re.search(rf'define\(\s*f?"{name}\(', text)]
    return found


def has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"flashinfer_ops::{name}", key)


def test_schemas() -> None:
    """A change here is a change of every saved program."""
    lines = [str(overload(name)._schema).removeprefix("flashinfer_ops::") for name in OPERATORS]
    wrapped = "\n".join(textwrap.fill(line, 96, subsequent_indent="    ") for line in lines)
    assert_expected_inline(
        wrapped,
        """\
append_paged_kv_cache_(Tensor append_key, Tensor append_value, Tensor batch_indices, Tensor
    positions, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor kv_indices, Tensor kv_indptr) ->
    ()
cascade_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor[] qo_indptr, Tensor[]
    kv_indptr, Tensor[] kv_indices, Tensor[] kv_last_page_len, Tensor schedule, bool causal,
    float sm_scale, float v_scale) -> (Tensor out, Tensor lse)
cascade_attention.out(Tensor q, Tensor k_cache, Tensor v_cache, Tensor[] qo_indptr, Tensor[]
    kv_indptr, Tensor[] kv_indices, Tensor[] kv_last_page_len, Tensor schedule, bool causal,
    float sm_scale, float v_scale, Tensor(a!) out, Tensor(b!) lse) -> ()
cascade_attention.portable(Tensor q, Tensor k_cache, Tensor v_cache, Tensor[] qo_indptr,
    Tensor[] kv_indptr, Tensor[] kv_indices, Tensor[] kv_last_page_len, Tensor schedule, bool
    causal, float sm_scale, float v_scale, Tensor(a!) out, Tensor(b!) lse) -> ()
cascade_plan(Tensor[] qo_indptr, Tensor[] kv_indptr, Tensor[] kv_last_page_len, int
    num_qo_heads, int num_kv_heads, int head_dim, int page_size, bool causal) -> Tensor
cascade_plan.out(Tensor[] qo_indptr, Tensor[] kv_indptr, Tensor[] kv_last_page_len, int
    num_qo_heads, int num_kv_heads, int head_dim, int page_size, bool causal, Tensor(a!)
    schedule) -> ()
merge_state(Tensor v_a, Tensor s_a, Tensor v_b, Tensor s_b) -> (Tensor v, Tensor s)
merge_state.omd(Tensor o_a, Tensor m_a, Tensor d_a, Tensor o_b, Tensor m_b, Tensor d_b) ->
    (Tensor o, Tensor m, Tensor d)
merge_state_(Tensor(a!) v, Tensor(b!) s, Tensor v_other, Tensor s_other, Tensor? mask=None) ->
    ()
merge_state_.omd(Tensor(a!) o, Tensor(b!) m, Tensor(c!) d, Tensor o_other, Tensor m_other,
    Tensor d_other, Tensor? mask=None) -> ()
merge_states(Tensor v, Tensor s) -> (Tensor v_merged, Tensor s_merged)
merge_states.list(Tensor[] v, Tensor[] s) -> (Tensor v_merged, Tensor s_merged)
merge_states.ragged(Tensor v, Tensor s, Tensor indptr) -> (Tensor v_merged, Tensor s_merged)""",
    )


def test_nothing_is_forgotten() -> None:
    assert sorted([*PUBLIC, *INTERNAL]) == sorted(reference.OPERATORS) == OPERATORS
    assert meta.NAMESPACE == "flashinfer_ops"


@every_operator
def test_parts(name: str) -> None:
    op = overload(name)
    assert torch.Tag.pt2_compliant_tag in op.tags and torch.Tag.needs_exact_strides in op.tags
    assert (
        torch._library.simple_registry.singleton.find(f"flashinfer_ops::{name}").fake_impl.kernel
        is not None
    ), "no fake"
    assert has_kernel(name, "CPU") and has_kernel(name, "CompositeExplicitAutograd")
    assert not has_kernel(name, "CompositeImplicitAutograd")
    mutates = any(a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments)
    assert mutates == op._schema.is_mutable
    if mutates:
        assert not op._schema.returns
    for argument in op._schema.arguments:
        assert "str" not in str(argument.type), "a string in a schema recompiles"


@pytest.mark.gpu
@every_operator
def test_cuda_has_a_kernel(cuda: str, name: str) -> None:
    """Never the reference, which waits for the host, and never two owners."""
    assert has_kernel(name, "CUDA")


@every_operator
def test_reference_has_the_schema_s_arguments(name: str) -> None:
    parameters = inspect.signature(reference.OPERATORS[name]).parameters
    assert list(parameters) == [a.name for a in overload(name)._schema.arguments]


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_function(name: str) -> None:
    public = PUBLIC[name]
    assert public in flashinfer_ops.__all__
    doc = inspect.getdoc(getattr(flashinfer_ops, public)) or ""
    for section in ("Args:", "Returns:", "Raises:", "Example:"):
        mutates_only = not overload(name)._schema.returns and section == "Returns:"
        assert section in doc or mutates_only, f"{public} documents no {section}"
    call = rf"_ops\.{re.escape(name if '.' in name else name + '.default')}\("
    source = (ROOT / "flashinfer_ops" / f"{stem(name)}.py").read_text()
    assert re.search(call, source), "the public function calls another overload"


@every_operator
def test_test_file(name: str) -> None:
    """Its test file runs opcheck on this overload."""
    text = (ROOT / "tests" / f"test_{stem(name)}.py").read_text()
    full = name if "." in name else f"{name}.default"
    assert "opcheck" in text and full in text


@every_operator
def test_kernel_quotes_its_schema(name: str) -> None:
    text = (ROOT / "csrc" / "cpu" / f"{stem(name)}.cpp").read_text()
    assert f"// {name}(" in text and f'm.impl("{name}"' in text


def documents() -> str:
    paths = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.rst")]
    ignored = {"_build", "generated"}
    return "\n".join(p.read_text() for p in paths if not ignored & set(p.parts))


@pytest.mark.parametrize("public", sorted(flashinfer_ops.__all__))
def test_public_names_are_documented(public: str) -> None:
    assert re.search(rf"\b{public}\b", documents())


@every_operator
def test_schemas_are_documented(name: str) -> None:
    assert str(overload(name)._schema).removeprefix("flashinfer_ops::") in documents()


def test_registering_twice_is_harmless_to_ask() -> None:
    """Importing the package again does not register again."""
    import importlib

    assert importlib.import_module("flashinfer_ops") is flashinfer_ops
    assert flashinfer_ops.native.load("_C") is flashinfer_ops.native.load("_C")


def test_the_reference_serves_devices_without_kernels() -> None:
    """What PyTorch would dispatch to on such a device is the reference."""
    for name in OPERATORS:
        for key in ("MPS", "XPU", "PrivateUse1"):
            assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(
                f"flashinfer_ops::{name}", key
            )


def test_missing_library_says_what_to_do() -> None:
    with pytest.raises(ImportError, match=r"_no_such_library is missing.*pip install"):
        flashinfer_ops.native.load("_no_such_library")


def test_cpu_capability_refuses_unknown_names() -> None:
    before = flashinfer_ops.native.cpu_capability()
    with pytest.raises(ValueError, match=r"name is 'mmx', expected an instruction set"):
        flashinfer_ops.native.set_cpu_capability("mmx")
    assert flashinfer_ops.native.cpu_capability() == before
