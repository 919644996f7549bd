"""Names of attributes of loaded models that several modules read, and nothing else."""

from __future__ import annotations

__all__ = ["EXAMPLE", "SOURCE", "SPECIES"]

SOURCE = "gaq_source"
"""Attribute of a loaded model: its file, which holds what a new file needs besides the model."""

SPECIES = "gaq_species"
"""Attribute of a loaded model, and key of files: the type name of each chemical symbol."""

EXAMPLE = "gaq_example"
"""Attribute of a calibrated model, and key of its checkpoint: the graph of a structure, to package and compile with."""
