"""Draws the decision figure of docs/presets.md: python docs/figures/choosing.py writes choosing.svg beside it."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, QUESTION, ROW = 380, 210, 92
STEPS = (
    (("Does the size of", "the file matter?"), "no", ("no quantization:", "accelerate, deploy")),
    (("Does the model", "run on a CPU?"), "yes", ("w8", "7x smaller: w4")),
    (("Is a file 5 times", "smaller enough?"), "no", ("w4a16", "7x smaller")),
)
"""Questions from the top down: the question, the answer that leads to the right, and where it leads."""
LAST = ("gaq", "the default")
BOX = 58


def box(x: float, y: float, width: float, lines: tuple[str, ...], style: str) -> str:
    """A box with centred lines; the first line of an answer is bold."""
    parts = [f'<rect x="{x}" y="{y}" width="{width}" height="{BOX}" rx="8" class="{style}"/>']
    for n, line in enumerate(lines):
        bold = ' font-weight="bold"' if style == "answer" and n == 0 else ""
        at = y + BOX / 2 + 5 + 19 * (n - (len(lines) - 1) / 2)
        parts.append(f'<text x="{x + width / 2}" y="{at}" text-anchor="middle"{bold}>{escape(line)}</text>')
    return "\n".join(parts)


def arrow(x1: float, y1: float, x2: float, y2: float, label: str) -> str:
    """An arrow with a label beside it."""
    across = y1 == y2
    x, y = ((x1 + x2) / 2, y1 - 6) if across else (x1 + 8, (y1 + y2) / 2 + 4)
    anchor = "middle" if across else "start"
    line = f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" class="arrow" marker-end="url(#head)"/>'
    return f'{line}\n<text x="{x}" y="{y}" text-anchor="{anchor}" class="label">{label}</text>'


def figure() -> str:
    """The figure as SVG, with a white ground: it is read in dark themes too."""
    parts = []
    for n, (question, answer, result) in enumerate(STEPS):
        y = 10 + n * ROW
        other = "no" if answer == "yes" else "yes"
        parts.append(box(10, y, QUESTION - 30, question, "question"))
        parts.append(box(QUESTION + 16, y, WIDTH - QUESTION - 26, result, "answer"))
        parts.append(arrow(QUESTION - 20, y + 29, QUESTION + 14, y + 29, answer))
        parts.append(arrow(100, y + BOX, 100, y + ROW - 2, other))
    parts.append(box(10, 10 + len(STEPS) * ROW, QUESTION - 30, LAST, "answer"))
    height = len(STEPS) * ROW + 78
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"
 font-family="sans-serif" font-size="14" role="img">
<title>Which preset to take</title>
<style>
.question {{ fill: #eef3f8; stroke: #4a6785; }}
.answer {{ fill: #e6f4ea; stroke: #3b7a4d; }}
.arrow {{ stroke: #444; stroke-width: 1.5; }}
.label {{ font-size: 12px; fill: #444; }}
</style>
<defs><marker id="head" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">
<path d="M0,0 L7,3 L0,6 z" fill="#444"/></marker></defs>
<rect width="{WIDTH}" height="{height}" fill="white"/>
{chr(10).join(parts)}
</svg>
"""


if __name__ == "__main__":
    (Path(__file__).parent / "choosing.svg").write_text(figure(), encoding="utf-8")
