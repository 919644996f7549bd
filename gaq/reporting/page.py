"""Result of a measurement as JSON and as a self-contained HTML page."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from gaq.checks.uses import fitness_line, use_rows
from gaq.files.whole import written_whole
from gaq.reporting.gates import failed_gates, passes_all, summary, unmeasured
from gaq.reporting.plots import figures
from gaq.reporting.tables import format_number, gate_rows, metric_rows
from gaq.untyped import ReadOnlyDocument

__all__ = ["json_types", "write_report"]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; } h3 { font-size: 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .35rem .75rem; border-bottom: 1px solid #d6dbe1; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #8a94a0; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.pass { color: #14622f; font-weight: 600; } .fail { color: #a8201a; font-weight: 600; }
.muted { color: #5b6570; } code { overflow-wrap: anywhere; }
figure { margin: 1.5rem 0; } img { max-width: 100%; } figcaption { color: #5b6570; font-size: .9rem; }
"""


def write_report(report: ReadOnlyDocument, directory: str | Path) -> tuple[Path, Path]:
    """Write ``report.json`` and ``report.html``.

    The page is self-contained: figures are embedded, and there is no script and no external address. Without matplotlib
    the page has no figures and says so. NaN and infinity, which JSON lacks, become null.

    Args:
        report: from `gaq.reporting.measure`, or read back from a ``report.json`` (then there are no figures).
        directory: where to write; created if missing.

    Returns:
        The paths of the JSON file and of the page.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    data = {key: value for key, value in report.items() if key != "figures"}
    json_path, html_path = directory / "report.json", directory / "report.html"
    text = json.dumps(json_types(data), indent=2, allow_nan=False) + "\n"
    for path, content in ((json_path, text), (html_path, _page(report))):
        with written_whole(path) as part:
            part.write_text(content, encoding="utf-8")
    return json_path, html_path


def json_types(value: object) -> object:
    """Convert a value to JSON's types; NaN and infinity become None."""
    if isinstance(value, Mapping):
        return {str(key): json_types(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_types(item) for item in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return json_types(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _page(report: ReadOnlyDocument) -> str:
    """The HTML page."""
    model, reference = report["model"], report.get("reference")
    gates = report["gates"]
    head = f", head <strong>{_text(report['head'])}</strong>" if report.get("head") else ""
    compared = f", compared with <code>{_text(reference['path'])}</code>" if reference else ""
    gpu = report["hardware"].get("gpu") or "none"
    software = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Quantization report: {_text(Path(model["path"]).name)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>Quantization report</h1>
<p><code>{_text(model["path"])}</code>, preset <strong>{_text(model["preset"])}</strong>{head}{compared}.</p>
{_partial(report.get("partial"))}
{_fitness(report.get("uses"))}
{_summary(gates)}
{_left_out(report.get("left_out") or ())}
{_use_table(report.get("uses"))}
<h2>Gates</h2>
{_gate_table(gates)}
{_measurements(report)}
<h2>How it was measured</h2>
<p>Command: <code>{_text(report["command"])}</code></p>
<p>Hardware: {_text(report["hardware"].get("cpu"))}, {_text(report["hardware"].get("cores"))} cores,
{_text(report["hardware"].get("torch_threads"))} torch threads; GPU: {_text(gpu)}.</p>
<p>Software: {_text(software)}.</p>
</body>
</html>
"""


def _text(value: object) -> str:
    return html.escape(str(value))


def _summary(gates: Mapping[str, ReadOnlyDocument]) -> str:
    """One sentence, green only if every gate was measured and passed, and what the others need."""
    if not gates:
        return '<p class="muted">A float model: no gates apply.</p>'
    tone = "fail" if failed_gates(gates) else "pass" if passes_all(gates) else "muted"
    lines = [f'<p class="{tone}">{_text(summary(gates))}.</p>']
    if missing := unmeasured(gates):
        items = "".join(f"<li>{_text(name)}: {_text(needs)}</li>" for name, needs in missing.items())
        lines.append(f'<p class="muted">Not measured:</p><ul class="muted">{items}</ul>')
    return "\n".join(lines)


def _partial(line: str | None) -> str:
    return f'<p class="fail">Partial report: {_text(line)}.</p>' if line else ""


def _fitness(uses: ReadOnlyDocument | None) -> str:
    """The line that says what the model is fit for; nothing in reports from before there were uses."""
    if not uses:
        return ""
    line = fitness_line(uses)
    return f"<p><strong>{_text(line[0].upper() + line[1:])}.</strong></p>"


def _use_table(uses: ReadOnlyDocument | None) -> str:
    """The number behind each verdict, and what those that were not shown need."""
    if not uses:
        return ""
    rows = []
    for use, word, value, bound, unit, what in use_rows(uses):
        tone = {"fit": "pass", "not fit": "fail"}.get(word, "muted")
        rows.append(
            f"<tr><td>{_text(use)}</td><td class='n'>{_text(_value(value))}</td>"
            f"<td class='n'>≤ {_text(format_number(bound))} {_text(unit)}</td>"
            f"<td><span class=\"{tone}\">{word}</span></td><td class='muted'>{_text(what)}</td></tr>"
        )
    needs = "".join(f"<li>{_text(use)}: {_text(entry['needs'])}</li>" for use, entry in uses.items() if entry["needs"])
    missing = f'<p class="muted">Not shown, and what each needs:</p><ul class="muted">{needs}</ul>' if needs else ""
    head = "<tr><th>Use</th><th class='n'>Value</th><th class='n'>Bound</th><th>Result</th><th>Meaning</th></tr>"
    return f"<h2>Uses, beside the float model</h2>\n<table>{head}{''.join(rows)}</table>\n{missing}"


def _left_out(lines: Sequence[str]) -> str:
    """The labels and structures that were not used."""
    return "\n".join(f'<p class="muted">{_text(line)}</p>' for line in lines)


def _measurements(report: ReadOnlyDocument) -> str:
    """Metrics and figures; those of each head under its name where the model has several."""
    heads, drawn = report.get("heads"), report.get("figures")
    if not heads:
        metrics = _metric_table(report["model"], report.get("reference"))
        return f"<h2>Metrics</h2>\n{metrics}\n<h2>Figures</h2>\n{figures(drawn)}"
    return "\n".join(
        f"<h2>Head {_text(head)}</h2>\n<h3>Metrics</h3>\n{_metric_table(metrics['model'], metrics['reference'])}\n"
        f"<h3>Figures</h3>\n{figures(drawn and drawn[head])}"
        for head, metrics in heads.items()
    )


def _gate_table(gates: Mapping[str, ReadOnlyDocument]) -> str:
    rows = []
    for row in gate_rows(gates):
        bound = row["bound"].replace("<=", "≤").replace(">=", "≥")
        remark = f' <span class="muted">({row["enforced"]})</span>' if row["enforced"] else ""
        rows.append(
            f"<tr><td>{_text(row['title'])}<br><code class='muted'>{_text(row['gate'])}</code></td>"
            f"<td class='n'>{_text(row['value'].replace('inf', '∞'))}</td>"
            f"<td class='n'>{_text(bound)} {_text(row['unit'])}</td>"
            f'<td><span class="{row["verdict"]}">{row["verdict"]}</span>{remark}</td>'
            f"<td class='muted'>{_text(row['what'])}</td></tr>"
        )
    head = "<tr><th>Gate</th><th class='n'>Value</th><th class='n'>Bound</th><th>Result</th><th>Meaning</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _metric_table(model: ReadOnlyDocument, reference: ReadOnlyDocument | None) -> str:
    body = "".join(
        f"<tr><td>{_text(label)}</td><td class='n'>{_text(_value(value))}</td>"
        f"<td class='n'>{_text(_value(reference_value))}</td><td class='muted'>{_text(unit)}</td></tr>"
        for label, unit, value, reference_value in metric_rows(model, reference)
    )
    head = "<tr><th>Metric</th><th class='n'>Model</th><th class='n'>Reference</th><th>Unit</th></tr>"
    return f"<table>{head}{body}</table>"


def _value(value: object, digits: int = 3) -> str:
    if isinstance(value, float) and math.isinf(value):
        return "∞"
    return format_number(value, digits)
