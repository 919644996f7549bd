"""Quantization-aware training inside the stock `mace_run_train`: what the functions of the hook do."""

from __future__ import annotations

import atexit
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import mace  # noqa: F401  (before e3nn)
import torch
from torch import Tensor

from gaq.checks.rotations import random_rotation
from gaq.config.parse import CalibrationConfig, QuantizationConfig
from gaq.model.state import TRAINED, feature_quantizers, require_state, round_weights, state_of, unquantized
from gaq.model.summary_table import format_rows
from gaq.quantizers.features import OBSERVER_DECAY
from gaq.training.averaging import averaging_deployed
from gaq.training.ptq import RANGE_ATOMS, check_weights, round_at_end
from gaq.training.sampling import choose
from gaq.training.schedule import (
    DEPLOYED,
    branch_state,
    check_reached,
    describe_branches,
    describe_schedule,
    never_reached,
    noted_schedule,
    set_branches,
    settle_schedule,
)
from gaq.untyped import Batch, Loader, Patched, Structure
from gaq_mace.adapter import MACEAdapter
from gaq_mace.checkpoints import checkpoints_in, load_own
from gaq_mace.evaluate import collated
from gaq_mace.files import compress_packed
from gaq_mace.model import prepare, search_ranges
from gaq_mace.root import OtherSettingsError, is_quantized
from gaq_mace.summary import rows
from gaq_mace.weights import weight_quantizers

__all__ = ["EquivarianceLoss", "error_table", "finish", "run", "run_epoch", "set_branches", "start"]


def start(model: torch.nn.Module, config: QuantizationConfig, epochs: int | None = None) -> None:
    """Insert quantizers into a float model before the optimizer is made, and log what is quantized.

    Args:
        model: of the run, in float.
        config: from the key ``quantization``.
        epochs: length of the run.

    Raises:
        ValueError: if the model is quantized already or cannot be, or the configuration cannot be followed.
    """
    check_reached(config, epochs)
    if is_quantized(model):
        raise ValueError(
            "this model is already quantized: train the float model it was made from, or remove the key `quantization`."
        )
    prepare(model, config)
    logging.info("===========QUANTIZATION===========")
    first, *schedule = describe_schedule(require_state(model).config)
    logging.info(first)
    logging.info("Quantized layers:\n" + format_rows(rows(model, bystanders=False)))
    for line in schedule:
        logging.info(line)


def refresh_scales(model: torch.nn.Module) -> None:
    """Compute the scales of all weights again from the weights as they are now."""
    parameters = dict(model.named_parameters())
    for name, quantizer in weight_quantizers(model).items():
        quantizer.refresh_scale(parameters[name])


@torch.no_grad()
def calibrate_on_dataset(
    model: torch.nn.Module, dataset: Sequence[Structure], frames: int, seed: int, device: torch.device
) -> int:
    """Observe activation ranges on structures of a MACE dataset.

    Args:
        model: prepared for quantization.
        dataset: of MACE's graphs.
        frames: number of structures to use, if there are as many.
        seed: of the choice of structures.
        device: of the model.

    Returns:
        The number of structures that were used.
    """
    quantizers = feature_quantizers(model).values()
    chosen = choose(dataset, frames, seed)
    with unquantized(model):
        for quantizer in quantizers:
            quantizer.start_observing()
        for batch in _TrainingData(device).batches(model, chosen, RANGE_ATOMS):
            model(batch, training=False, compute_force=False)
    for quantizer in quantizers:
        quantizer.observing = False
        quantizer.decay = OBSERVER_DECAY
    return len(chosen)


