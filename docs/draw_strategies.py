"""Draw the pictures in docs/strategies.md from plans. Run `python docs/draw_strategies.py` to write them again.

Each step of the forward pass is a column: arrows show which ranks send to which, and in the score matrix below them each cell has
the colour of the rank that computes it.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

import distattn as da
from distattn.ir.plan import Payload, Plan, select_rows
from distattn.parallel.analysis.score_matrix import legible_colours, task_outlines

FOLDER = Path(__file__).parent / "strategies"
RANKS, TOKENS = 4, 32
COLOURS = ["#" + "".join(f"{round(255 * part):02x}" for part in colour) for colour in legible_colours("turbo", RANKS)]
# in CSS pixels: the width of a column, the side of its matrix, where ranks and matrix begin, the width of the owners' strip
WIDTH, SIDE, RANKS_AT, MATRIX_AT, STRIP = 196, 160, 66, 132, 6
# the picture has its own background, because pages may have any colour
STYLE = """
svg { background: #fff; color: #1c2530; font: 13px system-ui, sans-serif; }
text { fill: currentColor; } .soft { opacity: .8; } .arrow { fill: none; stroke: currentColor; stroke-width: 1.2; }
.box { fill: none; stroke: currentColor; stroke-width: .8; } .before { opacity: .22; }
@media (prefers-color-scheme: dark) { svg { background: #14181e; color: #e4e9f0; } }
"""


def plans() -> dict[str, Plan]:
    """Return a small plan for each picture, by the picture's name."""
    causal, zigzag = da.Mask.causal(TOKENS), da.Layout.zigzag([TOKENS], RANKS)
    shape = dict(head_dim=8, dtype="float32")
    # each rank has its own documents: rank 0 one long document, rank 3 eight short ones
    lengths = [64, 32, 32, *[16] * 4, *[8] * 8]
    per_rank = da.Layout.contiguous([sum(lengths)], RANKS)
    return {
        "ring": da.make_plan(causal, zigzag, strategy="ring", heads=1, kv_heads=1, **shape),
        "ulysses": da.make_plan(causal, zigzag, strategy="ulysses", heads=4, kv_heads=4, **shape),
        "usp": da.make_plan(causal, zigzag, strategy="usp", heads=2, kv_heads=2, options={"ulysses": 2}, **shape),
        "cad": da.make_plan(da.Mask.documents(lengths), per_rank, strategy="cad", heads=1, kv_heads=1, **shape),
    }


def drawings() -> dict[str, str]:
    """Return the SVG of each picture, by the picture's name."""
    return {name: draw(plan) for name, plan in plans().items()}


def draw(plan: Plan) -> str:
    """Return a plan's forward pass as an SVG."""
    steps = plan.forward.steps
    # two heads are drawn side by side
    rows = SIDE / 2 + 8 if plan.call.heads == 2 else SIDE + 30
    width, height = 18 + WIDTH * steps, MATRIX_AT + rows
    columns = "".join(
        f'<g transform="translate({18 + WIDTH * step} 0)">{column(plan, step)}</g>' for step in range(steps)
    )
    size = f'viewBox="0 0 {width} {height:g}" width="{width}" height="{height:g}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
        f"<title>{plan.strategy} on {RANKS} ranks, step by step</title><style>{STYLE}</style>"
        '<defs><marker id="head" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="6" markerHeight="6" orient="auto">'
        '<path d="M0 0L6 3L0 6z" fill="context-stroke"/></marker></defs>'
        f"{columns}</svg>\n"
    )


def column(plan: Plan, step: int) -> str:
    """Return one step as SVG: its title, its moves, and the score matrix of each head."""
    moves = select_rows(plan.forward.moves, plan.forward.moves["step"] == step)
    names = ", ".join(Payload(payload).name for payload in np.unique(moves["payload"])) or "nothing"
    pairs = sorted({(int(src), int(dst)) for src, dst in zip(moves["src"], moves["dst"], strict=True)})
    heads = plan.call.heads
    # with several heads, two matrices are drawn per row
    across = 2 if heads > 1 else 1
    side = (SIDE - 22 * (across - 1)) / across
    matrices = "".join(
        f'<g transform="translate({head % across * (side + 22):g} {MATRIX_AT + head // across * (side + 22):g})">'
        f"{matrix(plan, step, head, side)}</g>"
        for head in range(heads)
    )
    return f'<text y="16">step {step}: moves {names}</text>{arrows(pairs)}{matrices}'


def arrows(pairs: list[tuple[int, int]]) -> str:
    """Return as SVG a row of ranks with an arrow per (source, destination): to the right above, to the left below."""
    at = [20 + rank * (SIDE - 40) / (RANKS - 1) for rank in range(RANKS)]
    out = []
    for src, dst in pairs:
        side = -1 if src < dst else 1
        begin, end, y = at[src] - side * 5, at[dst] + side * 5, RANKS_AT + side * 13
        out.append(
            f'<path class="arrow" marker-end="url(#head)" '
            f'd="M{begin:g} {y}Q{(begin + end) / 2:g} {y + side * (8 + 12 * abs(dst - src)):g} {end:g} {y}"/>'
        )
    for rank, x in enumerate(at):
        out.append(
            f'<circle cx="{x:g}" cy="{RANKS_AT}" r="10" fill="none" stroke="{COLOURS[rank]}" stroke-width="4"/>'
            f'<text x="{x:g}" y="{RANKS_AT + 4.5}" text-anchor="middle">{rank}</text>'
        )
    return "".join(out)


def matrix(plan: Plan, step: int, head: int, side: float) -> str:
    """Return a head's score matrix as SVG: this step's cells in their rank's colour, those of earlier steps faintly."""
    scale = side / plan.call.mask.n
    tasks = plan.forward.tasks
    tasks = select_rows(tasks, (tasks["h0"] <= head) & (head < tasks["h1"]) & (tasks["step"] <= step))
    cells = []
    for rank, at, outline in zip(tasks["rank"], tasks["step"], task_outlines(plan, tasks), strict=True):
        path = "L".join(f"{x * scale:.4g} {y * scale:.4g}" for x, y in outline)
        before = ' class="before"' if at < step else ""
        cells.append(f'<path{before} d="M{path}z" fill="{COLOURS[rank]}"/>')
    label = f'<text class="soft" x="{side / 2:g}" y="{side + 15:g}" text-anchor="middle">head {head}</text>'
    return (
        f'{"".join(cells)}{"".join(owners(plan, scale))}<rect class="box" width="{side:g}" height="{side:g}"/>'
        f"{label if plan.call.heads > 1 else ''}"
    )


def owners(plan: Plan, scale: float) -> Iterator[str]:
    """Yield the SVG strip to the left of a matrix, which shows each query in the colour of the rank that owns it."""
    layout = plan.call.layout
    for rank in range(RANKS):
        tokens = layout.tokens(rank)
        for segment in np.split(tokens, np.flatnonzero(np.diff(tokens) != 1) + 1):
            y, height = segment[0] * scale, len(segment) * scale
            yield f'<rect x="{-STRIP - 3}" y="{y:.4g}" width="{STRIP}" height="{height:.4g}" fill="{COLOURS[rank]}"/>'


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in drawings().items():
        (FOLDER / f"{name}.svg").write_text(text, "utf-8")
