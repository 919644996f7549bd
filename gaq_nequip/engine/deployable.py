"""A NequIP model as `gaq deploy` writes it: its program for parts of space, and its radial functions."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import torch

from gaq.deployed.form import Deployable, DeployedLayer
from gaq.kernels.problem import ConvolutionProblem
from gaq.model.state import state_of
from gaq.untyped import AnyModule
from gaq_nequip import files, model
from gaq_nequip.engine.programs import Unsupported, program_of
from gaq_nequip.freeze import freeze
from gaq_nequip.sites import class_name
from gaq_nequip.species import species_of, type_names

__all__ = ["deployable"]


def deployable(subject: AnyModule, elements: Sequence[str], dtype: torch.dtype) -> Deployable:
    """Make what a deployed file holds.

    Args:
        subject: a `NequIPGNNModel` on the CPU, float or converted.
        elements: chemical symbols that the file is to know, which are all of the model's.
        dtype: in which it computes.

    Raises:
        ValueError: for models of which some module has no operation, for compiled files, for some of the elements
            only, and where it is not clear which element a type is.
    """
    if isinstance(subject, files.CompiledModel):
        raise ValueError("a compiled file cannot be deployed; give the checkpoint or package that it was made of.")
    symbols = _symbols(subject)
    if set(elements) != set(symbols):
        raise ValueError(f"--elements: NequIP models are deployed with all of their elements, {', '.join(symbols)}.")
    if subject.model_dtype != dtype:
        if dtype != torch.float64:
            raise ValueError("the model computes in float64: deploy it with --dtype float64.")
        subject = model.in_float64(subject)
    state = state_of(subject)
    if state is not None and state.status == "training":  # as checkpoints are, whose training has ended
        subject = freeze(copy.deepcopy(subject), fold=False)
    try:
        made = program_of(subject, parts=True)
    except Unsupported as error:
        advice = " Allegro models are compiled by nequip-deploy, for pair_style allegro on any number of ranks."
        raise ValueError(f"the model cannot be deployed: {error}.{advice if _is_allegro(subject) else ''}") from error
    layers = [
        DeployedLayer(_from_the_sender(problem), functions.tables, functions.last)
        for problem, functions in zip(made.problems, made.radials, strict=True)
    ]
    return Deployable(
        made.recorded, layers, made.pairs.contiguous(), symbols, ["default"], made.r_max, made.shifts[None]
    )


def _from_the_sender(problem: ConvolutionProblem) -> ConvolutionProblem:
    """The convolution over vectors from sender to receiver: harmonics of odd degree change their sign."""
    turned = tuple(-of_degree if degree % 2 else of_degree for degree, of_degree in enumerate(problem.harmonics))
    return dataclasses.replace(problem, harmonics=turned, plans={}, sources={})


def _symbols(subject: AnyModule) -> list[str]:
    """Chemical symbol of each of a model's types.

    Raises:
        ValueError: if no symbol stands for a type, or several do.
    """
    species, found = species_of(subject), []
    for name in type_names(subject):
        symbols = [symbol for symbol, of_type in species.items() if of_type == name]
        if len(symbols) != 1:
            raise ValueError(f"the type {name} of the model stands for {', '.join(symbols) or 'no element'}: give one.")
        found += symbols
    return found


def _is_allegro(subject: AnyModule) -> bool:
    return any(class_name(module).startswith("Allegro") for module in subject.modules())
