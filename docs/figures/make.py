"""Draw the tutorial's figures: `python docs/figures/make.py` writes the SVG files beside it."""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

HERE = Path(__file__).parent
LEVEL_COLOURS = ("#1b6ca8", "#1f7a70", "#b5651d")
INK, PAPER = "#22303c", "#ffffff"

# The tutorial's example: for each level (first row, end row, page numbers, tokens in the last).
PAGE_SIZE = 16
LEVELS = [
    [(0, 4, [4, 0, 9], 8)],
    [(0, 2, [1, 7], 4), (2, 4, [2, 10], 16)],
    [(0, 1, [3], 5), (1, 2, [5], 9), (2, 3, [6, 11], 1), (3, 4, [8], 1)],
]
NAMES = [["system prompt"], ["document A", "document B"], [f"request {r}" for r in range(4)]]


def kv_len(pages: list[int], last: int) -> int:
    return (len(pages) - 1) * PAGE_SIZE + last


def box(
    axes: Axes, x: float, y: float, w: float, h: float, text: str, colour: str, **style
) -> None:
    patch = FancyBboxPatch(
        (x, y), w, h, boxstyle="round,pad=0,rounding_size=0.06", facecolor=colour, edgecolor=PAPER
    )
    axes.add_patch(patch)
    font = {"color": PAPER, "fontsize": 10, **style}
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", **font)


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), facecolor=PAPER, layout="tight")
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    return figure, axes


def save(figure: Figure, name: str) -> None:
    figure.savefig(HERE / name, metadata={"Date": None, "Creator": None})


def draw_forest() -> None:
    """Levels from top to bottom; a group is as wide as the query rows that share it."""
    figure, axes = canvas(8, 3.4)
    left, row_width = 1.0, 1.7
    for level, groups in enumerate(LEVELS):
        y = 2.5 - 0.8 * level
        axes.text(0.1, y + 0.3, f"level {level}", va="center", color=INK, fontsize=10)
        for (begin, end, pages, last), name in zip(groups, NAMES[level], strict=True):
            text = f"{name}\n{kv_len(pages, last)} KV tokens"
            width = (end - begin) * row_width - 0.08
            box(axes, left + begin * row_width, y, width, 0.66, text, LEVEL_COLOURS[level])
    for row in range(4):
        x = left + (row + 0.5) * row_width
        axes.text(x, 0.45, f"query row {row}", ha="center", color=INK, fontsize=10)
        axes.annotate(
            "", (x, 0.9), (x, 0.6), arrowprops={"arrowstyle": "->", "color": INK, "lw": 1}
        )
    save(figure, "forest.svg")


def draw_pages() -> None:
    """The page pool, each page in the colour of its group's level."""
    figure, axes = canvas(8, 2.3)
    owner = {
        page: (level, name, position, kv_len(pages, last))
        for level, groups in enumerate(LEVELS)
        for (_, _, pages, last), name in zip(groups, NAMES[level], strict=True)
        for position, page in enumerate(pages)
    }
    width = 7.8 / len(owner)
    for page in sorted(owner):
        level, name, position, tokens = owner[page]
        x = 0.1 + page * width
        used = min(PAGE_SIZE, tokens - position * PAGE_SIZE)
        axes.add_patch(
            FancyBboxPatch(
                (x, 0.6),
                width - 0.07,
                1.2,
                boxstyle="square,pad=0",
                facecolor="#e6eaee",
                edgecolor=INK,
                lw=0.7,
            )
        )
        axes.add_patch(
            FancyBboxPatch(
                (x, 1.8 - 1.2 * used / PAGE_SIZE),
                width - 0.07,
                1.2 * used / PAGE_SIZE,
                boxstyle="square,pad=0",
                facecolor=LEVEL_COLOURS[level],
                edgecolor=INK,
                lw=0.7,
            )
        )
        centre = x + (width - 0.07) / 2
        axes.text(centre, 1.95, f"page {page}", ha="center", color=INK, fontsize=8)
        label = name.replace(" ", "\n")
        axes.text(centre, 0.5, label, ha="center", va="top", color=INK, fontsize=7.5)
    save(figure, "pages.svg")


def draw_merge() -> None:
    """Row 2: one state a level, merged into the state over all KV that the row sees."""
    figure, axes = canvas(8, 2.9)
    parts = [("system prompt", 40), ("document B", 32), ("own suffix", 17)]
    for level, (name, tokens) in enumerate(parts):
        y = 2.05 - 0.85 * level
        text = f"{name}\n{tokens} KV tokens"
        box(axes, 0.1, y, 2.0, 0.66, text, LEVEL_COLOURS[level])
        box(axes, 3.1, y, 1.5, 0.66, f"state $(v_{level}, s_{level})$", LEVEL_COLOURS[level])
        arrow = {"arrowstyle": "->", "color": INK, "lw": 1}
        axes.annotate("", (3.05, y + 0.33), (2.15, y + 0.33), arrowprops=arrow)
        axes.annotate("", (5.6, 1.53), (4.65, y + 0.33), arrowprops=arrow)
    axes.text(2.6, 2.5, "attention", ha="center", color=INK, fontsize=9)
    axes.text(5.2, 2.3, "merge", ha="center", color=INK, fontsize=9)
    box(axes, 5.65, 1.2, 2.25, 0.66, "state $(v, s)$\nover all 89 KV tokens", INK)
    save(figure, "merge.svg")


if __name__ == "__main__":
    matplotlib.rcParams["svg.hashsalt"] = "flashinfer_ops"
    draw_forest()
    draw_pages()
    draw_merge()
