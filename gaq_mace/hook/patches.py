"""What the hook changes in MACE, and nothing else.

==========================  ==============================================================
``build_default_arg_parser``  learns ``--quantization`` and refuses what cannot go with it; knows our
                              interaction block by its name
``get_params_options``        the last point before the optimizer: quantizers are inserted
``train``                     activation ranges are calibrated before the first epoch; weights trained in float are
                              rounded after each checkpoint that is loaded when training is over
``train_one_epoch``           the schedule of the branches; the equivariance loss
``extract_config_mace_model`` names MACE's own class of a block whose density is rounded
``create_error_table``        prints the same weights without quantization beside the table
``run_train.run``             compresses the files of the run when it is over
``MACE.__setstate__``         a packed file gets its quantizers back on load
``_atoms_to_batch``           the calculator keeps the neighbour lists of accelerated models over some steps
==========================  ==============================================================

Without the key ``quantization``, that name and quantized models each of them is the original. Imports stay inside the
functions: this module is loaded while MACE's own are half imported.
"""

from __future__ import annotations

import argparse
import functools
import logging
import sys
from types import ModuleType
from typing import Any

from gaq_mace.names import ATTENTION, PACKED, PATCHED, RUN_TRAIN, TARGETS


def apply(module: ModuleType) -> None:
    """Patch one of the modules named in `gaq_mace.names.TARGETS`, once."""
    if getattr(module, PATCHED, False):
        return
    _PATCHES[module.__name__](module)
    setattr(module, PATCHED, True)


def ensure_installed() -> None:
    """Patch MACE now, whether or not torch's autoload ran (it can be switched off)."""
    from importlib import import_module

    import_module("mace")
    for name in TARGETS:
        # The command itself takes long to import, and only a process that trains needs it.
        module = sys.modules.get(name) if name == RUN_TRAIN else import_module(name)
        if module is not None:
            apply(module)
    # Names bound elsewhere before a late patch: `mace.tools` re-exports some.
    _copy_names("mace.tools.arg_parser", "mace.tools", "build_default_arg_parser")
    _copy_names("mace.tools.train", "mace.tools", "train")
    if RUN_TRAIN in sys.modules:
        _copy_names("mace.tools.scripts_utils", RUN_TRAIN, "get_params_options", "extract_config_mace_model")
        _copy_names("mace.tools.tables_utils", RUN_TRAIN, "create_error_table")


def _copy_names(source: str, target: str, *names: str) -> None:
    """Give a loaded module the functions that another one has by these names."""
    for name in names:
        setattr(sys.modules[target], name, getattr(sys.modules[source], name))


