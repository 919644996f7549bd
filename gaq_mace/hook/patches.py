"""What the hook changes in MACE, and nothing else.

==============================  =======================================================================================
``build_default_arg_parser``    learns ``--quantization``, refuses options that cannot go with it, and knows our
                                interaction block by its name
``get_params_options``          the last point before the optimizer is made: inserts the quantizers
``train``                       calibrates activation ranges before the first epoch; once training is over, MACE loads
                                checkpoints of this run only, and weights that were trained in float are rounded
``train_one_epoch``             applies the schedule of the branches and the equivariance loss
``extract_config_mace_model``   gives MACE's own class for an interaction block whose density is rounded
``create_error_table``          logs the errors of the same weights without quantization beside the table
``run_train.run``               compresses the model files when the run is over
``MACE.__setstate__``           puts the quantizers back when a packed file is loaded
``_atoms_to_batch``             keeps the neighbour lists of accelerated models over some steps
``MACECalculator``              its constructor and ``calculate`` may run in several threads
==============================  =======================================================================================

Without the key ``quantization``, that block and quantized models, each of them does what the original does.
`gaq_mace.hook.targets` says what each must look like: where MACE has moved one, its module is left as it is.
Imports stay inside the functions, because MACE's modules are half imported when this one is loaded.
"""

from __future__ import annotations

import argparse
import functools
import logging
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from gaq.untyped import AnyModule, Batch, Calculator, Document, Patched
from gaq_mace.hook import targets
from gaq_mace.names import ATTENTION, CONSTRUCTOR, PACKED, PATCHED, RUN_TRAIN, TARGETS

if TYPE_CHECKING:
    from ase import Atoms

    from gaq.config.schema import QuantizationConfig


def apply(module: ModuleType) -> None:
    """Patch one of the modules named in `gaq_mace.names.TARGETS`, once; leave it as it is if a target has moved."""
    if getattr(module, PATCHED, False):
        return
    if not targets.problems_in(module):
        _PATCHES[module.__name__](module)
        setattr(module, PATCHED, True)
    if module.__name__ == RUN_TRAIN:
        _announce_missing_parser()


def _announce_missing_parser() -> None:
    """Tell a process that trains why MACE is about to refuse the key ``quantization``."""
    parser = sys.modules.get(targets.ARG_PARSER)
    if parser is not None and (problems := targets.problems_in(parser)):
        print(f"gaq: the key `quantization` is not known here: {targets.advice(problems)}", file=sys.stderr)


def ensure_installed() -> None:
    """Patch MACE now, whether or not torch's autoload ran (it can be switched off)."""
    from importlib import import_module

    import_module("mace")
    for name in TARGETS:
        # Only a process that trains needs the command itself.
        if name == RUN_TRAIN and name not in sys.modules:
            continue
        try:
            module = import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            continue  # MACE has moved it; `targets.problems` names it
        apply(module)
    # Names bound elsewhere before a late patch: `mace.tools` re-exports some.
    _copy_names("mace.tools.arg_parser", "mace.tools", "build_default_arg_parser")
    _copy_names("mace.tools.train", "mace.tools", "train")
    _copy_names("mace.tools.scripts_utils", RUN_TRAIN, "get_params_options", "extract_config_mace_model")
    _copy_names("mace.tools.tables_utils", RUN_TRAIN, "create_error_table")


def _copy_names(source: str, target: str, *names: str) -> None:
    """Give a loaded module the functions that a patched one has by these names."""
    patched = sys.modules.get(source)
    if target in sys.modules and getattr(patched, PATCHED, False):
        for name in names:
            setattr(sys.modules[target], name, getattr(patched, name))


