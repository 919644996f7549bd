"""The functions of MACE that the hook replaces, and the check that the installed MACE still has them."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import sys
from dataclasses import dataclass
from types import ModuleType

from gaq_mace.names import RUN_TRAIN

__all__ = ["ARG_PARSER", "SUPPORTED_MACE", "TARGETS", "Target", "advice", "problems", "problems_in"]

ARG_PARSER = "mace.tools.arg_parser"

SUPPORTED_MACE = "mace-torch>=0.3.16,<0.4"
"""The versions of MACE whose functions the hook knows, as in the extra ``mace`` of pyproject.toml."""


@dataclass(frozen=True)
class Target:
    """A function of MACE that the hook replaces.

    Attributes:
        module: dotted name of the module.
        path: of the function in the module, such as ``MACECalculator._atoms_to_batch``.
        parameters: names of those that the replacement reads or passes on by name.
        needed_to_train: whether training with the key ``quantization`` is wrong without the replacement.
    """

    module: str
    path: str
    parameters: tuple[str, ...] = ()
    needed_to_train: bool = True

    def problem_in(self, module: ModuleType) -> str | None:
        """What keeps the hook from replacing the function: None if nothing does."""
        function: object = module
        for name in self.path.split("."):
            function = getattr(function, name, None)
        if not callable(function):
            return f"{self.module}.{self.path} is missing"
        try:
            parameters = inspect.signature(function).parameters
        except (TypeError, ValueError):
            return f"{self.module}.{self.path} does not say which parameters it takes"
        if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
            return None
        lost = [name for name in self.parameters if name not in parameters]
        return f"{self.module}.{self.path} has no parameter {', '.join(lost)}" if lost else None


TARGETS = (
    Target(ARG_PARSER, "build_default_arg_parser"),
    Target("mace.tools.scripts_utils", "get_params_options", ("args", "model")),
    Target("mace.tools.scripts_utils", "extract_config_mace_model", ("model",)),
    Target(
        "mace.tools.train",
        "train",
        ("model", "train_loader", "device", "start_epoch", "max_num_epochs", "checkpoint_handler"),
    ),
    Target(
        "mace.tools.train",
        "train_one_epoch",
        ("model", "loss_fn", "data_loader", "optimizer", "epoch", "ema", "device", "distributed"),
    ),
    Target("mace.tools.tables_utils", "create_error_table", ("model", "log_wandb")),
    Target(RUN_TRAIN, "run"),
    Target("mace.modules.models", "MACE.__setstate__", ("state",)),
    Target("mace.calculators.mace", "MACECalculator.__init__", needed_to_train=False),
    Target("mace.calculators.mace", "MACECalculator._atoms_to_batch", ("atoms",), needed_to_train=False),
    Target("mace.calculators.mace", "MACECalculator.calculate", needed_to_train=False),
)


def problems_in(module: ModuleType) -> list[str]:
    """What keeps the hook from patching a module of MACE; empty if nothing does.

    A patched module has no problems: replacements keep the signature of the original.
    """
    problems = [target.problem_in(module) for target in TARGETS if target.module == module.__name__]
    return [problem for problem in problems if problem is not None]


def problems(only_training: bool = False) -> list[str]:
    """What keeps the hook from patching MACE as a whole; imports the modules that are not loaded yet.

    Args:
        only_training: leave out the targets that training does not need.
    """
    listed = []
    for target in TARGETS:
        if only_training and not target.needed_to_train:
            continue
        try:
            module = sys.modules.get(target.module) or importlib.import_module(target.module)
        except ImportError as error:
            listed.append(f"{target.module}.{target.path} is missing ({error})")
            continue
        if (problem := target.problem_in(module)) is not None:
            listed.append(problem)
    return listed


def advice(listed: list[str]) -> str:
    """The sentence for users whose MACE has moved what the hook patches."""
    try:
        version = importlib.metadata.version("mace-torch")
    except importlib.metadata.PackageNotFoundError:
        version = "of an unknown version"
    return (
        f"the installed mace-torch {version} has moved what gaq patches: {'; '.join(listed)}. "
        f'Supported is {SUPPORTED_MACE}: pip install "{SUPPORTED_MACE}"'
    )