class QuantizationArgument(str):
    """The text of ``--quantization``, which MACE writes to its logs, and the configuration it was read as.

    Raises:
        argparse.ArgumentTypeError: for text that is no configuration; argparse turns it into its own error.
    """

    config: Any

    def __new__(cls, text: str) -> QuantizationArgument:
        from gaq.config.parse import ConfigError, parse_config

        made = super().__new__(cls, text)
        try:
            made.config = parse_config(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return made


INCOMPATIBLE = {
    "enable_cueq": "cuEquivariance replaces the modules to be quantized, and MACE rebuilds the model at the end",
    "only_cueq": "cuEquivariance replaces the modules to be quantized",
    "enable_oeq": "OpenEquivariance replaces the modules to be quantized, and MACE rebuilds the model at the end",
    "lora": "rounding the two parts of a LoRA layer is not rounding their sum",
}
SUPPORTED_MODELS = ("MACE", "ScaleShiftMACE")


def _use_attention(parser: argparse.ArgumentParser, namespace: argparse.Namespace) -> None:
    for option in ("enable_cueq", "only_cueq", "enable_oeq"):
        if getattr(namespace, option, False):
            parser.error(f"interaction {ATTENTION} cannot be combined with {option}: there is no such kernel.")
    from gaq_mace import attention

    attention.register()


def _patch_arg_parser(module: Any) -> None:
    original = module.build_default_arg_parser

    @functools.wraps(original)
    def build_default_arg_parser() -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = original()
        parser.add_argument(
            "--quantization",
            type=QuantizationArgument,
            default=None,
            env_var="GAQ_QUANTIZATION",
            help="quantization by gaq: a preset (gaq, w8, w4, ...) or a mapping",
        )
        for action in parser._actions:
            if action.dest in ("interaction", "interaction_first") and action.choices is not None:
                action.choices = [*action.choices, ATTENTION]
        parse = parser.parse_args

        def parse_args(*args: Any, **kwargs: Any) -> argparse.Namespace:
            namespace = parse(*args, **kwargs)
            if ATTENTION in (namespace.interaction, namespace.interaction_first):
                _use_attention(parser, namespace)
            if namespace.quantization is not None:
                for option, reason in INCOMPATIBLE.items():
                    if getattr(namespace, option, False):
                        parser.error(f"quantization cannot be combined with {option}: {reason}. Remove {option}.")
                if namespace.model not in SUPPORTED_MODELS:
                    parser.error(
                        f"quantization does not support model: {namespace.model}; "
                        f"supported are {' and '.join(SUPPORTED_MODELS)}."
                    )
            return namespace

        parser.parse_args = parse_args  # type: ignore[method-assign,assignment]  # of this one parser
        return parser

    module.build_default_arg_parser = build_default_arg_parser


def _patch_scripts_utils(module: Any) -> None:
    original = module.get_params_options

    @functools.wraps(original)
    def get_params_options(args: argparse.Namespace, model: Any) -> Any:
        spec = getattr(args, "quantization", None)
        if ATTENTION in (getattr(args, "interaction", None), getattr(args, "interaction_first", None)):
            logging.warning(
                f"{ATTENTION} belongs to gaq: the models of this run can be loaded only where gaq is installed."
            )
        from gaq_mace.files import is_packed

        packed = is_packed(getattr(args, "foundation_model", None))
        if packed and spec is None:
            logging.warning(
                f"The foundation model {args.foundation_model} is quantized. Its rounded weights are a starting point "
                "only: without the key `quantization` this run trains a float model."
            )
        if spec is not None:
            from gaq.config.parse import parse_config
            from gaq_mace.training import start, writes

            writes(args.name, args.model_dir, args.checkpoints_dir)
            try:
                # Arguments that did not come through the parser have not been read yet.
                start(model, spec.config if isinstance(spec, QuantizationArgument) else parse_config(spec))
            except ValueError as error:
                logging.error(str(error))
                print(f"mace_run_train: error: {error}", file=sys.stderr)
                raise SystemExit(2) from error
            if packed:
                logging.warning(
                    f"The foundation model {args.foundation_model} is quantized: training starts from its rounded "
                    "weights. The float model it was made from is the better start, if you have it."
                )
        return original(args, model)

    module.get_params_options = get_params_options
    original_config = module.extract_config_mace_model

    @functools.wraps(original_config)
    def extract_config_mace_model(model: Any) -> dict[str, Any]:
        config: dict[str, Any] = original_config(model)
        # Where they were never imported there is no class of ours.
        classes: Any = sys.modules.get("gaq_mace.layers")
        if classes is not None:
            for key in ("interaction_cls", "interaction_cls_first"):
                if key in config:
                    config[key] = classes.original_type(config[key])
        return config

    module.extract_config_mace_model = extract_config_mace_model


def _patch_train(module: Any) -> None:
    original_train = module.train
    original_epoch = module.train_one_epoch

    @functools.wraps(original_train)
    def train(*args: Any, **kwargs: Any) -> Any:
        from gaq_mace import training

        return training.run(original_train, *args, **kwargs)

    @functools.wraps(original_epoch)
    def train_one_epoch(*args: Any, **kwargs: Any) -> Any:
        from gaq_mace import training

        return training.run_epoch(original_epoch, *args, **kwargs)

    module.train = train
    module.train_one_epoch = train_one_epoch


def _patch_tables(module: Any) -> None:
    original = module.create_error_table

    @functools.wraps(original)
    def create_error_table(*args: Any, **kwargs: Any) -> Any:
        from gaq_mace import training

        return training.error_table(original, *args, **kwargs)

    module.create_error_table = create_error_table


def _patch_run_train(module: Any) -> None:
    original = module.run

    @functools.wraps(original)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        finally:
            # Where it was never imported nothing was quantized.
            training = sys.modules.get("gaq_mace.training")
            if training is not None:
                training.compress_written()  # type: ignore[attr-defined]

    module.run = run


def _patch_models(module: Any) -> None:
    def __setstate__(self: Any, state: dict[str, Any]) -> None:
        import torch

        torch.nn.Module.__setstate__(self, state)
        payload = self.__dict__.pop(PACKED, None)
        if payload is not None:
            from gaq_mace.files import restore_from_pickle

            restore_from_pickle(self, payload)

    module.MACE.__setstate__ = __setstate__


def _patch_calculator(module: Any) -> None:
    original = module.MACECalculator._atoms_to_batch

    @functools.wraps(original)
    def _atoms_to_batch(self: Any, atoms: Any) -> Any:
        # Where it was never imported no model is quantized or accelerated.
        if "gaq_mace.engine" not in sys.modules:
            return original(self, atoms)
        from gaq_mace import neighbours

        return neighbours.atoms_to_batch(self, atoms, original)

    module.MACECalculator._atoms_to_batch = _atoms_to_batch


_PATCHES = {
    "mace.calculators.mace": _patch_calculator,
    "mace.cli.run_train": _patch_run_train,
    "mace.modules.models": _patch_models,
    "mace.tools.arg_parser": _patch_arg_parser,
    "mace.tools.scripts_utils": _patch_scripts_utils,
    "mace.tools.tables_utils": _patch_tables,
    "mace.tools.train": _patch_train,
}
