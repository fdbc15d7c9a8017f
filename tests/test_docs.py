"""The documentation is true: its code runs, its names exist, its schemas are the real ones."""

from __future__ import annotations

import doctest
import inspect
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from helpers import needs_packages

import flashinfer_ops

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    "README.md",
    "docs/index.md",
    "docs/tutorial.md",
    "docs/layout.md",
    "docs/numerics.md",
    "docs/compile.md",
    "docs/api/cascade.rst",
    "docs/api/functional.rst",
    "docs/api/page.rst",
    "docs/zh/cascade.rst",
]
MARKDOWN_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
RST_BLOCK = re.compile(r"^\.\. code-block:: python\n\n((?:(?: {3,}.*)?\n)+)", re.MULTILINE)
PUBLIC = {
    name: value
    for name in flashinfer_ops.__all__
    if not inspect.ismodule(value := getattr(flashinfer_ops, name))
}

# The code blocks of the API document that the library follows (flashinfer.cascade, in Chinese).
API_DOCUMENT_EXAMPLES = {
    "merge": """
        import torch
        import flashinfer

        batch_size = 8
        num_heads = 32
        head_dim = 128

        o1 = torch.randn(batch_size, num_heads, head_dim).half().to("cuda:0")
        m1 = torch.randn(batch_size, num_heads).float().to("cuda:0")
        d1 = torch.randn(batch_size, num_heads).float().to("cuda:0")

        o2 = torch.randn(batch_size, num_heads, head_dim).half().to("cuda:0")
        m2 = torch.randn(batch_size, num_heads).float().to("cuda:0")
        d2 = torch.randn(batch_size, num_heads).float().to("cuda:0")

        o_merged, m_merged, d_merged = flashinfer.merge_state(
            o1, m1, d1, o2, m2, d2
        )

        flashinfer.merge_state_in_place(o1, m1, d1, o2, m2, d2)
        """,
    "wrapper": """
        import torch
        import flashinfer

        num_layers = 32
        num_qo_heads = 64
        num_kv_heads = 8
        head_dim = 128
        page_size = 16
        max_num_pages = 256

        workspace_buffer = torch.empty(
            128 * 1024 * 1024, dtype=torch.uint8, device="cuda:0"
        )

        cascade_wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(
            workspace_buffer, kv_layout="NHD"
        )
        """,
}


def code_blocks(page: str) -> list[tuple[int, str]]:
    """Line number and text of each Python block of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    pattern = MARKDOWN_BLOCK if page.endswith(".md") else RST_BLOCK
    return [
        (text.count("\n", 0, match.start(1)), textwrap.dedent(match.group(1)))
        for match in pattern.finditer(text)
    ]


def run(code: str, names: dict[str, object], where: str, device: str, line: int = 0) -> None:
    """Run a block, on the CPU or as it is; errors point into the page."""
    if device == "cpu":
        code = code.replace("cuda:0", "cpu")
    exec(compile("\n" * line + code, where, "exec"), names)


@pytest.fixture(autouse=True)
def as_flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """`import flashinfer` is this library."""
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer_ops)
    monkeypatch.setitem(sys.modules, "flashinfer.cascade", flashinfer_ops.cascade)
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.mark.parametrize("page", PAGES)
def test_code_of_page_runs(page: str, device: str) -> None:
    blocks = code_blocks(page)
    assert blocks
    names: dict[str, object] = {"__name__": "__main__"}
    for line, code in blocks:
        if "aoti_load_package" in code:  # the last block of its page
            needs_packages(device)
        run(code, names, str(ROOT / page), device, line)


@pytest.mark.parametrize("example", API_DOCUMENT_EXAMPLES)
def test_api_document_example(example: str, device: str) -> None:
    names: dict[str, object] = {}
    run(textwrap.dedent(API_DOCUMENT_EXAMPLES[example]), names, example, device)
    if example == "merge":
        assert torch.equal(names["o1"], names["o_merged"])
        assert torch.equal(names["m1"], names["m_merged"])
        assert torch.equal(names["d1"], names["d_merged"])


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_example(name: str) -> None:
    docstring = inspect.getdoc(PUBLIC[name])
    assert docstring is not None and "Example:" in docstring
    test = doctest.DocTestParser().get_doctest(docstring, {}, name, None, None)
    assert test.examples
    failures = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test)
    assert failures.failed == 0


def documented_names(page: Path) -> set[str]:
    text = page.read_text(encoding="utf-8")
    return set(re.findall(r"^\.\. auto(?:function|class):: (\w+)", text, re.MULTILINE))


def test_every_public_name_is_on_an_api_page() -> None:
    documented = set().union(*(documented_names(page) for page in (DOCS / "api").glob("*.rst")))
    assert documented == set(PUBLIC)


def test_every_name_of_cascade_is_on_its_page() -> None:
    assert documented_names(DOCS / "api" / "cascade.rst") == set(flashinfer_ops.cascade.__all__)


def test_chinese_page_has_the_names_of_the_api_document() -> None:
    assert documented_names(DOCS / "zh" / "cascade.rst") == {
        "merge_state",
        "merge_state_in_place",
        "merge_states",
        "MultiLevelCascadeAttentionWrapper",
        "BatchDecodeWithSharedPrefixPagedKVCacheWrapper",
        "BatchPrefillWithSharedPrefixPagedKVCacheWrapper",
    }


@pytest.mark.parametrize("name", [name for name, value in PUBLIC.items() if inspect.isclass(value)])
def test_methods_have_docstrings(name: str) -> None:
    for member, value in inspect.getmembers(PUBLIC[name], inspect.isfunction):
        if not member.startswith("_"):
            assert inspect.getdoc(value), member


def test_operator_page_lists_the_schemas() -> None:
    text = (DOCS / "api" / "operators.rst").read_text(encoding="utf-8")
    documented = set(re.findall(r"^   \* - ``(.*)``$", text, re.MULTILINE))
    schemas = set()
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("flashinfer_ops::"):
            operator, _, overload = name.partition(".")
            schema = str(torch._C._get_schema(operator, overload))
            schemas.add(schema.removeprefix("flashinfer_ops::"))
    assert documented == schemas


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in DOCS.glob("*.md"))])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), target


def test_index_lists_every_page() -> None:
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    pages = [p for pattern in ("*.md", "api/*.rst", "zh/*.rst") for p in DOCS.glob(pattern)]
    for page in pages:
        stem = page.relative_to(DOCS).with_suffix("").as_posix()
        assert stem == "index" or f"\n{stem}\n" in text, stem
