"""Training, from top to bottom: set-up, epochs, updates, evaluation, checkpoints.

An update is one step of the optimizer. Gradients are accumulated inside it, so that schedules, logs
and checkpoints count the same thing on one GPU and on a hundred. Nothing in an update is read from
the device, so that the host never waits for it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from ..config import ConfigError
from ..config.run_schema import RunConfig
from ..data import Loader, TrainBatchSampler, deaths_explained
from ..errors import Interrupted
from ..warehouse import get_temperature, has_temperature, set_temperature
from .average import MovingAverage
from .distributed import Process, average_batch_norm, host_barrier
from .finite import FiniteGuard
from .interruption import Agreement, Signals
from .parallel import across_processes, gather, release, sharded_modules, whole_norm
from .precision import autocast
from .presence import set_place
from .saving import Checkpoints, checkpoint_name
from .schedule import Schedule
from .state import placed_state, resume, run_state
from .task import Metrics, Task, headline

if TYPE_CHECKING:
    from .hooks import Hook, LoggerHook


def set_seed(seed: int) -> None:
    """Seed the generators of Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Updater:
    """One optimizer update: for each micro-batch forward and backward; then clip and step.

    An update whose loss or gradient is not finite has no effect (:mod:`kw.training.finite`).

    Args:
        optimizer: of the parameters.
        accumulation: micro-batches per update; each contributes the same share.
        clip_grad: largest global L2 norm of the gradient, or ``None``.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"`` (with dynamic loss scaling).
        device_type: where autocast applies.

    Attributes:
        grad_norm: the gradient's norm before clipping; None without clipping.
        guard: which updates were skipped.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        accumulation: int = 1,
        clip_grad: float | None = None,
        precision: str = "fp32",
        device_type: str = "cpu",
    ) -> None:
        self.optimizer = optimizer
        self.accumulation = accumulation
        self.clip_grad = clip_grad
        self.precision = precision
        self.device_type = device_type
        self.grad_norm: Tensor | None = None
        self.guard = FiniteGuard()
        self.scaler = torch.amp.GradScaler(device_type, enabled=precision == "fp16")
        self._micro_batch = 0
        self._sharded: list[FSDPModule] | None = None

    @contextmanager
    def forward(self, model: nn.Module) -> Iterator[None]:
        """The context of a micro-batch's forward pass and loss.

        Gradients are reduced over the processes in the backward pass of the last micro-batch alone.
        """
        if self._micro_batch == 0:
            self.guard.begin(model)
            if self._sharded is None:
                self._sharded = sharded_modules(model)[:1]  # the outermost sets those inside
        is_last = self._micro_batch == self.accumulation - 1
        for module in self._sharded or ():
            module.set_requires_gradient_sync(is_last)
        with ExitStack() as stack:
            if not is_last and isinstance(model, nn.parallel.DistributedDataParallel):
                stack.enter_context(model.no_sync())
            stack.enter_context(autocast(self.precision, self.device_type))
            yield

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's share to the gradients."""
        loss = self.guard.marked(loss / self.accumulation)
        self.scaler.scale(loss).backward()
        self._micro_batch += 1

    def step(self) -> None:
        """Clip, and update if loss and gradient are finite; the gradients are still there."""
        self._micro_batch = 0
        scaled = self.scaler.is_enabled()
        if scaled:
            self.scaler.unscale_(self.optimizer)
        norm = None
        if self.clip_grad is not None or not scaled:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            gradients = [p.grad for p in parameters if p.grad is not None]
            norm = whole_norm(nn.utils.get_total_norm(gradients))
            if self.clip_grad is not None:
                self.grad_norm = norm
                nn.utils.clip_grads_with_norm_(parameters, self.clip_grad, norm)
        self.guard.step(self.optimizer, self.scaler, None if scaled else norm)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """State of optimizer, loss scaler and guard: tensors and plain types."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self.guard.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], settings: Collection[str] = ()) -> None:
        """Restore :meth:`state_dict`; ``settings``: see :func:`kw.training.state.placed_state`."""
        self.optimizer.load_state_dict(placed_state(state["optimizer"], self.optimizer, settings))
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if "skipped" in state:  # checkpoints of earlier versions have none
            self.guard.load_state_dict(state["skipped"])


class Trainer:
    """A training run.

    Args:
        task: what is trained.
        config: how it is trained.
        process: this process.
        work_dir: where configuration, logs, checkpoints and results go.
        train_loader: the training images.
        val_loader: what the task's evaluation reads.
        optimizer: of the task's parameters.
        average: of the network, where it has one (:func:`kw.training.parallel.distribute`).
        hooks: called around updates and epochs, in this order.
        resume_from: checkpoint to continue from.

    Attributes:
        epoch: epochs done.
        update: updates done.
        best: best score so far; -1 before there is one.
        stops: set it to end the run after the current epoch.
        batches: the micro-batches of the last update.
        data_seconds: seconds of waiting for batches since the last log line.
        last_metrics: of the last evaluation.
        board: the run's loggers, in the main process while training.
        resumed: ``meta`` of the checkpoint that the run goes on from.
        unevaluated: whether that one was written before its epoch's evaluation, which is due.
    """

    def __init__(
        self,
        task: Task,
        config: RunConfig,
        process: Process,
        work_dir: Path,
        train_loader: Loader,
        val_loader: Loader,
        optimizer: Optimizer,
        average: MovingAverage | None = None,
        hooks: Sequence[Hook] = (),
        resume_from: Path | None = None,
    ) -> None:
        sampler = train_loader.batch_sampler
        assert isinstance(sampler, TrainBatchSampler)
        self.task, self.config, self.process, self.work_dir = task, config, process, work_dir
        self.train_loader, self.val_loader, self.sampler = train_loader, val_loader, sampler
        self.optimizer = optimizer
        self.hooks = list(hooks)
        names = [type(hook).__name__ for hook in hooks]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"hooks: two classes are called {twice[0]}, as their states would be")
        self.resume_from = resume_from
        # Ranks draw different drop paths; the seeds of data do not depend on the rank.
        set_seed(config.seed + process.rank)
        self.model = across_processes(task.model, config.distributed, process)
        self.updates_per_epoch = sampler.updates_per_epoch
        self.schedule = Schedule(config, self.updates_per_epoch)
        self.updater = Updater(
            optimizer,
            sampler.accumulation,
            config.optimizer.clip_grad,
            config.precision,
            process.device.type,
        )
        self.average = average
        self.checkpoints = Checkpoints(work_dir, config.checkpoint.keep)
        self.signals = Signals()
        self.epoch = 0
        self.update = 0
        self.best = -1.0
        self.stops = False
        self.batches: list[Any] = []
        self.data_seconds = 0.0
        self.last_metrics: dict[str, float | None] = {}
        self.board: LoggerHook | None = None
        self.resumed: dict[str, Any] | None = None
        self.unevaluated = False
        self._anneals = has_temperature(task.network)
        self._temperature: float | None = None

    @property
    def is_finished(self) -> bool:
        """Whether all epochs are done."""
        return self.epoch >= self.config.epochs

    @property
    def is_due(self) -> bool:
        """Whether an evaluation is due after the epoch that is done."""
        return self.epoch % self.config.eval_interval == 0 or self.is_finished or self.stops

    @property
    def updates_of_epoch(self) -> int:
        """Updates done of the epoch under way."""
        return self.update - self.epoch * self.updates_per_epoch

    @property
    def line_is_due(self) -> bool:
        """Whether a log line is due: after every ``log_interval``-th update of an epoch, and its
        last."""
        done = self.updates_of_epoch
        return done % self.config.log_interval == 0 or done == self.updates_per_epoch

    # --- the run ------------------------------------------------------------------------------

    def run(self) -> dict[str, float | None]:
        """:meth:`train`, ending on a signal; waits for the last checkpoint in any case.

        Raises:
            Interrupted: a signal to end came; a checkpoint is written.
        """
        try:
            with self.signals.watched(), deaths_explained(self.train_loader, self.val_loader):
                return self.train()
        finally:
            self.checkpoints.wait()
            for hook in self.hooks:
                hook.close(self)

    def train(self) -> dict[str, float | None]:
        """Train and evaluate epoch by epoch; returns the last metrics."""
        self.load()
        self._agreement = Agreement(self.process)
        self._saved_at = time.monotonic()
        for hook in self.hooks:
            hook.before_training(self)
        if self.unevaluated:
            self.end_epoch()
        while not self.is_finished and not self.stops:
            self.train_epoch()
            self.end_epoch()
        self.checkpoints.finish()
        for hook in self.hooks:
            hook.after_training(self)
        return self.last_metrics

    def end_epoch(self) -> None:
        """What follows the updates of an epoch: evaluation, checkpoint, hooks."""
        metrics: dict[str, float | None] | None = None
        if self.is_due:
            # A metric that fails does so the first time: the epoch is not to be lost.
            if not self.last_metrics and not self.unevaluated:
                self._save(None, False, None)
            metrics = self.evaluate()
        self.save_epoch(metrics)
        is_last = self.is_finished or self.stops
        for hook in self.hooks:
            hook.after_epoch(self, metrics)
        if self.stops and not is_last:
            self.save_epoch(metrics or self.evaluate())

    def train_epoch(self) -> None:
        """One pass over the training images, or what a resumed run has left of it."""
        done = self.updates_of_epoch
        self.sampler.set_epoch(self.epoch, done)
        if done == 0:
            self.updater.guard.begin_epoch()
        for hook in self.hooks:
            hook.before_epoch(self)
        self.model.train()
        set_place(f"at the start of epoch {self.epoch + 1}, loading images")
        batches = iter(self.train_loader)
        for index in range(done, self.updates_per_epoch):
            losses = self.run_update(index, batches)
            self.update += 1
            for hook in self.hooks:
                hook.after_update(self, losses)
            self.save_within_epoch()
        host_barrier(f"at the end of epoch {self.epoch + 1}")
        average_batch_norm(self.model)
        if self.average is not None:
            self.average.copy_buffers(self.task.network)
        self.epoch += 1

    def run_update(self, index: int, batches: Iterator[Any]) -> dict[str, Tensor]:
        """The epoch's ``index``-th update (from 0); its losses, means over its micro-batches."""
        self._set_rates(self.update)
        place = f"in update {index + 1} of epoch {self.epoch + 1}"
        sums: dict[str, Tensor] = {}
        self.batches = []
        for _ in range(self.updater.accumulation):
            batch = self._next_batch(batches, place)
            with self.updater.forward(self.model):
                losses = self.model(batch)
            self.updater.backward(losses["loss"])
            for name, value in losses.items():
                sums[name] = value.detach() + sums.get(name, 0)
        self.updater.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update(self.task.network, updates_before=self.update)
        return {name: value / self.updater.accumulation for name, value in sums.items()}

    def _set_rates(self, update: int) -> None:
        """Learning rate and temperature of an update."""
        lr = self.schedule.lr(update)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        temperature = self.schedule.temperature(update)
        if self._anneals and temperature != self._temperature:
            set_temperature(self.task.network, temperature)
            self._temperature = temperature

    def _next_batch(self, batches: Iterator[Any], place: str) -> Any:
        set_place(f"{place}, loading images")
        began = time.perf_counter()
        batch = next(batches)
        self.data_seconds += time.perf_counter() - began
        self.batches.append(batch)
        set_place(place)
        return batch

    def evaluate(self) -> dict[str, float | None]:
        """Evaluate the network and, with the prefix ``ema_``, its moving average."""
        metrics: dict[str, float | None] = {}
        networks = {"": self.task.network}
        if self.average is not None:
            networks["ema_"] = self.average.network
        for prefix, network in networks.items():
            set_place(f"in the evaluation after epoch {self.epoch}")
            gather(network)
            found = self.task.evaluate(network)
            release(network)
            metrics.update({prefix + name: value for name, value in found.items()})
        self.last_metrics = metrics
        for hook in self.hooks:
            hook.after_evaluation(self, metrics)
        return metrics

    # --- checkpoints --------------------------------------------------------------------------

    def load(self) -> None:
        """Continue from ``resume_from``, where it is given, and write the configuration.

        Raises:
            CheckpointError: it cannot be read, or is of another run.
        """
        if self.resume_from is not None and self.resumed is None:
            self.resumed = resume(self, self.resume_from)
            self._set_rates(max(self.update - 1, 0))  # checkpoints have those of the last update
            evaluated = self.resumed.get("metrics") is not None or self.updates_of_epoch > 0
            self.unevaluated = not evaluated and self.is_due
            if self.process.is_main:
                # The run may have been killed between writing a checkpoint and naming it.
                meta = self.resumed
                is_best, metrics = meta.get("is_best"), meta.get("metrics")
                best = self._results(metrics, meta["epoch"]) if is_best else None
                self.checkpoints.name(self.resume_from, best)
        path = self.work_dir / self.task.config_name
        # A finished run keeps what it was trained with.
        if self.process.is_main and not (self.is_finished and path.exists()):
            path.write_text(self.task.config_text, encoding="utf-8")

    def save_epoch(self, metrics: Metrics | None) -> None:
        """A checkpoint after an epoch, if it is the best so far, is due, or is the last."""
        self.checkpoints.report_failure()
        score: float | None = None if metrics is None else headline(metrics)[self.task.score]
        is_best = score is not None and score > self.best
        self.best = self.best if score is None else max(score, self.best)
        is_due = self.epoch % self.config.checkpoint.interval == 0
        if is_best or is_due or self.is_finished or self.stops:
            self._save(metrics, is_best, None)

    def save_within_epoch(self) -> None:
        """A checkpoint within an epoch, where one is due; ends the run after a signal.

        Raises:
            Interrupted: a signal came, here or on another process.
        """
        self.checkpoints.report_failure()
        settings = self.config.checkpoint
        waited = time.monotonic() - self._saved_at
        late = settings.minutes is not None and waited > 60 * settings.minutes
        late, stop = self._agreement.exchange(
            late and self.process.is_main, self.signals.name is not None
        )
        due = late or (settings.updates is not None and self.update % settings.updates == 0)
        epoch_ends = self.updates_of_epoch == self.updates_per_epoch
        if stop or (due and not epoch_ends):
            path = self._save(None, False, self.update)
            if stop:
                self.checkpoints.finish()
                raise Interrupted(self.signals.name or "another process was told to end", str(path))

    def _save(self, metrics: Metrics | None, is_best: bool, update: int | None) -> Path:
        host_barrier("gathering a checkpoint")
        state = run_state(self, metrics, is_best)
        self._saved_at = time.monotonic()
        path = self.work_dir / checkpoint_name(self.epoch, update)
        if self.process.is_main:
            best = self._results(metrics, self.epoch) if is_best else None
            self.checkpoints.write(state, path, best)
        return path

    def _results(self, metrics: Metrics | None, epoch: int) -> dict[str, Any]:
        parameters = sum(p.numel() for p in self.task.network.parameters())
        results = {**headline(metrics or {}), "epoch": epoch, "params": parameters}
        if self._anneals:
            # Above 0 the network is not what it is to become: it still uses its one-hot start.
            results["temperature"] = round(get_temperature(self.task.network), 6)
        return results
