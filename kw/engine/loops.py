"""The loops: what an epoch of training and an evaluation do.

One iteration of a run is one optimizer update. Accumulation happens inside it, so that schedules,
logs and checkpoints count the same thing on one GPU and on a hundred.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from mmengine.runner import BaseLoop, EpochBasedTrainLoop
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..evaluation import Accuracy
from ..registry import LOOPS
from .distributed import average_batch_norm, host_barrier
from .optim import autocast
from .parallel import release
from .presence import set_place

__all__ = ["EvalLoop", "TrainLoop", "evaluate"]


@LOOPS.register_module()
class TrainLoop(EpochBasedTrainLoop):
    """Epochs of updates, and an evaluation every few epochs.

    Hooks see ``runner.iter`` as the number of updates done. ``after_update(runner)`` is called once
    an update counts as done; ``after_epoch(runner, metrics)`` after every epoch and its evaluation,
    where there is one.

    Attributes:
        updates_per_epoch: optimizer updates in an epoch.
        data_seconds: time spent waiting for batches since the log hook last reset it.
        batches: the micro-batches of the last update, for who has to look into what it did.
    """

    def __init__(
        self, runner: Any, dataloader: DataLoader[Any], max_epochs: int, val_interval: int = 1
    ) -> None:
        super().__init__(runner, dataloader, max_epochs, val_interval=val_interval)
        sampler: Any = dataloader.batch_sampler
        self.sampler = sampler
        self.updates_per_epoch = sampler.updates_per_epoch
        self._max_iters = self._max_epochs * self.updates_per_epoch
        self.data_seconds = 0.0
        self.batches: list[Any] = []

    def resume_from(self, epoch: int, update: int) -> None:
        """Continue a run: ``epoch`` epochs and ``update`` updates are done."""
        self._epoch, self._iter = epoch, update

    def run(self) -> nn.Module:
        """Train to the last epoch."""
        self.runner.call_hook("before_train")
        while self._epoch < self._max_epochs and not self.stop_training:
            self.run_epoch()
            metrics = None
            due = self._epoch % self.val_interval == 0 or self._epoch == self._max_epochs
            if self.runner.val_loop is not None and due:
                metrics = self.runner.val_loop.run()
            self.runner.call_hook("after_epoch", metrics=metrics)
        self.runner.call_hook("after_train")
        return self.runner.model

    def run_epoch(self) -> None:
        """One pass over the training images."""
        start = self._iter - self._epoch * self.updates_per_epoch
        self.sampler.set_epoch(self._epoch, start)
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        set_place(f"at the start of epoch {self._epoch + 1}, loading images")
        batches = iter(self.dataloader)
        for update in range(start, self.updates_per_epoch):
            self.run_update(update, batches)
            self.runner.call_hook("after_update")
        host_barrier(f"at the end of epoch {self._epoch + 1}")
        average_batch_norm(self.runner.model)
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1

    def run_update(self, update: int, batches: Iterator[Any]) -> None:
        """One optimizer update from ``accumulation`` micro-batches."""
        self.runner.call_hook("before_train_iter", batch_idx=update, data_batch=None)
        sums: dict[str, Tensor] = {}
        self.batches = []
        place = f"in update {update + 1} of epoch {self._epoch + 1}"
        for _ in range(self.sampler.accumulation):
            set_place(f"{place}, loading images")
            waiting = time.perf_counter()
            batch = next(batches)
            self.data_seconds += time.perf_counter() - waiting
            self.batches.append(batch)
            set_place(place)
            losses = self.runner.model.train_step(batch, optim_wrapper=self.runner.optim_wrapper)
            for key, value in losses.items():
                sums[key] = value.detach() + sums.get(key, 0)
        outputs = {key: value / self.sampler.accumulation for key, value in sums.items()}
        self.runner.call_hook(
            "after_train_iter", batch_idx=update, data_batch=None, outputs=outputs
        )
        self._iter += 1


@LOOPS.register_module()
class EvalLoop(BaseLoop):
    """Evaluation of the model and, where there is one, of its moving average.

    Args:
        runner: the run.
        dataloader: the test images.
        evaluator: see :attr:`kw.engine.task.Task.evaluate`.
    """

    def __init__(
        self,
        runner: Any,
        dataloader: DataLoader[Any],
        evaluator: Callable[[nn.Module], dict[str, float | None]],
    ) -> None:
        super().__init__(runner, dataloader)
        self.evaluate = evaluator

    def run(self) -> dict[str, float | None]:
        """Evaluate.

        Returns:
            The metrics of the model, and with the prefix ``ema_`` those of its average.
        """
        self.runner.call_hook("before_val")
        metrics: dict[str, float | None] = {}
        for prefix, network in self.runner.networks().items():
            set_place(f"in the evaluation after epoch {self.runner.epoch}")
            found = self.evaluate(network)
            release(network)
            metrics.update({prefix + key: value for key, value in found.items()})
        self.runner.call_hook("after_val")
        self.runner.last_metrics = metrics
        return metrics


@torch.no_grad()
def evaluate(
    network: nn.Module, preprocess: nn.Module, loader: DataLoader[Any], precision: str
) -> dict[str, float | None]:
    """Evaluate a classifier on this process's share of a data set: exact on any number of them.

    Args:
        network: images -> logits; evaluated at the temperature that it has, left in the mode that
            it was in.
        preprocess: ``(batch, training) -> (images, labels)``.
        loader: disjoint shares over the processes, without padding.
        precision: autocast type of the forward pass, ``"fp32"``, ``"bf16"`` or ``"fp16"``.

    Returns:
        See :meth:`kw.evaluation.Accuracy.compute`.
    """
    training = network.training
    network.eval()
    device = next(network.parameters()).device
    accuracy = Accuracy(device)
    for batch in loader:
        images, labels = preprocess(batch, False)
        with autocast(precision, device.type):
            logits = network(images)
        accuracy.update(logits, labels)
    network.train(training)
    host_barrier("at the end of an evaluation")
    return {**accuracy.compute()}
