"""mmengine's Runner with the parts replaced that current torch or exact training does not allow.

What is replaced, and why: checkpoints (mmengine's cannot be read with ``weights_only=True``), the
default hooks (they read the loss in every iteration), the DDP wrapper (it fails on CPU), the
environment report and the configuration dump (kw's own).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mmengine
import torch
import torch.distributed as dist
from mmengine.runner import Runner as _Runner
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from ..config.run_schema import RunConfig
from ..errors import one_line
from ..version import __version__
from .checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_network,
    refuse_other_classes,
    restore_rng_state,
    rng_state,
)
from .distributed import Process, batch_norm_buffers
from .hooks.bad_images import fault_logs
from .interruption import Signals
from .layout import number_as_now, resume_fault, settings_changed
from .parallel import gathered, wrap_ddp
from .saving import copied
from .schedule import Schedule
from .task import Metrics, Task

__all__ = ["Runner"]


class Runner(_Runner):
    """A training run.

    Args:
        task: what is trained.
        config: how it is trained.
        process: this process.
        schedule: learning rate and temperature.
        resume_from: checkpoint to continue from.
        **kwargs: what mmengine's Runner takes.

    Attributes:
        ema: the moving average's holder, set by its hook.
        best: best score so far.
        board: TensorBoard's writer, in the main process, set by the log hook before training.
        last_metrics: what the last evaluation found.
        resumed: ``meta`` of the checkpoint that the run goes on from.
        signals: whether the process was asked to end.
    """

    def __init__(
        self,
        *,
        task: Task,
        config: RunConfig,
        process: Process,
        schedule: Schedule,
        resume_from: Path | None,
        **kwargs: Any,
    ) -> None:
        self.task = task
        self.config = config
        self.process = process
        self.schedule = schedule
        self.resume_from = resume_from
        self.ema: nn.Module | None = None
        self.best = -1.0
        self.board: SummaryWriter | None = None
        self.last_metrics: dict[str, float | None] = {}
        self.resumed: dict[str, Any] | None = None
        self.signals = Signals()
        self._has_loaded = False
        launcher = "none" if process.world_size == 1 else "pytorch"
        super().__init__(launcher=launcher, model=task.model, **kwargs)

    def networks(self) -> dict[str, nn.Module]:
        """The networks to evaluate, by the prefix of their metrics."""
        networks = {"": self.task.network}
        if self.ema is not None:
            networks["ema_"] = self.ema
        return networks

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: nn.Module) -> nn.Module:
        """To the device, and into DDP where there are several processes that hold all of it."""
        model = model.to(self.process.device)
        if self.process.world_size == 1:
            return model
        distributed = self.config.distributed
        if distributed.strategy == "fsdp":
            return model  # sharded in place before its optimizer was made
        return wrap_ddp(model, self.process, distributed.bucket_mb)

    def register_default_hooks(self, hooks: Any = None) -> None:
        """None: every hook of a run is given."""

    def _init_model_weights(self) -> None:
        """Nothing: models are initialised when they are built, on all processes alike."""

    def get_hooks_info(self) -> str:
        """The hooks by name, in the order in which they run."""
        return ", ".join(type(hook).__name__ for hook in self._hooks)

    def _log_env(self, env_cfg: dict[str, Any]) -> None:
        device = self.process.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.logger.info(
            f"kernelwarehouse {__version__}, torch {torch.__version__}, "
            f"mmengine {mmengine.__version__}, {self.process.world_size} process(es) on {name}"
        )

    @property
    def is_finished(self) -> bool:
        """Whether all epochs are done."""
        return bool(self.epoch >= self.config.epochs)

    def dump_config(self) -> None:
        """Write the resolved configuration; of a run that goes on, once it is known to."""
        if self.resume_from is None:
            self._write_config()

    def _write_config(self) -> None:
        """What is trained from here on; a finished run keeps what it was trained with."""
        path = Path(self.work_dir, self.task.config_name)
        if self.process.is_main and not (self.is_finished and path.exists()):
            path.write_text(self.task.config_text)

    def load_or_resume(self) -> None:
        """Continue from ``resume_from``, where it is given."""
        if self.resume_from is None or self._has_loaded:
            return
        checkpoint = load_checkpoint(self.resume_from)
        source = str(self.resume_from)
        load_network(self.task.network, checkpoint["state_dict"], source)  # before what follows
        number_as_now(checkpoint, self.task.network, self.optim_wrapper.optimizer)
        refuse_other_classes(checkpoint, self.task.classes, source, "this run's data")
        fault = resume_fault(checkpoint, self.optim_wrapper.optimizer)
        if fault is not None:
            raise CheckpointError(f"{source} is of another run: {fault}")
        try:
            self.restore(checkpoint, source)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            if isinstance(error, CheckpointError):
                raise
            # What restores expects what saved wrote; anything may be in a file of other origin.
            raise CheckpointError(
                f"{source} is not laid out as this version writes it: {one_line(error)}"
            ) from error
        self._has_loaded = True
        self.logger.info(f"resumed {self.resume_from}: epoch {self.epoch}, update {self.iter}")
        if self.is_finished:
            self.logger.warning(
                f"{source}: its {self.epoch} epochs are done, epochs is {self.config.epochs}; "
                "nothing is trained"
            )
        elif changed := settings_changed(checkpoint["meta"].get("config"), self.task.config_text):
            self.logger.warning(
                "goes on with other settings than before:\n  " + "\n  ".join(changed)
            )
        self._write_config()

    def state(self, metrics: Metrics | None, is_best: bool = False) -> dict[str, Any]:
        """The run as a checkpoint; a collective call (see :mod:`kw.engine.checkpoint`)."""
        own = {
            "rng": rng_state(self.process.device),
            "norms": [buffer.cpu() for buffer in self._statistics()],
            "hooks": {
                type(hook).__name__: copied(hook.state_dict())
                for hook in self._hooks
                if hasattr(hook, "state_dict")
            },
        }
        ranks: list[Any] = [own]
        if self.process.world_size > 1:
            ranks = [None] * self.process.world_size
            dist.all_gather_object(ranks, own)
        checkpoint = {
            "meta": {
                "epoch": self.epoch,
                "iter": self.iter,
                "updates_per_epoch": self.schedule.updates_per_epoch,
                "config": self.task.config_text,
                "classes": self.task.classes,
                "best": self.best,
                "is_best": is_best,
                "metrics": metrics,
                "versions": {"kernelwarehouse": __version__, "torch": str(torch.__version__)},
            },
            "state_dict": gathered(self.task.network.state_dict(), self.process.is_main),
            "optimizer": gathered(self.optim_wrapper.state_dict(), self.process.is_main),
            "ranks": ranks,
            "bad_images": {name: log.state_dict() for name, log in fault_logs(self).items()},
        }
        if self.ema is not None:
            checkpoint["ema_state_dict"] = gathered(self.ema.state_dict(), self.process.is_main)
        return checkpoint

    def _statistics(self) -> list[Tensor]:
        """Running statistics that differ from process to process: within an epoch, of BatchNorm."""
        if self.process.world_size == 1:
            return []
        return batch_norm_buffers(self.task.network)

    def restore(self, checkpoint: dict[str, Any], source: str) -> None:
        """Continue where :meth:`state` was taken.

        Raises:
            CheckpointError: it is of another model, or of a run with other updates, or it holds
                weights alone.
        """
        if "optimizer" not in checkpoint:
            raise CheckpointError(
                f"{source} holds weights alone: it can be evaluated (tools/test.py), not resumed"
            )
        meta = checkpoint["meta"]
        done, per_epoch = meta["iter"], self.schedule.updates_per_epoch
        # Checkpoints of earlier versions do not say how many updates an epoch had.
        before = meta.get("updates_per_epoch", per_epoch)
        if before != per_epoch or not 0 <= done - meta["epoch"] * per_epoch <= per_epoch:
            raise CheckpointError(
                f"{source}: {done} updates in {meta['epoch']} epochs, {before} an epoch, where "
                f"this run makes {per_epoch} an epoch; resume with the total_batch_size and images "
                "that it was trained with, or begin another run with model.weights set to this file"
            )
        load_network(self.task.network, checkpoint["state_dict"], source)
        if self.ema is not None:
            average = checkpoint.get("ema_state_dict")
            if average is None:
                self.logger.warning(f"{source} has no EMA: the average starts from its weights")
                average = checkpoint["state_dict"]
            load_network(self.ema, average, source)
        self.optim_wrapper.load_state_dict(checkpoint["optimizer"])
        for name, log in fault_logs(self).items():
            log.load_state_dict(checkpoint.get("bad_images", {}).get(name, {"known": []}))
        self.best = meta["best"]
        self.train_loop.resume_from(meta["epoch"], done)
        self.resumed = meta
        within = done > meta["epoch"] * per_epoch
        self._restore_process(checkpoint["ranks"], source, within)

    def _restore_process(self, ranks: list[dict[str, Any]], source: str, within: bool) -> None:
        """What belongs to this process; ``within``: an epoch was under way."""
        if len(ranks) != self.process.world_size:
            also = ", nor are BatchNorm's statistics those of each process" if within else ""
            self.logger.warning(
                f"{source} was written by {len(ranks)} process(es): the recipe goes on with "
                f"{self.process.world_size}, but not to the bit: drop path draws other numbers, "
                f"gradients are summed in another order{also}"
            )
            return
        own = ranks[self.process.rank]
        restore_rng_state(own["rng"], self.process.device)
        for buffer, value in zip(self._statistics(), own["norms"], strict=True):
            buffer.copy_(value)
        if self.ema is not None:  # it copies buffers after each update
            buffers = dict(self.task.network.named_buffers())
            for name, buffer in self.ema.named_buffers():
                buffer.copy_(buffers[name])
        for hook in self._hooks:
            state = own["hooks"].get(type(hook).__name__)
            if state is not None and hasattr(hook, "load_state_dict"):
                hook.load_state_dict(state)
