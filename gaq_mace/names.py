"""Names that several modules share; imports nothing, so that the hook can read it while torch is being imported."""

from __future__ import annotations

__all__ = ["ATTENTION", "CONSTRUCTOR", "PACKED", "PATCHED", "RUN_TRAIN", "TARGETS"]

ATTENTION = "GAQAttentionResidualInteractionBlock"
"""Name under which MACE knows the interaction block of `gaq_mace.attention`."""

CONSTRUCTOR = "gaq_packed_constructor"
"""Attribute of ``mace.modules.models`` with which a packed pickle constructs its model, where this package is."""

PACKED = "gaq_packed"
"""Attribute of a model in which a packed pickle leaves the description of the quantization."""

PATCHED = "__gaq_patched__"
"""Attribute that marks a module of MACE as patched by the hook."""

RUN_TRAIN = "mace.cli.run_train"
"""Module of MACE's training command."""

TARGETS = (
    "mace.calculators.mace",
    RUN_TRAIN,
    "mace.modules.models",
    "mace.tools.arg_parser",
    "mace.tools.scripts_utils",
    "mace.tools.tables_utils",
    "mace.tools.train",
)
"""Modules of MACE that `gaq_mace.hook` patches."""
