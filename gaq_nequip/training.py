"""Quantization-aware training inside the stock `nequip-train`: what the hook and the callback do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack

import lightning
import numpy as np
import torch
from nequip.data import AtomicDataDict
from nequip.scripts._workflow_utils import get_workflow_state
from nequip.utils import RankedLogger
from torch import Tensor

from gaq.checks.rotations import random_rotation
from gaq.config.parse import ConfigError, QuantizationConfig
from gaq.model.state import (
    TRAINED,
    UNFINISHED,
    exact_features,
    feature_quantizers,
    require_state,
    round_weights,
    state_of,
)
from gaq.model.summary import rows as summary_rows
from gaq.model.summary_table import format_rows
from gaq.quantizers.features import OBSERVER_DECAY, FeatureQuantizer
from gaq.quantizers.weights import WeightQuantizer
from gaq.training.averaging import averaging_deployed
from gaq.training.ptq import check_weights
from gaq.training.schedule import (
    DEPLOYED,
    BranchState,
    branch_state,
    check_reached,
    describe_branches,
    describe_schedule,
    never_reached,
    noted_schedule,
    set_branches,
    settle_schedule,
)
from gaq.untyped import Batch, Trainer, TrainingModule
from gaq_nequip.error_comparison import ErrorComparison
from gaq_nequip.finish import finish_checkpoints
from gaq_nequip.model import graph_models, prepare, quantized_models
from gaq_nequip.root import eager
from gaq_nequip.sites import find_sites
from gaq_nequip.weights import hold_codes, hold_scales, quantized_weights, release_codes, weight_quantizers

__all__ = ["QuantizationCallback", "add_equivariance_loss", "calibrate_on", "is_quantized", "share_ranges", "start"]

logger = RankedLogger(__name__, rank_zero_only=True)

EARLY_STEPS = 50
"""Steps between observations of the ranges in train-time compiled models, which cannot observe while they run."""


def is_quantized(model: torch.nn.Module) -> bool:
    """Whether any of the models that NequIP built is quantized."""
    return bool(quantized_models(model))


def start(model: torch.nn.Module, config: QuantizationConfig, pretrained: bool = False, written: bool = True) -> None:
    """Insert quantizers into a model that was just built, and write to the log what was done.

    Args:
        model: float model.
        config: configuration given by the key `quantization`.
        pretrained: whether the weights come from a trained model.
        written: whether a user wrote the configuration for this run; see `gaq.model.insertion.prepare`.

    Raises:
        gaq.config.parse.ConfigError: if the configuration cannot be used for this model, or attention over messages is
            asked for in a trained model.
    """
    if pretrained and config.attention is not None and config.attention.messages:
        raise ConfigError(
            "quantization.attention.messages: adds weights to the model, which makes a trained one another function. "
            "Train from scratch with it, or leave it out."
        )
    for name, graph_model in graph_models(model).items():
        prepare(graph_model, config, written=written)
        if get_workflow_state() != "train":
            continue  # the model of a checkpoint, which was described when it was trained
        logger.info("=========== QUANTIZATION" + (f" of {name}" if name else "") + " ===========")
        for line in describe_schedule(require_state(graph_model).config):
            logger.info(line)
        table = summary_rows(
            find_sites(graph_model),
            state_of(graph_model),
            dict(graph_model.named_parameters()),
            quantized_weights(graph_model),
            feature_quantizers(graph_model),
        )
        logger.info("Quantized layers:\n" + format_rows(table))


def _epochs(trainer: Trainer) -> int | None:
    """Length of a run in epochs; None if it ends by another criterion."""
    epochs: list[int] = [] if trainer.max_epochs is None or trainer.max_epochs < 0 else [trainer.max_epochs]
    batches = trainer.num_training_batches
    if trainer.max_steps > 0 and batches and math.isfinite(batches):
        epochs.append(math.ceil(trainer.max_steps * trainer.accumulate_grad_batches / batches))
    return min(epochs, default=None)


def _features(model: torch.nn.Module) -> list[FeatureQuantizer]:
    return list(feature_quantizers(model).values())


def calibrate_on(model: torch.nn.Module, batches: list[Batch], fresh: bool = True) -> None:
    """Observe activation ranges on batches of training data, with exact features and rounded weights.

    Args:
        model: prepared model.
        batches: NequIP data.
        fresh: whether to forget the present ranges first.
    """
    quantizers = _features(model)
    if not quantizers:
        return
    for quantizer in quantizers:
        if fresh:
            quantizer.start_observing()
        quantizer.observing = True
    was_training = model.training
    try:
        with eager(model), exact_features(quantizers), torch.enable_grad():
            model.train(False)
            for batch in batches:
                model(dict(batch))
    finally:
        model.train(was_training)
        for quantizer in quantizers:
            quantizer.observing = False
            quantizer.decay = OBSERVER_DECAY


def _training_graphs(trainer: Trainer) -> Iterator[Mapping[str, object]]:
    """The training structures; loaded when the first is asked for."""
    yield from trainer.datamodule.train_dataloader().dataset


class QuantizationCallback(lightning.pytorch.callbacks.Callback):
    """Sets the branches, the ranges of activations and the scales of weights, epoch by epoch.

    At the start of an epoch the callback observes ranges on a sample of the training data, takes the scales from the
    weights, and chooses the codes that are chosen together. Within the epoch these stay fixed, except for ranges that
    prove too small. Validation, tests and checkpoints always see the fully rounded model, with the scales of the
    weights that are evaluated (the averaged ones, where NequIP averages). Everything follows from the weights and the
    epoch, so a run that continues from a checkpoint continues as if it had not stopped.
    """

    def __init__(self) -> None:
        self._sample: list[Batch] | None = None
        self._branches = DEPLOYED
        self._averaging = ExitStack()
        self._codes_before: list[dict[str, Tensor]] = []
        self._comparison = ErrorComparison()

    def setup(self, trainer: Trainer, pl_module: TrainingModule, stage: str) -> None:
        """Refuse to train a model that has no weights left, before an optimizer is made for it.

        Raises:
            ValueError: saying what to train instead.
        """
        if stage == "fit" and any(
            require_state(model).status == "frozen" for model in quantized_models(pl_module.model)
        ):
            raise ValueError(
                "training_module.model: this package is quantized, so it holds integer codes and no weights that could "
                "be trained. Give the package or checkpoint of the float model it was made from, with the key "
                f"`quantization: {self._config(pl_module).preset}` to train it with rounding."
            )

    # -- data --

    def _batches(self, trainer: Trainer, module: TrainingModule, count: int | None = None) -> list[Batch]:
        """Batches of at most `count` training structures, the same on every process."""
        calibration = self._config(module).calibration
        frames = calibration.frames if count is None else min(count, calibration.frames)
        if self._sample is None:
            loader = trainer.datamodule.train_dataloader()
            order = np.random.default_rng(calibration.seed).permutation(len(loader.dataset))
            graphs = [loader.dataset[int(i)] for i in order[: calibration.frames]]
            self._sample = [loader.collate_fn([graph]) for graph in graphs]
        singles = [AtomicDataDict.to_(dict(single), module.device) for single in self._sample[:frames]]
        return [AtomicDataDict.batched_from_list(singles[i : i + 8]) for i in range(0, len(singles), 8)]

    @staticmethod
    def _config(module: TrainingModule) -> QuantizationConfig:
        return require_state(quantized_models(module.model)[0]).config

    def _set_branches(self, module: TrainingModule, branches: BranchState, observing: bool) -> None:
        self._branches = branches
        for model in quantized_models(module.model):
            # A compiled graph has no side effects, so it cannot observe while it runs.
            compiled = getattr(model, "is_compile_graph_model", False)
            set_branches(model, branches, observing and not compiled)

    # -- training --

    def on_fit_start(self, trainer: Trainer, pl_module: TrainingModule) -> None:
        """Set ranges and scales before anything is evaluated.

        Raises:
            gaq.config.parse.ConfigError: if the schedule names an epoch that the run does not reach.
        """
        check_reached(self._config(pl_module), _epochs(trainer))
        for model in quantized_models(pl_module.model):
            state = require_state(model)
            state.holds_scales = True
            state.notes[TRAINED] = True
            at_end = state.config.rounds_weights_at_end
            round_weights(model, not at_end)
            if at_end:
                state.notes[UNFINISHED] = True
            if state.resumed:
                continue
            hold_scales(model)
            calibrate_on(model, self._batches(trainer, pl_module))
            if _features(model):
                logger.info(f"Activation ranges observed on {len(self._sample or [])} training structures")

    def on_train_start(self, trainer: Trainer, pl_module: TrainingModule) -> None:
        """Settle the schedule, and make NequIP's average, where there is one, follow the rounded weights."""
        epochs = _epochs(trainer)
        for model in quantized_models(pl_module.model):
            schedule = settle_schedule(require_state(model), trainer.current_epoch, epochs)
        logger.info(describe_branches(self._config(pl_module), schedule, epochs))
        parameters: dict[str, torch.nn.Parameter] = {}
        quantizers: dict[str, WeightQuantizer] = {}
        for index, model in enumerate(quantized_models(pl_module.model)):
            parameters |= {f"{index}.{name}": parameter for name, parameter in model.named_parameters()}
            quantizers |= {f"{index}.{name}": quantizer for name, quantizer in weight_quantizers(model).items()}
        rounded = self._config(pl_module).training.average_rounded
        average = getattr(pl_module, "ema", None) if rounded else None
        self._averaging.enter_context(averaging_deployed(average, "update_parameters", parameters, quantizers))

    def on_exception(self, trainer: Trainer, pl_module: TrainingModule, exception: BaseException) -> None:
        """Undo `on_train_start`."""
        self._averaging.close()

    def on_train_end(self, trainer: Trainer, pl_module: TrainingModule) -> None:
        """Undo `on_train_start`, and choose codes for the present weights from now on."""
        self._averaging.close()
        state = require_state(quantized_models(pl_module.model)[0])
        if state.last_epoch >= 0 and (warning := never_reached(noted_schedule(state), state.last_epoch)):
            logger.warning(warning)
        for model in quantized_models(pl_module.model):
            release_codes(model)

    def on_fit_end(self, trainer: Trainer, pl_module: TrainingModule) -> None:
        """Round weights that were trained in float, in every checkpoint that the run has kept."""
        if not self._config(pl_module).rounds_weights_at_end:
            return
        for model in quantized_models(pl_module.model):
            round_weights(model, True)
        finish_checkpoints(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: TrainingModule) -> None:
        """Set the branches of this epoch, and ranges and scales for the present weights."""
        epoch = trainer.current_epoch
        schedule = noted_schedule(require_state(quantized_models(pl_module.model)[0]))
        if epoch == schedule.start:
            logger.info(f"Epoch {epoch}: vectors are rounded from now on")
        for model in quantized_models(pl_module.model):
            require_state(model).status = "training"
            require_state(model).last_epoch = epoch
            hold_scales(model)
            hold_codes(model)
            if epoch > 0 and any(quantizer.needs_ranges for quantizer in _features(model)):
                calibrate_on(model, self._batches(trainer, pl_module))
        self._set_branches(pl_module, branch_state(schedule, epoch), observing=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: TrainingModule, batch: Batch, batch_idx: int) -> None:
        """Observe ranges every `EARLY_STEPS` steps in the first epoch of a train-time compiled model."""
        if trainer.current_epoch == 0 and batch_idx and batch_idx % EARLY_STEPS == 0:
            for model in quantized_models(pl_module.model):
                if getattr(model, "is_compile_graph_model", False):
                    calibrate_on(model, self._batches(trainer, pl_module, 8), fresh=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: TrainingModule) -> None:
        """Share the ranges among processes; what is saved from here on is the deployed form."""
        if trainer.world_size > 1:
            share_ranges(pl_module)
        self._set_branches(pl_module, DEPLOYED, observing=False)

    # -- evaluation --

    def _start_evaluation(self, trainer: Trainer, module: TrainingModule) -> None:
        """Round everything, with the scales and codes of the weights that are evaluated."""
        if trainer.world_size > 1:
            share_ranges(module)
        self._branches_before = self._branches
        self._set_branches(module, DEPLOYED, observing=False)
        self._codes_before = [hold_codes(model) for model in quantized_models(module.model)]

    def _end_evaluation(self, module: TrainingModule) -> None:
        """Undo `_start_evaluation`."""
        for model, codes in zip(quantized_models(module.model), self._codes_before, strict=True):
            release_codes(model, codes)
        self._set_branches(module, self._branches_before, observing=self._branches_before != DEPLOYED)

    # These are the hooks of epochs, because NequIP swaps averaged weights in before them and out after them.
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: TrainingModule) -> None:
        """Validate the deployed form, if there is one: from weights that are NaN no codes can be chosen."""
        for model in quantized_models(pl_module.model):
            check_weights(dict(model.named_parameters()), _training_graphs(trainer))
        self._start_evaluation(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: TrainingModule) -> None:
        """Return to the branches of training."""
        self._end_evaluation(pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: TrainingModule) -> None:
        """Test the deployed form."""
        self._start_evaluation(trainer, pl_module)
        self._comparison = ErrorComparison()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: TrainingModule,
        outputs: object,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Evaluate the same weights without quantization, for the comparison in the log."""
        models = quantized_models(pl_module.model)
        if len(models) == 1 and len(graph_models(pl_module.model)) == 1:
            self._comparison.add(models[0], batch, pl_module.process_target(batch, batch_idx, dataloader_idx))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: TrainingModule) -> None:
        """Write to the log what quantization costs, and return to the branches from before."""
        for line in self._comparison.lines():
            logger.info(line)
        self._comparison = ErrorComparison()
        self._end_evaluation(pl_module)


@torch.no_grad()
def share_ranges(module: TrainingModule) -> None:
    """Give every process the largest sizes that any of them observed."""
    for model in quantized_models(module.model):
        for quantizer in _features(model):
            observed = quantizer.observed.clone()
            torch.distributed.all_reduce(observed, op=torch.distributed.ReduceOp.MAX)
            quantizer.load_ranges(observed)


def add_equivariance_loss(module: TrainingModule, batch: Batch, loss: Tensor) -> Tensor:
    """Add the term for the rotation error of the forces to the loss of a step, if the configuration asks for it.

    Adds ``weight * mean |F(R x) - R F(x)|^2`` over atoms and components, for random proper rotations R (the LEE term of
    arXiv 2603.05343, with the forces as the equivariant output).
    """
    models = quantized_models(module.model)
    if not models:
        return loss
    config = require_state(models[0]).config.equivariance_loss
    if config.weight <= 0:
        return loss
    forces = module(dict(batch))[AtomicDataDict.FORCE_KEY]
    for _ in range(config.rotations):
        rotation = random_rotation(forces.dtype, forces.device)
        rotated = dict(batch)
        for key in (AtomicDataDict.POSITIONS_KEY, AtomicDataDict.CELL_KEY):
            if key in rotated:
                rotated[key] = rotated[key].detach() @ rotation.T.to(rotated[key].dtype)
        # These follow from positions and cell, so the model has to compute them again.
        for key in (AtomicDataDict.EDGE_VECTORS_KEY, AtomicDataDict.EDGE_LENGTH_KEY):
            rotated.pop(key, None)
        error = module(rotated)[AtomicDataDict.FORCE_KEY] - forces @ rotation.T
        loss = loss + module.world_size * config.weight / config.rotations * (error**2).mean()
    return loss
