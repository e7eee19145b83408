"""What is measured: an inference pass, or a training step in three parts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..torch_private import clear_compiled
from ..training.optim import build_optimizer
from ..training.precision import autocast
from ..training.trainer import Updater
from .cases import Source
from .conditions import DTYPES, Conditions

PARTS = {"inference": ("total",), "train": ("forward", "backward", "optimizer", "total")}
# So small that all rounds measure the same network; the update takes as long as any other.
LEARNING_RATE = 1e-8


class InferenceStep:
    """A forward pass of one batch in evaluation mode, without gradients."""

    def __init__(self, network: nn.Module, inputs: Tensor, conditions: Conditions) -> None:
        self.network = network.eval()
        self.inputs = inputs
        self.conditions = conditions

    def run(self, mark: Callable[[], None]) -> None:
        """One pass; ``mark`` is called at its end."""
        precision = DTYPES[self.conditions.dtype]
        with torch.no_grad(), autocast(precision, self.conditions.device):
            self.network(self.inputs)
        mark()


class TrainingStep:
    """A step on one batch as the trainer makes it: autocast forward and loss, backward, update.

    Gradients are set to ``None`` after the update, float16 has its loss scaling.
    """

    def __init__(
        self,
        network: nn.Module,
        source: Source,
        inputs: Tensor,
        targets: Tensor,
        conditions: Conditions,
    ) -> None:
        self.network = network.train()
        self.inputs, self.targets = inputs, targets
        self.loss = source.loss
        settings = source.optimizer
        self.optimizer: Optimizer = build_optimizer(network, settings, inputs.device)
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE
        self.updater = Updater(
            self.optimizer,
            clip_grad=settings.clip_grad,
            precision=DTYPES[conditions.dtype],
            device_type=conditions.device,
        )

    def run(self, mark: Callable[[], None] = lambda: None, *, clear: bool = True) -> None:
        """One step; ``mark`` is called after each part. Without ``clear`` gradients are kept."""
        with self.updater.forward(self.network):
            loss = self.loss(self.network(self.inputs), self.targets)
        mark()
        self.updater.backward(loss)
        mark()
        self.updater.step()
        if clear:
            self.optimizer.zero_grad()
        mark()


Step = InferenceStep | TrainingStep


def build_step(source: Source, backend: str, conditions: Conditions) -> Step:
    """Build a network and its batch, from a fixed seed, and the step that is measured.

    Raises:
        ValueError: the back end cannot do one of the layers.
    """
    torch.manual_seed(0)
    device = torch.device(conditions.device)
    network = source.build(backend)
    inputs, targets = source.example(conditions.batch_size, conditions.shape)
    if conditions.channels_last:  # as a run does it
        network = network.to(memory_format=torch.channels_last)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    network.to(device)
    inputs, targets = inputs.to(device), targets.to(device)
    if conditions.compile:
        # Networks of one class share compiled code: each adds an entry, and with more entries than
        # the limit PyTorch runs without compiling.
        clear_compiled(limit=64)
        network.compile()
    if conditions.mode == "inference":
        return InferenceStep(network, inputs, conditions)
    return TrainingStep(network, source, inputs, targets, conditions)
