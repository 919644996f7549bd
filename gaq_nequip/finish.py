"""Rounding when training is over: weights that were trained in float, in every checkpoint that the run has kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from nequip.data import AtomicDataDict
from nequip.utils import RankedLogger
from torch import Tensor

from gaq.files.whole import written_whole
from gaq.model.state import UNFINISHED, require_state
from gaq.training.ptq import check_weights, round_at_end
from gaq.training.sampling import by_atoms
from gaq.untyped import Batch, Document, Structure, Trainer, TrainingModule
from gaq_nequip.adapter import NequIPAdapter
from gaq_nequip.model import quantized_models, search_ranges
from gaq_nequip.root import eager

__all__ = ["finish", "finish_checkpoints"]

logger = RankedLogger(__name__, rank_zero_only=True)


class _TrainingData(NequIPAdapter):
    """The adapter on structures that are NequIP's own graphs.

    Args:
        collate: makes a batch from a list of graphs.
        device: device of the batches.
    """

    def __init__(self, collate: Callable[[list[Structure]], Batch], device: torch.device) -> None:
        self.collate = collate
        self.device = device

    def sizes(self, structures: Sequence[Structure]) -> list[int]:
        return [len(graph[AtomicDataDict.POSITIONS_KEY]) for graph in structures]

    def batches(self, model: torch.nn.Module, structures: Sequence[Structure], atoms: int) -> list[Batch]:
        graphs = [dict(graph) for graph in structures]
        spans = by_atoms(self.sizes(graphs), atoms)
        batches = [self.collate(graphs[span]) for span in spans]
        return [AtomicDataDict.to_(batch, self.device) for batch in batches]


def finish(trainer: Trainer, module: TrainingModule) -> None:
    """Round the weights of a training module, by calibration on the training structures.

    Where NequIP averages weights, the averaged ones are rounded.
    """
    average = getattr(module, "ema", None)
    if average is not None:
        average.swap_parameters(module.model)
    loader = trainer.datamodule.train_dataloader()
    data = _TrainingData(loader.collate_fn, module.device)
    for model in quantized_models(module.model):
        state = require_state(model)
        check_weights(dict(model.named_parameters()), loader.dataset)
        search_ranges(model)
        model.train()
        with eager(model), torch.enable_grad():
            for line in round_at_end(data, model, loader.dataset, state.config):
                logger.info(line)
        state.notes.pop(UNFINISHED, None)
    if average is not None:
        average.swap_parameters(module.model)


def finish_checkpoints(trainer: Trainer, module: TrainingModule) -> None:
    """Round the weights in every checkpoint that a run has kept, and those of the training module itself.

    The weights that training would continue from stay in the checkpoints: where NequIP averages, only the averaged
    weights are rounded.
    """
    # The last and the best checkpoint are often equal, and equal to what is in memory: each state is rounded once.
    done: list[tuple[Document, Document]] = []

    def finished(state: Document) -> Document:
        for before, after in done:
            if before.keys() == state.keys() and all(_same(before[key], state[key]) for key in before):
                return after
        module.load_state_dict(state)
        finish(trainer, module)
        done.append((state, _copy(module.state_dict())))
        return done[-1][1]

    in_memory = _copy(module.state_dict())
    for path in _kept_checkpoints(trainer):
        checkpoint = torch.load(path, map_location=module.device, weights_only=False)
        checkpoint["state_dict"] = finished(_copy(checkpoint["state_dict"]))
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            with written_whole(path) as part:
                torch.save(checkpoint, part)
        trainer.strategy.barrier()
        logger.info(f"The weights in {path} are rounded")
    module.load_state_dict(finished(in_memory))


def _same(first: object, second: Any) -> bool:  # Any: a tensor if the first is one
    """Whether two entries of a state dict are equal; the extra states of some modules are not tensors."""
    return torch.equal(first, second) if isinstance(first, Tensor) else bool(first == second)


def _copy(state: Document) -> Document:
    return {key: value.detach().clone() if isinstance(value, Tensor) else value for key, value in state.items()}


def _kept_checkpoints(trainer: Trainer) -> list[Path]:
    """The checkpoint files that the callbacks of a run have kept."""
    names: dict[str, None] = {}
    for callback in trainer.checkpoint_callbacks:
        for name in (callback.best_model_path, callback.last_model_path, *callback.best_k_models):
            names.setdefault(str(name))
    return [Path(name) for name in names if name and Path(name).is_file()]
