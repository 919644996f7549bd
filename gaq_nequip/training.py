"""Quantization-aware training inside the stock `nequip-train`: what the hook and the callback do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

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
    UNFINISHED,
    exact_features,
    feature_quantizers,
    require_state,
    round_weights,
    state_of,
    unquantized,
)
from gaq.model.summary import rows as summary_rows
from gaq.model.summary_table import format_rows
from gaq.quantizers.features import OBSERVER_DECAY, FeatureQuantizer
from gaq.quantizers.weights import WeightQuantizer
from gaq.training.averaging import averaging_deployed
from gaq.training.ptq import round_at_end
from gaq.training.schedule import DEPLOYED, BranchState, branch_state, describe_schedule, set_branches
from gaq_nequip.adapter import NequIPAdapter
from gaq_nequip.model import graph_models, prepare, search_ranges
from gaq_nequip.root import QuantizedGraphModel
from gaq_nequip.sites import find_sites
from gaq_nequip.weights import hold_codes, hold_scales, quantized_weights, release_codes, weight_quantizers

__all__ = ["QuantizationCallback", "add_equivariance_loss", "calibrate_on", "is_quantized", "start"]

logger = RankedLogger(__name__, rank_zero_only=True)

EARLY_STEPS = 50
"""Steps between observations of the ranges in train-time compiled models, which cannot observe as they run."""


def is_quantized(model: torch.nn.Module) -> bool:
    """Whether any of the models of a training module is quantized."""
    return any(state_of(m) is not None for m in graph_models(model).values())


def start(model: torch.nn.Module, config: QuantizationConfig, pretrained: bool = False) -> None:
    """Insert quantizers into a model just built, and say in the log what was done.

    Args:
        model: in float.
        config: what the key `quantization` was read as.
        pretrained: whether its weights are those of a trained model.
    """
    if pretrained and config.attention is not None and config.attention.messages:
        raise ConfigError(
            "quantization.attention.messages: adds weights to the model, which makes a trained one another function. "
            "Train from scratch with it, or leave it out."
        )
    for name, own in graph_models(model).items():
        prepare(own, config)
        if get_workflow_state() != "train":
            continue  # a checkpoint that is loaded, and was described when it was trained
        logger.info("=========== QUANTIZATION" + (f" of {name}" if name else "") + " ===========")
        for line in describe_schedule(require_state(own).config):
            logger.info(line)
        table = summary_rows(
            find_sites(own),
            state_of(own),
            dict(own.named_parameters()),
            quantized_weights(own),
            feature_quantizers(own),
        )
        logger.info("Quantized layers:\n" + format_rows(table))


def _quantized_models(module: Any) -> list[Any]:
    return [m for m in graph_models(module.model).values() if state_of(m) is not None]


def _features(model: torch.nn.Module) -> list[FeatureQuantizer]:
    return list(feature_quantizers(model).values())


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """A train-time compiled model evaluates its plain modules within this context."""
    before = model.__class__
    if getattr(model, "is_compile_graph_model", False):
        model.__class__ = QuantizedGraphModel
    try:
        yield
    finally:
        model.__class__ = before


def calibrate_on(model: Any, batches: list[Any], fresh: bool = True) -> None:
    """Observe activation ranges on batches of training data, features exact and weights as they are rounded.

    Args:
        model: prepared.
        batches: NequIP data.
        fresh: whether to forget the ranges there are.
    """
    quantizers = _features(model)
    if not quantizers:
        return
    for q in quantizers:
        if fresh:
            q.start_observing()
        q.observing = True
    was_training = model.training
    try:
        with _eager(model), exact_features(quantizers), torch.enable_grad():
            model.train(False)
            for batch in batches:
                model(dict(batch))
    finally:
        model.train(was_training)
        for q in quantizers:
            q.observing = False
            q.decay = OBSERVER_DECAY


class _TrainingData(NequIPAdapter):
    """The adapter on structures that are NequIP's own graphs.

    Args:
        collate: makes a batch of a list of them.
        device: of the batches.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], device: torch.device) -> None:
        self.collate = collate
        self.device = device

    def batches(self, model: torch.nn.Module, structures: Sequence[Any], batch_size: int) -> list[Any]:
        spans = range(0, len(structures), batch_size)
        batches = [self.collate([dict(graph) for graph in structures[i : i + batch_size]]) for i in spans]
        return [AtomicDataDict.to_(batch, self.device) for batch in batches]