class _TrainingData(MACEAdapter):
    """The adapter for structures that are MACE's own graphs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def sizes(self, structures: Sequence[Structure]) -> list[int]:
        return [int(graph.num_nodes) for graph in structures]

    def batches(self, model: torch.nn.Module, structures: Sequence[Structure], atoms: int) -> list[Batch]:
        return collated(structures, atoms, self.device)


def _calibrate(model: torch.nn.Module, calibration: CalibrationConfig, loader: Loader, device: torch.device) -> int:
    return calibrate_on_dataset(model, loader.dataset, calibration.frames, calibration.seed, device)


def run(original: Callable[..., object], *args: object, **kwargs: Any) -> object:
    """Run `mace.tools.train` with calibration before the first epoch and frozen ranges after the last.

    Raises:
        gaq_mace.root.OtherSettingsError: if the run was to go on from a checkpoint of other settings.

    When training is over, MACE loads the weights that it evaluates and saves; see `gaq_mace.checkpoints.load_own`.
    """
    model = kwargs["model"]
    state = state_of(model)
    if state is None:
        return original(*args, **kwargs)
    if state.conflict:
        raise OtherSettingsError(state.conflict)
    at_end = state.config.rounds_weights_at_end
    state.notes[TRAINED] = True
    if state.resumed:
        logging.info("Quantization ranges taken from the checkpoint")
    else:
        # MACE may have loaded a float checkpoint after the quantizers were made.
        search_ranges(model)
        if feature_quantizers(model):
            used = _calibrate(model, state.config.calibration, kwargs["train_loader"], kwargs["device"])
            logging.info(f"Activation ranges calibrated on {used} training structures")
    handler, epochs = kwargs["checkpoint_handler"], kwargs["max_num_epochs"]
    earlier = checkpoints_in(handler.io.directory, handler.io.tag)
    schedule = settle_schedule(state, kwargs["start_epoch"], epochs)
    logging.info(describe_branches(state.config, schedule, epochs))
    set_branches(model, DEPLOYED, observing=False)
    round_weights(model, not at_end)
    try:
        result = original(*args, **kwargs)
    finally:
        round_weights(model, True)
        set_branches(model, DEPLOYED, observing=False)
    if state.last_epoch >= 0 and (warning := never_reached(schedule, state.last_epoch)):
        logging.warning(warning)
    load_own(handler, model, earlier, state.resumed or kwargs["start_epoch"] > 0)
    if at_end:
        round_after_loading(handler, model, kwargs["train_loader"].dataset, kwargs["device"])
    return result


def round_after_loading(
    handler: Patched, model: torch.nn.Module, dataset: Sequence[Structure], device: torch.device
) -> None:
    """Call `finish` after each checkpoint that is loaded from now on.

    When training is over, MACE loads the weights that it evaluates and saves: the best ones of each stage.

    Args:
        handler: the run's `CheckpointHandler`; its ``load_latest`` is replaced.
        model: of the run, with weights trained in float.
        dataset: the training structures, as MACE's graphs.
        device: of the model.
    """
    load_latest = handler.load_latest

    @functools.wraps(load_latest)
    def load_and_finish(*args: object, **kwargs: object) -> object:
        epoch = load_latest(*args, **kwargs)
        finish(model, dataset, device)
        return epoch

    handler.load_latest = load_and_finish


def finish(model: torch.nn.Module, dataset: Sequence[Structure], device: torch.device) -> None:
    """Round weights that were trained in float, by calibration on the training structures."""
    _check_weights(model, dataset)
    search_ranges(model)
    with torch.enable_grad():
        for line in round_at_end(_TrainingData(device), model, dataset, require_state(model).config):
            logging.info(line)


def _check_weights(model: torch.nn.Module, dataset: Sequence[Structure]) -> None:
    """See `gaq.training.ptq.check_weights`; MACE itself goes on and saves a model of NaN."""
    check_weights(dict(model.named_parameters()), (graph.to_dict() for graph in dataset))


def run_epoch(original: Callable[..., object], *args: object, **kwargs: Any) -> object:
    """Run `train_one_epoch` under the schedule of the branches; validation afterwards sees the deployed form."""
    model = kwargs["model"]
    state = state_of(model)
    if state is None:
        return original(*args, **kwargs)
    _check_weights(model, kwargs["data_loader"].dataset)
    epoch = state.last_epoch = kwargs["epoch"]
    schedule = noted_schedule(state)
    if epoch == schedule.start:
        logging.info(f"Epoch {epoch}: vectors are rounded from now on")
    loss = state.config.equivariance_loss
    if loss.weight > 0:
        kwargs["loss_fn"] = EquivarianceLoss(kwargs["loss_fn"], model, loss.weight, loss.rotations)
    line_search = isinstance(kwargs["optimizer"], torch.optim.LBFGS)
    if line_search and feature_quantizers(model):
        # A line search needs the same function at every step: ranges move between epochs only.
        _calibrate(model, state.config.calibration, kwargs["data_loader"], kwargs["device"])
    refresh_scales(model)
    set_branches(model, branch_state(schedule, epoch), observing=not line_search)
    try:
        average = kwargs.get("ema") if state.config.training.average_rounded else None
        with averaging_deployed(average, "update", dict(model.named_parameters()), weight_quantizers(model)):
            return original(*args, **kwargs)
    finally:
        set_branches(model, DEPLOYED, observing=False)
        if kwargs.get("distributed"):
            share_ranges(model)


@torch.no_grad()
def share_ranges(model: torch.nn.Module) -> None:
    """Set the ranges of every process to the largest sizes that any of them observed."""
    quantizers = list(feature_quantizers(model).values())
    if not quantizers:
        return
    observed = torch.cat([q.observed for q in quantizers])
    torch.distributed.all_reduce(observed, op=torch.distributed.ReduceOp.MAX)
    for quantizer, sizes in zip(quantizers, observed.split([q.observed.numel() for q in quantizers]), strict=True):
        quantizer.load_ranges(sizes)


def error_table(original: Callable[..., object], *args: object, **kwargs: Any) -> object:
    """Make MACE's error table, and log that of the same weights without quantization."""
    table = original(*args, **kwargs)
    model = kwargs.get("model")
    inner = getattr(model, "module", model)
    if inner is not None and state_of(inner) is not None:
        with unquantized(inner):
            # Only the record of the quantized model goes to wandb.
            reference = original(*args, **{**kwargs, "log_wandb": False})
        logging.info("The same weights without quantization (FP32 against the quantized table that follows):")
        logging.info("\n" + str(reference))
    return table


