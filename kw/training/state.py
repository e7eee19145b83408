"""Saving a run as a checkpoint, and resuming it from one."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..data import FaultLog
from ..errors import one_line
from ..version import __version__
from ..warehouse.sharded import placed_like
from .checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_network,
    refuse_other_classes,
    restore_rng_state,
    rng_state,
)
from .distributed import batch_norm_buffers, from_all
from .layout import number_as_now, resume_fault, settings_changed
from .logs import logger
from .parallel import gathered
from .saving import copied
from .task import Metrics

if TYPE_CHECKING:
    from .trainer import Trainer


def run_state(
    trainer: Trainer, metrics: Metrics | None = None, is_best: bool = False
) -> dict[str, Any]:
    """The run as a checkpoint (see :mod:`kw.training.checkpoint`); a collective call."""
    process, network = trainer.process, trainer.task.network
    states = {type(hook).__name__: hook.state_dict() for hook in trainer.hooks}
    own = {
        "rng": rng_state(process.device),
        "norms": [buffer.cpu() for buffer in _statistics(trainer)],
        "hooks": {name: copied(state, name) for name, state in states.items() if state},
    }
    checkpoint = {
        "meta": {
            "epoch": trainer.epoch,
            "iter": trainer.update,
            "updates_per_epoch": trainer.updates_per_epoch,
            "config": trainer.task.config_text,
            "classes": trainer.task.classes,
            "best": trainer.best,
            "is_best": is_best,
            "metrics": metrics,
            "versions": {"kernelwarehouse": __version__, "torch": str(torch.__version__)},
        },
        "state_dict": gathered(network.state_dict(), process.is_main),
        "optimizer": gathered(trainer.updater.state_dict(), process.is_main),
        "ranks": from_all(own),
        "bad_images": {name: log.state_dict() for name, log in fault_logs(trainer).items()},
    }
    if trainer.average is not None:
        average = trainer.average.network.state_dict()
        checkpoint["ema_state_dict"] = gathered(average, process.is_main)
    return checkpoint


def resume(trainer: Trainer, path: Path) -> dict[str, Any]:
    """Resume a run from a checkpoint, completely or with an error.

    Returns:
        The checkpoint's ``meta``.

    Raises:
        CheckpointError: it cannot be read, is of another model, or of a run with other updates, or
            it holds weights alone.
    """
    checkpoint, source = load_checkpoint(path), str(path)
    network, optimizer = trainer.task.network, trainer.optimizer
    load_network(network, checkpoint["state_dict"], source)  # before what follows
    number_as_now(checkpoint, network, optimizer)
    refuse_other_classes(checkpoint, trainer.task.classes, source, "this run's data")
    fault = resume_fault(checkpoint, optimizer)
    if fault is not None:
        raise CheckpointError(f"{source} does not belong to this run: {fault}")
    try:
        _restore(trainer, checkpoint, source)
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        # A file of another program may hold anything.
        raise CheckpointError(
            f"{source} is not laid out as this version writes it: {one_line(error)}"
        ) from error
    meta: dict[str, Any] = checkpoint["meta"]
    logger.info(f"resumed {path}: epoch {trainer.epoch}, update {trainer.update}")
    if trainer.is_finished:
        logger.warning(
            f"{source}: {trainer.epoch} epochs are done and epochs is {trainer.config.epochs}: "
            "nothing is trained"
        )
    elif changed := settings_changed(meta.get("config"), trainer.task.config_text):
        logger.warning("resumed with changed settings:\n  " + "\n  ".join(changed))
    return meta


def _restore(trainer: Trainer, checkpoint: dict[str, Any], source: str) -> None:
    if "optimizer" not in checkpoint:
        raise CheckpointError(
            f"{source} holds weights alone: it can be evaluated (kw test), not resumed"
        )
    meta = checkpoint["meta"]
    done, per_epoch = meta["iter"], trainer.updates_per_epoch
    # Checkpoints of earlier versions do not say how many updates an epoch had.
    before = meta.get("updates_per_epoch", per_epoch)
    if before != per_epoch or not 0 <= done - meta["epoch"] * per_epoch <= per_epoch:
        raise CheckpointError(
            f"{source}: {done} updates in {meta['epoch']} epochs, {before} an epoch, where "
            f"this run makes {per_epoch} an epoch; resume with the total_batch_size and images "
            "that it was trained with, or start a new run with model.weights set to this file"
        )
    if trainer.average is not None:
        average = checkpoint.get("ema_state_dict")
        if average is None:
            logger.warning(f"{source} has no EMA: the average starts from its weights")
            average = checkpoint["state_dict"]
        load_network(trainer.average.network, average, source)
    trainer.updater.load_state_dict(checkpoint["optimizer"], trainer.config.optimizer.args)
    for name, log in fault_logs(trainer).items():
        log.load_state_dict(checkpoint.get("bad_images", {}).get(name, {"known": []}))
    trainer.best = meta["best"]
    trainer.epoch, trainer.update = meta["epoch"], done
    within = done > meta["epoch"] * per_epoch
    _restore_process(trainer, checkpoint["ranks"], source, within)


def _restore_process(
    trainer: Trainer, ranks: list[dict[str, Any]], source: str, within: bool
) -> None:
    """Restore the state of this process; ``within``: the checkpoint was written within an epoch."""
    process = trainer.process
    if len(ranks) != process.world_size:
        restored = _restore_hooks(trainer, ranks[0], shared=True)
        # The log's sums begin anew with its next line.
        anew = [name for name in ranks[0]["hooks"] if name not in (*restored, "LogHook")]
        also = ", BatchNorm starts from the first process's statistics" if within else ""
        also += f"; without the state of {', '.join(anew)}" if anew else ""
        logger.warning(
            f"{source} was written by {len(ranks)} process(es); the run continues on "
            f"{process.world_size}, but not to the bit: drop path draws other random numbers, "
            f"gradients are summed in another order{also}"
        )
        return
    own = ranks[process.rank]
    restore_rng_state(own["rng"], process.device)
    for buffer, value in zip(_statistics(trainer), own["norms"], strict=True):
        buffer.copy_(value)
    _restore_hooks(trainer, own)


def _restore_hooks(trainer: Trainer, own: dict[str, Any], shared: bool = False) -> list[str]:
    """Restore the hooks, or only those with one state for all processes; returns their names."""
    restored = []
    for hook in trainer.hooks:
        name = type(hook).__name__
        if name in own["hooks"] and (hook.is_shared or not shared):
            hook.load_state_dict(own["hooks"][name])
            restored.append(name)
    return restored


def _statistics(trainer: Trainer) -> list[Tensor]:
    """Running statistics that differ from process to process: within an epoch, of BatchNorm."""
    if trainer.process.world_size == 1:
        return []
    return batch_norm_buffers(trainer.task.network)


def fault_logs(trainer: Trainer) -> dict[str, FaultLog]:
    """The logs of unreadable files, by split."""
    return {"train": trainer.train_loader.faults, "val": trainer.val_loader.faults}


def placed_state(
    state: dict[str, Any], optimizer: Optimizer, settings: Collection[str]
) -> dict[str, Any]:
    """A saved state, its tensors whole, as this run's optimizer takes it: sharded as parameters
    are, with this run's settings; ``settings`` names those of ``optimizer.args``."""
    pairs = list(zip(optimizer.param_groups, state["param_groups"], strict=True))
    parameters = {
        number: parameter
        for own, other in pairs
        for number, parameter in zip(other["params"], own["params"], strict=True)
    }
    groups = [{**own, "params": other["params"]} for own, other in pairs]
    if not isinstance(optimizer, (torch.optim.AdamW, torch.optim.SGD)):
        # Others keep their state, a count of steps for instance, among a group's settings.
        # Nesterov's form may follow from optimizer.name alone.
        own_keys = {"lr", "lr_scale", "weight_decay", "params", "nesterov", *settings}
        kept = [{k: v for k, v in other.items() if k not in own_keys} for _, other in pairs]
        groups = [{**group, **theirs} for group, theirs in zip(groups, kept, strict=True)]
    placed = {
        number: {
            # Counts of steps are scalars, the same everywhere.
            name: placed_like(value, parameters[number]) if getattr(value, "ndim", 0) else value
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    return {**state, "state": placed, "param_groups": groups}