class QuantizationCallback(lightning.pytorch.callbacks.Callback):
    """The schedule of the branches, the ranges of activations and the scales of weights, epoch by epoch.

    At the start of an epoch ranges are observed on a sample of the training data, scales are taken from the weights and
    codes that are chosen together are chosen; all then hold still, but for ranges that prove too small. Validation,
    testing and what is saved always see the fully rounded model, with the scales of the weights that are evaluated (the
    averaged ones, where NequIP averages). All of it follows from the weights and the epoch, so that a run continued
    from a checkpoint goes on as it would have.
    """

    def __init__(self) -> None:
        self._sample: list[Any] | None = None
        self._branches = DEPLOYED
        self._averaging = ExitStack()
        self._held: list[dict[str, Tensor]] = []

    # -- data --

    def _batches(self, trainer: Any, module: Any, count: int | None = None) -> list[Any]:
        """Batches of at most `count` training structures, the same on every process."""
        config = self._config(module)
        frames = config.calibration.frames if count is None else min(count, config.calibration.frames)
        if self._sample is None:
            loader = trainer.datamodule.train_dataloader()
            chosen = np.random.default_rng(config.calibration.seed).permutation(len(loader.dataset))
            graphs = [loader.dataset[int(i)] for i in chosen[: config.calibration.frames]]
            self._sample = [loader.collate_fn([graph]) for graph in graphs]
        singles = [AtomicDataDict.to_(dict(single), module.device) for single in self._sample[:frames]]
        return [AtomicDataDict.batched_from_list(singles[i : i + 8]) for i in range(0, len(singles), 8)]

    @staticmethod
    def _config(module: Any) -> QuantizationConfig:
        return require_state(_quantized_models(module)[0]).config

    def _set(self, module: Any, branches: BranchState, observing: bool) -> None:
        self._branches = branches
        for model in _quantized_models(module):
            # A compiled graph has no side effects, so it cannot observe as it runs.
            compiled = getattr(model, "is_compile_graph_model", False)
            set_branches(model, branches, observing and not compiled)

    # -- training --

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Ranges and scales, before anything is evaluated."""
        for model in _quantized_models(pl_module):
            state = require_state(model)
            state.holds_scales = True
            late = state.config.rounds_weights_at_end
            round_weights(model, not late)
            if late:
                state.notes[UNFINISHED] = True
            if state.resumed:
                continue
            hold_scales(model)
            calibrate_on(model, self._batches(trainer, pl_module))
            if _features(model):
                logger.info(f"Activation ranges observed on {len(self._sample or [])} training structures")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Averages take in rounded weights."""
        parameters: dict[str, torch.nn.Parameter] = {}
        quantizers: dict[str, WeightQuantizer] = {}
        for number, model in enumerate(_quantized_models(pl_module)):
            parameters |= {f"{number}.{name}": parameter for name, parameter in model.named_parameters()}
            quantizers |= {f"{number}.{name}": quantizer for name, quantizer in weight_quantizers(model).items()}
        rounded = self._config(pl_module).training.average_rounded
        average = getattr(pl_module, "ema", None) if rounded else None
        self._averaging.enter_context(averaging_deployed(average, "update_parameters", parameters, quantizers))

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The host's average is its own again."""
        self._averaging.close()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The host's average is its own again, and codes are chosen for the weights as they are."""
        self._averaging.close()
        for model in _quantized_models(pl_module):
            release_codes(model)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Round weights that were trained in float, in every checkpoint that the run has kept.

        What training goes on from stays in them: where NequIP averages, the averaged weights alone are rounded.
        """
        models = _quantized_models(pl_module)
        if not self._config(pl_module).rounds_weights_at_end:
            return
        for model in models:
            round_weights(model, True)
        # The last and the best checkpoint are often the same, and so is often what is in memory.
        done: list[tuple[dict[str, Any], dict[str, Any]]] = []

        def finished(given: dict[str, Any]) -> dict[str, Any]:
            for before, after in done:
                if before.keys() == given.keys() and all(_same(before[key], given[key]) for key in before):
                    return after
            pl_module.load_state_dict(given)
            self._finish(trainer, pl_module)
            done.append((given, _copy(pl_module.state_dict())))
            return done[-1][1]

        present = _copy(pl_module.state_dict())
        for path in _kept_checkpoints(trainer):
            stored = torch.load(path, map_location=pl_module.device, weights_only=False)
            stored["state_dict"] = finished(_copy(stored["state_dict"]))
            trainer.strategy.barrier()
            if trainer.is_global_zero:
                part = path.with_name(path.name + ".part")
                torch.save(stored, part)
                part.replace(path)
            trainer.strategy.barrier()
            logger.info(f"The weights in {path} are rounded")
        pl_module.load_state_dict(finished(present))

    @staticmethod
    def _finish(trainer: Any, module: Any) -> None:
        """Round the weights of a training module: the averaged ones where there are any."""
        average = getattr(module, "ema", None)
        if average is not None:
            average.swap_parameters(module.model)
        loader = trainer.datamodule.train_dataloader()
        data = _TrainingData(loader.collate_fn, module.device)
        for model in _quantized_models(module):
            state = require_state(model)
            search_ranges(model)
            model.train()
            with _eager(model), torch.enable_grad():
                for line in round_at_end(data, model, loader.dataset, state.config):
                    logger.info(line)
            state.notes.pop(UNFINISHED, None)
        if average is not None:
            average.swap_parameters(module.model)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """The branches of this epoch; ranges and scales for the weights as they are."""
        config = self._config(pl_module)
        epoch = trainer.current_epoch
        if config.vectors.magnitude_bits is not None and epoch == config.vectors.start_epoch:
            logger.info(f"Epoch {epoch}: vectors are rounded from now on")
        for model in _quantized_models(pl_module):
            require_state(model).status = "training"
            hold_scales(model)
            hold_codes(model)
            if epoch > 0 and any(quantizer.needs_ranges for quantizer in _features(model)):
                calibrate_on(model, self._batches(trainer, pl_module))
        self._set(pl_module, branch_state(config.vectors, epoch), observing=True)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """In the first epoch of a train-time compiled model ranges are looked at now and then."""
        if trainer.current_epoch == 0 and batch_idx and batch_idx % EARLY_STEPS == 0:
            for model in _quantized_models(pl_module):
                if getattr(model, "is_compile_graph_model", False):
                    calibrate_on(model, self._batches(trainer, pl_module, 8), fresh=False)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Ranges are the largest that any process met; what is saved from here on is the deployed form."""
        if trainer.world_size > 1:
            self._share_ranges(pl_module)
        self._set(pl_module, DEPLOYED, observing=False)

    @staticmethod
    @torch.no_grad()
    def _share_ranges(module: Any) -> None:
        for model in _quantized_models(module):
            for quantizer in _features(model):
                observed = quantizer.observed.clone()
                torch.distributed.all_reduce(observed, op=torch.distributed.ReduceOp.MAX)
                quantizer.load_ranges(observed)

    # -- evaluation --

    def _enter(self, trainer: Any, pl_module: Any) -> None:
        if trainer.world_size > 1:
            self._share_ranges(pl_module)
        self._before = self._branches
        self._set(pl_module, DEPLOYED, observing=False)
        self._held = [hold_codes(model) for model in _quantized_models(pl_module)]

    def _leave(self, pl_module: Any) -> None:
        for model, held in zip(_quantized_models(pl_module), self._held, strict=True):
            release_codes(model, held)
        self._set(pl_module, self._before, observing=self._before != DEPLOYED)

    # The epoch hooks, since averaged weights are swapped in and out outside them.
    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Everything rounded, with the scales of the weights that are validated."""
        self._enter(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Back to training."""
        self._leave(pl_module)

    def on_test_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Everything rounded."""
        self._enter(trainer, pl_module)
        self._float_errors: list[dict[str, Tensor]] = []

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """The same weights without quantization, for the comparison in the log."""
        models = _quantized_models(pl_module)
        if len(models) != 1 or len(graph_models(pl_module.model)) != 1:
            return
        target = pl_module.process_target(batch, batch_idx, dataloader_idx)
        found = {}
        with torch.enable_grad(), _eager(models[0]):
            for name, rounded in (("quantized", True), ("float", False)):
                if rounded:
                    output = models[0](dict(batch))
                else:
                    with unquantized(models[0]):
                        output = models[0](dict(batch))
                for key, label in ((AtomicDataDict.FORCE_KEY, "forces"), (AtomicDataDict.TOTAL_ENERGY_KEY, "energy")):
                    if key in target:
                        error = output[key].detach() - target[key]
                        if label == "energy":
                            error = error / target[AtomicDataDict.NUM_NODES_KEY].reshape(error.shape)
                        found[f"{name} {label}"] = torch.stack([error.abs().sum(), error.new_tensor(error.numel())])
        self._float_errors.append(found)

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Print what rounding costs, and go back."""
        if self._float_errors:
            lines = []
            for label, text in (("energy", "energy MAE per atom"), ("forces", "forces MAE")):
                sums = {
                    name: torch.stack([e[f"{name} {label}"] for e in self._float_errors]).sum(0)
                    for name in ("float", "quantized")
                    if all(f"{name} {label}" in e for e in self._float_errors)
                }
                if sums:
                    values = ", ".join(f"{name} {float(s[0] / s[1]):.6f}" for name, s in sums.items())
                    lines.append(f"  {text}: {values}")
            logger.info("The same weights without quantization (float) and with it, on the test data:")
            for line in lines:
                logger.info(line)
            self._float_errors = []
        self._leave(pl_module)