class QuantizationArgument(str):
    """The text of ``--quantization``, which MACE writes to its logs, with the configuration it stands for.

    Raises:
        argparse.ArgumentTypeError: if the text is no configuration; argparse turns it into its own error.
    """

    config: QuantizationConfig

    def __new__(cls, text: str) -> QuantizationArgument:
        from gaq.config.parse import ConfigError, parse_config

        argument = super().__new__(cls, text)
        try:
            argument.config = parse_config(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return argument


INCOMPATIBLE = {
    "enable_cueq": "cuEquivariance replaces the modules to be quantized, and MACE rebuilds the model at the end",
    "only_cueq": "cuEquivariance replaces the modules to be quantized",
    "enable_oeq": "OpenEquivariance replaces the modules to be quantized, and MACE rebuilds the model at the end",
    "lora": "rounding the two parts of a LoRA layer is not rounding their sum",
}
SUPPORTED_MODELS = ("MACE", "ScaleShiftMACE")


def _use_attention(parser: argparse.ArgumentParser, namespace: argparse.Namespace) -> None:
    """Make our interaction block known to MACE, or end the command where the block cannot run."""
    for option in ("enable_cueq", "only_cueq", "enable_oeq"):
        if getattr(namespace, option, False):
            parser.error(f"interaction {ATTENTION} cannot be combined with {option}: there is no such kernel.")
    from gaq_mace import attention

    attention.register()


def _check_quantization(parser: argparse.ArgumentParser, namespace: argparse.Namespace) -> None:
    """End the command where the key ``quantization`` cannot be followed."""
    if problems := targets.problems(only_training=True):
        parser.error(f"quantization is not possible: {targets.advice(problems)}")
    for option, reason in INCOMPATIBLE.items():
        if getattr(namespace, option, False):
            parser.error(f"quantization cannot be combined with {option}: {reason}. Remove {option}.")
    if namespace.model not in SUPPORTED_MODELS:
        parser.error(
            f"quantization does not support model: {namespace.model}; supported are {' and '.join(SUPPORTED_MODELS)}."
        )
    from gaq.config.parse import ConfigError
    from gaq.training.schedule import check_reached

    try:
        check_reached(namespace.quantization.config, namespace.max_num_epochs)
    except ConfigError as error:
        parser.error(str(error))


def _patch_arg_parser(module: Patched) -> None:
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
                _check_quantization(parser, namespace)
            return namespace

        parser.parse_args = parse_args  # type: ignore[method-assign,assignment]  # of this one parser
        return parser

    module.build_default_arg_parser = build_default_arg_parser


def _end(error: ValueError) -> NoReturn:
    """End the command with a reason."""
    logging.error(str(error))
    print(f"mace_run_train: error: {error}", file=sys.stderr)
    raise SystemExit(2) from error


def _ending_on(kind: type[ValueError], function: Callable[..., object]) -> Callable[..., object]:
    """A function that ends the command with the reason where it raises an error of that kind."""

    @functools.wraps(function)
    def call(*args: object, **kwargs: object) -> object:
        try:
            return function(*args, **kwargs)
        except kind as error:
            _end(error)

    return call


def _insert_quantizers(args: argparse.Namespace, model: AnyModule, key: str, packed: bool) -> None:
    """Make the model of a run a quantized one, or end the command with the reason.

    Args:
        args: of the run.
        model: of the run, in float.
        key: the key ``quantization``.
        packed: whether the foundation model is quantized already.
    """
    from mace.tools import get_tag

    from gaq.config.parse import parse_config
    from gaq_mace.checkpoints import check_restart
    from gaq_mace.training import start, writes

    writes(args.name, args.model_dir, args.checkpoints_dir)
    try:
        # Arguments that did not come through the parser have not been read yet.
        config = key.config if isinstance(key, QuantizationArgument) else parse_config(key)
        start(model, config, epochs=args.max_num_epochs)
        if args.restart_latest:
            check_restart(model, args.checkpoints_dir, get_tag(args.name, args.seed))
    except ValueError as error:
        _end(error)
    if packed:
        logging.warning(
            f"The foundation model {args.foundation_model} is quantized: training starts from its rounded "
            "weights. The float model it was made from is the better start, if you have it."
        )


def _with_quantizers(original: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(original)
    def get_params_options(args: argparse.Namespace, model: AnyModule) -> object:
        key = getattr(args, "quantization", None)
        if ATTENTION in (getattr(args, "interaction", None), getattr(args, "interaction_first", None)):
            logging.warning(
                f"{ATTENTION} belongs to gaq: the models of this run can be loaded only where gaq is installed."
            )
        from gaq_mace.files import is_packed

        packed = is_packed(getattr(args, "foundation_model", None))
        if key is not None:
            _insert_quantizers(args, model, key, packed)
        elif packed:
            logging.warning(
                f"The foundation model {args.foundation_model} is quantized. Its rounded weights are a starting point "
                "only: without the key `quantization` this run trains a float model."
            )
        return original(args, model)

    return get_params_options


def _with_original_blocks(original: Callable[..., Document]) -> Callable[..., Document]:
    @functools.wraps(original)
    def extract_config_mace_model(model: AnyModule) -> Document:
        config = original(model)
        # If the module was never imported, no class of ours is in the model.
        layers = sys.modules.get("gaq_mace.layers")
        if layers is not None:
            for key in ("interaction_cls", "interaction_cls_first"):
                if key in config:
                    config[key] = layers.original_type(config[key])
        return config

    return extract_config_mace_model


def _patch_scripts_utils(module: Patched) -> None:
    module.get_params_options = _with_quantizers(module.get_params_options)
    module.extract_config_mace_model = _with_original_blocks(module.extract_config_mace_model)


def _patch_train(module: Patched) -> None:
    original_train = module.train
    original_epoch = module.train_one_epoch

    @functools.wraps(original_train)
    def train(*args: object, **kwargs: Any) -> object:
        from gaq_mace import training
        from gaq_mace.checkpoints import CheckpointError
        from gaq_mace.root import OtherSettingsError, is_quantized

        try:
            result = training.run(original_train, *args, **kwargs)
        except OtherSettingsError as error:
            _end(error)
        if is_quantized(kwargs["model"]):
            handler = kwargs["checkpoint_handler"]
            handler.load_latest = _ending_on(CheckpointError, handler.load_latest)
        return result

    @functools.wraps(original_epoch)
    def train_one_epoch(*args: object, **kwargs: object) -> object:
        from gaq_mace import training

        return training.run_epoch(original_epoch, *args, **kwargs)

    module.train = train
    module.train_one_epoch = train_one_epoch


def _patch_tables(module: Patched) -> None:
    original = module.create_error_table

    @functools.wraps(original)
    def create_error_table(*args: object, **kwargs: object) -> object:
        from gaq_mace import training

        return training.error_table(original, *args, **kwargs)

    module.create_error_table = create_error_table


def _patch_run_train(module: Patched) -> None:
    original = module.run

    @functools.wraps(original)
    def run(*args: object, **kwargs: object) -> object:
        try:
            return original(*args, **kwargs)
        finally:
            # If the module was never imported, nothing was quantized.
            training = sys.modules.get("gaq_mace.training")
            if training is not None:
                training.compress_written()

    module.run = run


def _patch_models(module: Patched) -> None:
    original = module.MACE.__setstate__

    @functools.wraps(original)
    def __setstate__(self: AnyModule, state: Document) -> None:
        original(self, state)
        payload = self.__dict__.pop(PACKED, None)
        if payload is not None:
            from gaq_mace.files import restore_from_pickle

            restore_from_pickle(self, payload)

    def construct(**options: Any) -> AnyModule:
        from gaq_mace import deferred

        return deferred.construct(module.ScaleShiftMACE, **options)

    module.MACE.__setstate__ = __setstate__
    setattr(module, CONSTRUCTOR, construct)


def _patch_calculator(module: Patched) -> None:
    """Keep neighbour lists, and let calculators be made and run in threads.

    A calculator computes in torch's default dtype, which its constructor sets, and which loading a packed model changes
    for a moment.
    """
    calculator = module.MACECalculator
    construct, batch_of, calculate_stock = calculator.__init__, calculator._atoms_to_batch, calculator.calculate

    @functools.wraps(construct)
    def __init__(self: Calculator, *args: Any, **kwargs: Any) -> None:
        from gaq.process import alone

        with alone():
            construct(self, *args, **kwargs)

    def dtype_of(calculator: Calculator) -> AbstractContextManager[None]:
        import torch

        from gaq.process import default_dtype

        return default_dtype({"float64": torch.float64, "float32": torch.float32}[calculator.default_dtype])

    @functools.wraps(batch_of)
    def _atoms_to_batch(self: Calculator, atoms: Atoms) -> Batch:
        with dtype_of(self):
            # If the module was never imported, no model is quantized or accelerated.
            if "gaq_mace.engine" not in sys.modules:
                return batch_of(self, atoms)
            from gaq_mace import neighbours

            return neighbours.atoms_to_batch(self, atoms, batch_of)

    @functools.wraps(calculate_stock)
    def calculate(self: Calculator, *args: Any, **kwargs: Any) -> None:
        with dtype_of(self):
            calculate_stock(self, *args, **kwargs)

    calculator.__init__, calculator._atoms_to_batch, calculator.calculate = __init__, _atoms_to_batch, calculate


_PATCHES = {
    "mace.calculators.mace": _patch_calculator,
    "mace.cli.run_train": _patch_run_train,
    "mace.modules.models": _patch_models,
    "mace.tools.arg_parser": _patch_arg_parser,
    "mace.tools.scripts_utils": _patch_scripts_utils,
    "mace.tools.tables_utils": _patch_tables,
    "mace.tools.train": _patch_train,
}
