"""The summary table of a quantized model, one row per module."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SummaryRow", "format_rows"]


@dataclass(frozen=True)
class SummaryRow:
    """One module as `gaq inspect` shows it.

    Attributes:
        name: full module name.
        irreps: input and output irreps.
        weights: bits of the weights, '-' if in float or absent.
        inputs: how the input is rounded.
        scale: smallest and largest weight scale.
        bytes: size of the weights in a file.
        status: ``rounded``, ``in training``, ``float`` with the reason, ...
        expected: which width to expect of the weights, and why.
    """

    name: str
    irreps: str
    weights: str
    inputs: str
    scale: str
    bytes: int
    status: str
    expected: str = "-"


def format_rows(rows: list[SummaryRow]) -> str:
    """Format rows as aligned plain text, with a header and a total."""
    header = ("module", "irreps", "weights", "expected", "inputs", "scales", "bytes", "status")
    cells = [(r.name, r.irreps, r.weights, r.expected, r.inputs, r.scale, str(r.bytes), r.status) for r in rows]
    cells.append(("total", "", "", "", "", "", str(sum(r.bytes for r in rows)), ""))
    shortened = [(*(c if len(c) <= 48 else c[:45] + "..." for c in row[:-1]), row[-1]) for row in cells]
    widths = [max(len(header[i]), *(len(row[i]) for row in shortened)) for i in range(len(header))]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *shortened)
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)
