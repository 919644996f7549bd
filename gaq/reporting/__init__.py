"""Reports on a quantized potential: metrics, gates, tables, and the page that shows them."""

from gaq.checks.gates import BOUNDS, Gate, all_passed, evaluate_gates
from gaq.reporting.build import ReferenceModel, build_report, peak_memory, seconds_per_step, write_report
from gaq.reporting.environment import hardware, versions
from gaq.reporting.tables import format_table, markdown_table

__all__ = [
    "BOUNDS",
    "Gate",
    "ReferenceModel",
    "all_passed",
    "build_report",
    "evaluate_gates",
    "format_table",
    "hardware",
    "markdown_table",
    "peak_memory",
    "seconds_per_step",
    "versions",
    "write_report",
]