def _same(one: Any, other: Any) -> bool:
    """Whether two entries of a state are equal; the extra states of some modules are no tensors."""
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


def _copy(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.detach().clone() if isinstance(value, Tensor) else value for key, value in state.items()}


def _kept_checkpoints(trainer: Any) -> list[Path]:
    """The files that a run's callbacks have kept."""
    names: dict[str, None] = {}
    for callback in trainer.checkpoint_callbacks:
        for name in (callback.best_model_path, callback.last_model_path, *callback.best_k_models):
            names.setdefault(str(name))
    return [Path(name) for name in names if name and Path(name).is_file()]


def add_equivariance_loss(module: Any, batch: Any, loss: Any) -> Any:
    """The loss of a step with the term for the rotation error of the forces, where the configuration asks for it.

    Adds ``weight * mean |F(R x) - R F(x)|^2`` over atoms and components, for random proper rotations R (the LEE term of
    arXiv 2603.05343, with the forces as the equivariant output).
    """
    models = _quantized_models(module)
    if not models:
        return loss
    config = require_state(models[0]).config.equivariance_loss
    if config.weight <= 0:
        return loss
    forces = module(dict(batch))[AtomicDataDict.FORCE_KEY]
    for _ in range(config.rotations):
        turn = random_rotation(forces.dtype, forces.device)
        rotated = dict(batch)
        for key in (AtomicDataDict.POSITIONS_KEY, AtomicDataDict.CELL_KEY):
            if key in rotated:
                rotated[key] = rotated[key].detach() @ turn.T.to(rotated[key].dtype)
        # Made from positions and cell, so they have to be made again.
        for key in (AtomicDataDict.EDGE_VECTORS_KEY, AtomicDataDict.EDGE_LENGTH_KEY):
            rotated.pop(key, None)
        error = module(rotated)[AtomicDataDict.FORCE_KEY] - forces @ turn.T
        loss = loss + module.world_size * config.weight / config.rotations * (error**2).mean()
    return loss
