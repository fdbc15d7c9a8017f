"""Answer many questions behind one long system prompt, with the prompt's KV stored and read once.

    python examples/shared_prefix_chat.py

A real model (SmolLM2-135M-Instruct, run by transformers) answers questions about the handbook in
`handbook.txt`. The handbook is level 0 of the cascade, one group over all requests; each question
and its answer are a group of level 1. The decode step is one `torch.compile(fullgraph=True)` graph
which plans, appends and attends; it is compiled once and serves every step, every number of
requests, and the comparison in which each request has its own copy of the handbook.

The same prompts then go through transformers' own `generate`, the greedy tokens of both are
compared, and a table and a plot are saved. Read `paged_llm.py` to see how a model is connected.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
import transformers
from chat_report import (
    Run,
    SweepPoint,
    check_tokens,
    compare_runs,
    plot_sweep,
    sweep_table,
)
from chat_session import ChatSession, State, compilations
from small_model import load_smollm, random_smollm
from tqdm import tqdm
from transformers_baseline import CachedPrefix, generate, synchronize

HERE = Path(__file__).parent
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# A logit margin under which two greedy tokens are a tie: a few roundings of a logit around 20.
TIES = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Run once; wall-clock time until the device is done."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def step_seconds(function: Callable[[], object], device: torch.device, warmup: int) -> float:
    """Median time of five calls, after `warmup` calls."""
    for _ in range(warmup):
        function()
    return statistics.median(seconds(function, device) for _ in range(5))


def kv_bytes_read(session: ChatSession, own_tokens: int, prefixes: int) -> int:
    """KV that one decode step reads when the system prompt is read `prefixes` times."""
    tokens = prefixes * len(session.prefix_ids) + own_tokens
    return tokens * session.lm.kv_bytes_per_token


def kv_bytes_held(session: ChatSession, requests: int, prefixes: int) -> int:
    """Memory of the pages of `requests` requests with `prefixes` copies of the system prompt."""
    pages = prefixes * session.prefix_pages.shape[1] + requests * session.own_pages.shape[1]
    return pages * session.lm.page_size * session.lm.kv_bytes_per_token


def answer_all(session: ChatSession, requests: int, new_tokens: int) -> tuple[torch.Tensor, Run]:
    """Prefill the system prompt and the questions, then decode: the demo proper."""
    device = session.device
    synchronize(device)
    start = time.perf_counter()
    session.prefill_prefix()
    state = session.prefill_questions(requests)
    synchronize(device)
    prefill = time.perf_counter() - start
    click.echo(f"prefill of the system prompt and {requests} questions: {prefill:.2f} s")

    compiling = seconds(lambda: session.decode_step(state), device)
    click.echo(f"compilation of the decode step: {compiling:.1f} s")
    if device.type == "cuda":
        session.decode_step(state)  # records the CUDA graph

    with tqdm(total=new_tokens - 1, desc="flashinfer_ops", unit="step") as bar:
        start = time.perf_counter()
        answers = session.decode(state, new_tokens, on_step=bar.update)
        synchronize(device)
        decode = time.perf_counter() - start
    own_tokens = int(state.seq_lens.sum()) + requests * (new_tokens - 1)
    return answers, Run(
        prefill_seconds=prefill,
        decode_seconds=decode,
        kv_bytes=kv_bytes_held(session, requests, prefixes=1),
        kv_bytes_read=kv_bytes_read(session, own_tokens, prefixes=1),
    )


def sweep(session: ChatSession, sizes: list[int]) -> tuple[list[SweepPoint], bool]:
    """Time decode steps of all sizes, prefix shared and copied; also: are the tokens the same?"""
    session.copy_prefix()
    everyone = session.prefill_questions(max(sizes))
    warmup = 3 if session.device.type == "cuda" else 1
    points, same = [], True
    for n in tqdm(sizes, desc="numbers of requests", unit="size"):
        times, tokens = [], []
        for copied in (False, True):
            state = State(
                everyone.token_ids[:n],
                session.decode_level(n, copied),
                everyone.page_table[:n],
                everyone.seq_lens[:n],
            )
            step = functools.partial(session.decode_step, state)
            times.append(step_seconds(step, session.device, warmup))
            tokens.append(step())
        same &= torch.equal(*tokens)
        memory = [kv_bytes_held(session, n, prefixes) for prefixes in (1, n)]
        points.append(SweepPoint(n, times[0], times[1], None, memory[0], memory[1]))
    return points, same


def add_transformers(
    points: list[SweepPoint], model: transformers.PreTrainedModel, prefix_ids: list[int]
) -> list[SweepPoint]:
    """The points with the time of transformers' own decode steps."""
    prefix = CachedPrefix(model, prefix_ids)
    timed = []
    for point in tqdm(points, desc="the same, transformers", unit="size"):
        step = prefix.for_requests(point.requests)
        token_ids = torch.full((point.requests,), prefix_ids[0], device=model.device)
        taken = step_seconds(functools.partial(step, token_ids), model.device, warmup=1)
        timed.append(point._replace(transformers_seconds=taken))
    return timed


