"""Which elements of a model are kept: what a user may ask for, and whether the calibration data agree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["SpeciesMap", "check_calibration", "check_known", "checked_elements", "parsed_species"]

SpeciesMap = str | Mapping[str, str]
"""A model's name of the type of each chemical symbol: a mapping, or one text such as ``"H:myH,C:myC"``."""


def checked_elements(elements: str | Iterable[str], known: Sequence[str]) -> list[str]:
    """The chemical symbols that a user asked for, each once, in the order of the model.

    Args:
        elements: symbols, or one text with commas between them.
        known: symbols of the elements that the model knows.

    Raises:
        ValueError: for no symbols, one that occurs twice, one that is no element, and one that the model does not
            know; the message says which are allowed.
    """
    from ase.data import chemical_symbols

    asked = [text.strip() for text in (elements.split(",") if isinstance(elements, str) else elements)]
    if not [symbol for symbol in asked if symbol]:
        raise ValueError(f"elements: none given; name some of {', '.join(known)}.")
    if foreign := [symbol for symbol in asked if symbol not in chemical_symbols[1:]]:
        raise ValueError(
            f"elements: {foreign[0]!r} is not the symbol of a chemical element; write them as Li,P,S, of "
            f"{', '.join(known)}."
        )
    if twice := sorted({symbol for symbol in asked if asked.count(symbol) > 1}):
        raise ValueError(f"elements: {', '.join(twice)} named more than once; name each element once.")
    if unknown := [symbol for symbol in asked if symbol not in known]:
        raise ValueError(f"elements: the model does not know {', '.join(unknown)}; it knows {', '.join(known)}.")
    return [symbol for symbol in known if symbol in asked]


def parsed_species(species: SpeciesMap) -> dict[str, str]:
    """A map from chemical symbols to a model's names of its types, as a dictionary.

    Raises:
        ValueError: if a text is not ``SYMBOL:TYPE,...`` or gives a symbol twice.
    """
    if not isinstance(species, str):
        return dict(species)
    pairs = [part.split(":") for part in species.split(",")]
    parsed = {pair[0].strip(): pair[-1].strip() for pair in pairs}
    if any(len(pair) != 2 or not all(map(str.strip, pair)) for pair in pairs) or len(parsed) < len(pairs):
        raise ValueError(f"species {species!r}: write each symbol once, as H:myH,C:myC.")
    return parsed


def check_known(known: Sequence[str], structures: Sequence[Atoms]) -> None:
    """Refuse structures with elements that a model does not know, before any graph is made.

    Args:
        known: symbols of the elements that the model knows.
        structures: of any number.

    Raises:
        ValueError: naming the first such structure and its elements.
    """
    for frame, atoms in enumerate(structures):
        if unknown := sorted(set(atoms.get_chemical_symbols()) - set(known)):
            raise ValueError(
                f"structure {frame} ({atoms.get_chemical_formula()}) has {', '.join(unknown)}, which the model does "
                f"not know; its elements are {', '.join(known)}."
            )


def check_calibration(elements: Sequence[str], structures: Sequence[Atoms]) -> None:
    """Refuse elements other than those of the calibration data.

    An element that no structure holds would be rounded unseen, and no gate would measure it.

    Args:
        elements: symbols that the model shall keep.
        structures: for calibration; none is right for presets that need none.

    Raises:
        ValueError: naming the elements that only one side has.
    """
    if not structures:
        return
    present = {symbol for atoms in structures for symbol in atoms.get_chemical_symbols()}
    if left_out := sorted(present - set(elements)):
        raise ValueError(
            f"elements: the calibration data also hold {', '.join(left_out)}; name these elements too, or leave those "
            "structures out."
        )
    if unseen := [symbol for symbol in elements if symbol not in present]:
        raise ValueError(
            f"elements: no calibration structure holds {', '.join(unseen)}; add structures that do, or name only "
            f"{', '.join(symbol for symbol in elements if symbol in present)}."
        )
