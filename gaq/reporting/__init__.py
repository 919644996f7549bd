"""Reports on a potential: measured metrics, gates, tables, and the page that shows them."""

from gaq.reporting.environment import hardware, versions
from gaq.reporting.gates import BOUNDS, Gate, evaluate_gates, failed_gates, summary, unmeasured
from gaq.reporting.measure import measure_file, measure_subject, quality
from gaq.reporting.page import write_report
from gaq.reporting.subject import Subject, open_file, open_model
from gaq.reporting.tables import format_table, gate_rows, markdown_table

__all__ = [
    "BOUNDS",
    "Gate",
    "Subject",
    "evaluate_gates",
    "failed_gates",
    "format_table",
    "gate_rows",
    "hardware",
    "markdown_table",
    "measure_file",
    "measure_subject",
    "open_file",
    "open_model",
    "quality",
    "summary",
    "unmeasured",
    "versions",
    "write_report",
]