@click.command(help=__doc__.split("\n")[0])
@click.option("--requests", type=click.IntRange(min=2), default=16, show_default=True)
@click.option("--new-tokens", type=click.IntRange(min=2), default=32, show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True)
@click.option("--random-model", is_flag=True, help="Random weights: needs no model file.")
@click.option("--baseline/--no-baseline", default=True, help="Run transformers' generate too.")
@click.option("--plot/--no-plot", default=True, help="Measure and draw 2 .. 2 x requests requests.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("outputs/shared_prefix_chat.png"),
    show_default=True,
    help="The plot; the tables go beside it, as .md.",
)
@torch.no_grad()
def main(
    requests: int,
    new_tokens: int,
    device: str,
    dtype: str,
    random_model: bool,
    baseline: bool,
    plot: bool,
    output: Path,
) -> None:
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    where, precision = torch.device(name), DTYPES[dtype]
    machine = (
        torch.cuda.get_device_name(where)
        if where.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    transformers.logging.set_verbosity_error()
    handbook = (HERE / "handbook.txt").read_text(encoding="utf-8")
    questions = (HERE / "questions.txt").read_text(encoding="utf-8").splitlines()
    if random_model:
        model_name = "SmolLM2-135M with random weights"
        model, tokenizer = random_smollm(precision, where, [handbook, *questions])
    else:
        model_name = "SmolLM2-135M-Instruct"
        click.echo(f"loading {model_name} ...")
        model, tokenizer = load_smollm(precision, where)

    # Sizes of the plot: powers of two up to twice the requests.
    sizes = [2**i for i in range(1, (2 * requests).bit_length())] if plot else []
    rows = max([requests, *sizes])
    asked = list(itertools.islice(itertools.cycle(questions), rows))
    prefix_ids = tokenizer.encode(handbook)
    prompts = [tokenizer.encode(handbook, question) for question in asked]
    suffixes = [prompt[len(prefix_ids) :] for prompt in prompts]
    click.echo(
        f"{requests} questions, {new_tokens} new tokens each, behind a system prompt of "
        f"{len(prefix_ids)} tokens; {dtype} on {machine}"
    )

    session = ChatSession(model, prefix_ids, suffixes, new_tokens, with_copies=plot)
    compiled_before = compilations()
    answers, ours = answer_all(session, requests, new_tokens)
    for question, answer in zip(asked, answers.tolist(), strict=False):
        click.echo(f"\n  Q: {question}\n  A: {tokenizer.decode(answer)}")
    click.echo()

    points, copies_agree = sweep(session, sizes) if plot else ([], True)
    compiled = compilations() - compiled_before
    notes = [f"Compilations of the decode step: {compiled}."]
    passed = compiled == 1 and copies_agree
    if not copies_agree:
        notes.append("CHECK FAILED: tokens differ between a shared and a copied prefix.")

    theirs = None
    if baseline:
        with tqdm(total=new_tokens, desc="transformers generate", unit="step") as bar:
            generated = generate(model, prompts[:requests], new_tokens, on_step=bar.update)
        tokens = sum(map(len, prompts[:requests])) + requests * (new_tokens - 1)
        theirs = Run(
            generated.prefill_seconds,
            generated.decode_seconds,
            generated.kv_bytes,
            tokens * session.lm.kv_bytes_per_token,
        )
        check = check_tokens(answers, generated.tokens, generated.logits, TIES[precision])
        passed &= check.passed
        notes.append(str(check))
        points = add_transformers(points, model, prefix_ids)

    tables = [compare_runs(ours, theirs, requests, new_tokens)]
    tables += [sweep_table(points)] if plot else []
    setting = f"{dtype}, {machine}, system prompt of {len(prefix_ids)} tokens"
    report = "\n\n".join([f"{model_name}, {setting}.", *tables, *notes])
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".md").write_text(report + "\n", encoding="utf-8")
    click.echo(f"\n{report}\n\ntables: {output.with_suffix('.md')}")
    if plot:
        plot_sweep(points, f"One decode step: {model_name}, {setting}", output)
        click.echo(f"plot: {output}")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