_written: list[tuple[str, str]] = []
"""Name of the run in progress and the folders that it writes models to."""


def writes(name: str, *folders: str | None) -> None:
    """Note where the run that begins writes models, for `compress_written`: MACE does not compress them.

    `compress_written` is called when the run ends, or when the process ends if MACE's script is itself the main
    program, which cannot be hooked.
    """
    atexit.unregister(compress_written)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        _written[:] = [(name, folder) for folder in folders if folder is not None]
        atexit.register(compress_written)


def compress_written() -> None:
    """Compress the models that a run has written, once, as `gaq.save` compresses its own."""
    while _written:
        name, folder = _written.pop()
        compress_packed(folder, name)


class EquivarianceLoss(torch.nn.Module):
    """A loss with a term for the rotation error of the forces.

    Adds ``weight * mean |F(R x) - R F(x)|^2`` over atoms and components, for random proper rotations R
    (the LEE term of arXiv 2603.05343, with the forces as the equivariant output).

    Args:
        loss_fn: the loss of the run.
        model: the model in training.
        weight: of the term, in the units of the force loss (eV²/Å²).
        rotations: number of rotations drawn in each step.
    """

    def __init__(self, loss_fn: torch.nn.Module, model: torch.nn.Module, weight: float, rotations: int) -> None:
        super().__init__()
        self.loss_fn = loss_fn
        # Not a submodule: the loss owns no weights.
        self.__dict__["model"] = model
        self.weight = weight
        self.rotations = rotations

    def forward(self, pred: dict[str, Tensor], ref: Batch, **kwargs: object) -> Tensor:
        loss = self.loss_fn(pred=pred, ref=ref, **kwargs)
        batch = ref.to_dict()
        for _ in range(self.rotations):
            turn = random_rotation(pred["forces"].dtype, pred["forces"].device)
            rotated = dict(batch)
            for key in ("positions", "shifts", "cell"):
                rotated[key] = batch[key].detach() @ turn.T
            output = self.__dict__["model"](rotated, training=True, compute_force=True)
            error = output["forces"] - pred["forces"] @ turn.T
            loss = loss + self.weight / self.rotations * (error**2).mean()
        return loss
