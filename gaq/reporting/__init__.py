"""Reports on a potential: measured metrics, gates, tables, and the page that shows them."""

from .environment import hardware, versions
from .gates import BOUNDS, Gate, evaluate_gates, failed_gates
from .measure import measure_file, measure_subject, quality
from .page import write_report
from .subject import Subject, open_file, open_model
from .tables import format_table, markdown_table

__all__ = [
    "BOUNDS",
    "Gate",
    "Subject",
    "evaluate_gates",
    "failed_gates",
    "format_table",
    "hardware",
    "markdown_table",
    "measure_file",
    "measure_subject",
    "open_file",
    "open_model",
    "quality",
    "versions",
    "write_report",
]
