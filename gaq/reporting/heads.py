"""Reports of a model with several heads: whose labels the structures have, and one report of all heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gaq.checks.labels import ENERGY_KEY, FORCES_KEY, frames_text, labels_of, left_out_labels
from gaq.checks.uses import worst
from gaq.untyped import Document

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["joined", "labelled_in"]

HEAD = "head"
"""Key in ``info`` under which structures name their head, as `mace_run_train` reads it."""


def labelled_in(
    structures: Sequence[Atoms], heads: Sequence[str], energy_key: str = ENERGY_KEY, forces_key: str = FORCES_KEY
) -> tuple[dict[str, list[Atoms]], list[str]]:
    """Give each head the structures, with labels where these are of that head.

    Labels of one head are errors of another: heads are trained on energies of different methods.

    Returns:
        The structures of each head, and lines that say which labels are not used.
    """
    of_heads: dict[str, list[Atoms]] = {head: [] for head in heads}
    homeless = []
    for frame, structure in enumerate(structures):
        bare = structure.copy()
        bare.info.pop(energy_key, None)
        bare.arrays.pop(forces_key, None)
        labelled_head = structure.info.get(HEAD)
        if labelled_head not in of_heads and labels_of(structure, energy_key, forces_key).any:
            homeless.append(frame)
        for head in heads:
            of_heads[head].append(structure if head == labelled_head else bare)
    lines = left_out_labels(structures, energy_key, forces_key)
    if not homeless:
        return of_heads, lines
    return of_heads, [
        *lines,
        f"left out: the labels of {len(homeless)} of {len(structures)} structures, because the model has the heads "
        f"{', '.join(heads)} and info[{HEAD!r}] names none of them: {frames_text(homeless)}; --head (head in Python) "
        "measures one head, with all labels",
    ]


def joined(reports: Mapping[str, Document], lines: Sequence[str] = ()) -> Document:
    """Join the reports of all heads to one.

    Args:
        reports: of each head, as `gaq.reporting.measure.measure_subject` returns them.
        lines: what was left out, besides what the reports say.

    Returns:
        The report of the first head, with the gates of all, each under its name and its head; a gate that is the same
        for all, such as that of the file size, stands there once; of each use the worst verdict. ``heads`` holds the
        metrics of each head, ``figures`` the arrays of each for the page.
    """
    first = next(iter(reports.values()))
    common = [line for line in first["left_out"] if all(line in report["left_out"] for report in reports.values())]
    gates: Document = {}
    for name in dict.fromkeys(name for report in reports.values() for name in report["gates"]):
        of_heads = {head: report["gates"][name] for head, report in reports.items() if name in report["gates"]}
        same = len(of_heads) == len(reports) and all(gate == first["gates"][name] for gate in of_heads.values())
        gates |= {name: first["gates"][name]} if same else {f"{name} ({head})": g for head, g in of_heads.items()}
    return {
        **first,
        "gates": gates,
        "uses": None if first["uses"] is None else worst([report["uses"] for report in reports.values()]),
        "partial": next((report["partial"] for report in reports.values() if report["partial"]), None),
        "left_out": [*lines, *common],
        "heads": {head: {"model": r["model"], "reference": r["reference"]} for head, r in reports.items()},
        "figures": {head: r["figures"] for head, r in reports.items()},
    }
