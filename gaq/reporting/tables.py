"""Plain-text and Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gaq.reporting.gates import COMPARE, title_of, verdict
from gaq.untyped import ReadOnlyDocument

MISSING = "-"

_METRICS = (
    ("force_mae_mev_per_angstrom", "Force MAE", "meV/Å"),
    ("force_rmse_mev_per_angstrom", "Force RMSE", "meV/Å"),
    ("energy_mae_mev_per_atom", "Energy MAE", "meV/atom"),
    ("lee_mev_per_angstrom", "Force error under rotations (LEE)", "meV/Å"),
)
_NVE_METRICS = (
    ("drift_mev_per_atom_per_ps", "NVE drift", "meV/atom/ps"),
    ("standard_error", "NVE drift, standard error", "meV/atom/ps"),
    ("drift_over_std_kinetic", "NVE |drift x time| / std(kinetic energy)", ""),
    ("stable", "NVE run stable", ""),
)
_COST_METRICS = (
    ("file_bytes", "File size", "MiB"),
    ("weight_bytes", "Weights: codes, scales and what is float", "MiB"),
    ("seconds_per_step", "Energy and forces, median", "s/step"),
    ("peak_bytes", "Peak memory", "MiB"),
)


def metric_rows(
    model: ReadOnlyDocument, reference: ReadOnlyDocument | None = None
) -> list[tuple[str, str, object, object]]:
    """Return label, unit, and the values of model and reference for each metric that was measured."""
    rows: list[tuple[str, str, object, object]] = []

    def add(entries: Sequence[tuple[str, str, str]], left: ReadOnlyDocument, right: ReadOnlyDocument) -> None:
        rows.extend((label, unit, _in(unit, left.get(key)), _in(unit, right.get(key))) for key, label, unit in entries)

    reference = reference or {}
    add(_METRICS, model, reference)
    difference = model.get("force_difference") or {}
    rows.append(
        ("RMS force difference to the reference", "meV/Å", difference.get("rms_mev_per_angstrom"), None),
    )
    errors = model.get("central_difference_relative_error") or {}
    reference_errors = reference.get("central_difference_relative_error") or {}
    rows.extend(
        (f"Force against central differences, h = {step} Å", "relative", error, reference_errors.get(step))
        for step, error in errors.items()
    )
    if model.get("nve"):
        add(_NVE_METRICS, model["nve"], reference.get("nve") or {})
    add(_COST_METRICS, model, reference)
    return [row for row in rows if row[2] is not None or row[3] is not None]


def _in(unit: str, value: Any) -> Any:
    """A metric in the unit of its row: bytes in MiB."""
    return value if unit != "MiB" or value is None else value / 2**20


def gate_rows(gates: Mapping[str, ReadOnlyDocument]) -> list[dict[str, str]]:
    """Return the texts of each gate that was measured, given gates as in ``report.json``.

    The numbers have the digits that show why the gate passes or fails.

    Returns:
        Rows of ``gate``, ``title`` (its name in words), ``value``, ``bound``, ``unit``, ``verdict``
        (`gaq.reporting.gates.verdict`), ``enforced`` (empty, or the remark that the gate is not) and ``what``.
    """
    rows = []
    for name, gate in gates.items():
        if gate["passed"] is None:
            continue
        value, bound = format_comparison(gate["value"], gate["bound"], gate["comparison"])
        rows.append(
            {
                "gate": name,
                "title": title_of(name),
                "value": value,
                "bound": f"{gate['comparison']} {bound}",
                "unit": gate["unit"],
                "verdict": verdict(gate),
                "enforced": "" if gate["enforced"] else "not enforced for this preset",
                "what": gate["note"],
            }
        )
    return rows


def format_comparison(value: float | None, bound: float | None, comparison: str, digits: int = 4) -> tuple[str, str]:
    """Format a value and its bound with as many digits as it takes for the texts to compare as the numbers do.

    Args:
        value: None for a value that was not finite and went through JSON.
        bound: the same.
        comparison: as in `gaq.reporting.gates.Gate`.
        digits: significant digits to begin with.
    """
    if value is None or bound is None or not (math.isfinite(value) and math.isfinite(bound)):
        value_text, bound_text = ("not finite" if x is None else format_number(x, digits) for x in (value, bound))
        return value_text, bound_text
    holds = COMPARE[comparison]
    for count in range(digits, 18):
        texts = format_number(value, count), format_number(bound, count)
        printed, printed_bound = (float(text.replace(",", "")) for text in texts)
        if holds(printed, printed_bound) == holds(value, bound):
            break
    return texts  # 17 digits tell any two numbers apart


def format_number(value: object, digits: int = 3) -> str:
    """Format the value of a cell.

    Args:
        value: anything.
        digits: significant digits of floats.

    Returns:
        Floats rounded, integers with separators, a dash for None, and the text of anything else.
    """
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        if value == 0 or 1e-3 <= abs(value) < 1e5:
            magnitude = 0 if value == 0 else math.floor(math.log10(abs(value)))
            return f"{value:,.{max(0, digits - 1 - magnitude)}f}"
        return f"{value:.{digits - 1}e}"
    return str(value)


def format_table(rows: Sequence[ReadOnlyDocument], columns: Sequence[str] | Mapping[str, str]) -> str:
    """Format rows as aligned plain text; numbers to the right, text to the left.

    Args:
        rows: one mapping per row; a missing key, or None, prints as a dash.
        columns: keys in order, or a mapping from key to heading.

    Returns:
        The table: a heading, a rule and the rows, without a final newline.
    """
    headings, cells, numeric = _cells(rows, columns)
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]

    def line(texts: Sequence[str]) -> str:
        padded = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(texts, widths, numeric, strict=True)
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(headings), "  ".join("-" * width for width in widths), *map(line, cells)])


def markdown_table(rows: Sequence[ReadOnlyDocument], columns: Sequence[str] | Mapping[str, str]) -> str:
    """Format rows as a Markdown table.

    Args:
        rows: one mapping per row; a missing key, or None, prints as a dash.
        columns: keys in order, or a mapping from key to heading.

    Returns:
        A pipe table without a final newline.
    """
    headings, cells, numeric = _cells(rows, columns)
    rule = ["---:" if right else "---" for right in numeric]
    lines = [headings, rule, *([text.replace("|", "\\|") for text in row] for row in cells)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(
    rows: Sequence[ReadOnlyDocument], columns: Sequence[str] | Mapping[str, str]
) -> tuple[list[str], list[list[str]], list[bool]]:
    """Return headings, texts, and which columns hold numbers only."""
    keys = list(columns)
    headings = list(columns.values()) if isinstance(columns, Mapping) else keys
    cells = [[format_number(row.get(key)) for key in keys] for row in rows]
    numeric = []
    for key in keys:
        values = [row[key] for row in rows if row.get(key) is not None]
        numeric.append(bool(values) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values))
    return headings, cells, numeric
