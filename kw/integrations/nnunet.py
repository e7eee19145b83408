"""nnU-Net: trainers whose network is converted where it is built, for training and for prediction.

nnU-Net finds them by name (``-tr nnUNetTrainerKW``) in the folder that ``nnUNet_extTrainer`` names:
``kw/integrations/nnunet_trainers``, or one of yours whose file has a subclass with settings. The
conversion is written into the ``plans.json`` beside the checkpoints, from which prediction repeats
it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .core import Recipe, host, plans_of, refuse_other, repeat

_KEY = "kernelwarehouse"
host("nnunetv2", "2.8")

from nnunetv2.run.load_pretrained_weights import load_pretrained_weights  # noqa: E402
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer  # noqa: E402


class KernelWarehouse:
    """First base of a trainer: ``class Mine(KernelWarehouse, nnUNetTrainer_250epochs)``.

    Segmentation heads and transposed convolutions stay static. Networks without BatchNorm, which
    are nnU-Net's, get LayerNorm in their attention branches: batches may be small.

    Attributes:
        recipe: plan, settings and annealing.
        static_weights: a checkpoint of the static network with these plans, from which a kept start
            begins; default: the one that the variable ``KW_STATIC_WEIGHTS`` names.
            (``-pretrained_weights`` takes checkpoints of converted networks.)
    """

    recipe = Recipe()
    static_weights: str | None = None

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The static network, converted: as ``plans.json`` says, or anew by the recipe.

        Raises:
            AssertionError: of nnU-Net, static weights that do not fit.
            ValueError: static weights with an annealed start, or what :func:`kw.convert` refuses.
        """
        network = super().build_network_architecture(  # type: ignore[misc]
            plans_manager,
            configuration_manager,
            num_input_channels,
            num_output_channels,
            enable_deep_supervision,
        )
        if _KEY in plans_manager.plans:
            with _one_place_each(network):
                return repeat(network, plans_manager.plans[_KEY])
        weights = cls.static_weights or os.environ.get("KW_STATIC_WEIGHTS")
        if weights and cls.recipe.anneal:
            raise ValueError(
                f"an annealed start replaces the weights of {weights}; drop one of the two"
            )
        if weights:
            load_pretrained_weights(network, weights)
        heads = getattr(getattr(network, "decoder", None), "seg_layers", ())
        example = torch.zeros(2, num_input_channels, *configuration_manager.patch_size)
        with _one_place_each(network):
            network.get_classifier = lambda: tuple(heads)  # they stay static
            cls.recipe.convert(network, example)
            del network.get_classifier
        plans_manager.plans[_KEY] = plans_of(network)
        return network

    def initialize(self) -> None:
        """Convert anew: the recipe's start is wanted, and a checkpoint's weights may follow."""
        self.plans_manager.plans.pop(_KEY, None)  # type: ignore[attr-defined]
        super().initialize()  # type: ignore[misc]

    def load_checkpoint(self, filename_or_checkpoint: Any) -> None:
        """As nnU-Net.

        Raises:
            ValueError: of another conversion.
        """
        me: Any = self
        super().load_checkpoint(filename_or_checkpoint)  # type: ignore[misc]
        refuse_other(me.my_init_kwargs["plans"].get(_KEY), me.plans_manager.plans[_KEY])

    def on_train_start(self) -> None:
        super().on_train_start()  # type: ignore[misc]
        me: Any = self
        self.recipe.check(me.num_epochs, None if me.current_epoch else me.network)

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()  # type: ignore[misc]
        self.update = 0

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Set the temperature, then train on a batch."""
        me: Any = self
        epoch = me.current_epoch + self.update / me.num_iterations_per_epoch
        self.recipe.set_temperature(epoch, me.network)
        self.update += 1
        result: dict[str, Any] = super().train_step(batch)  # type: ignore[misc]
        return result

    def on_train_end(self) -> None:
        super().on_train_end()  # type: ignore[misc]
        me: Any = self
        self.recipe.end(me.network)


class nnUNetTrainerKW(KernelWarehouse, nnUNetTrainer):
    """Starts as the static network and is dynamic from the first update."""


class nnUNetTrainerKWAnnealed(KernelWarehouse, nnUNetTrainer):
    """The paper's start: the temperature falls over a fifteenth of nnU-Net's 1,000 epochs."""

    recipe = Recipe(anneal=67)


@contextmanager
def _one_place_each(network: nn.Module) -> Iterator[None]:
    """Inside it, every module is registered once. nnU-Net registers a convolution also in the
    sequence that calls it, and the encoder also in the decoder; afterwards they are so again."""
    before = {parent: dict(parent._modules) for parent in network.modules()}
    homes: dict[nn.Module | None, tuple[nn.Module, str]] = {}
    for in_sequence in (True, False):
        for parent, children in before.items():
            if isinstance(parent, nn.Sequential | nn.ModuleList) == in_sequence:
                for name, child in children.items():
                    if (
                        homes.setdefault(child, (parent, name)) != (parent, name)
                        and not in_sequence
                    ):
                        del parent._modules[name]
                        parent.__dict__[name] = child  # found by its name, but not by traversals
    try:
        yield
    finally:
        for parent, children in before.items():
            for name, child in children.items():
                parent.__dict__.pop(name, None)
                home, key = homes[child]
                children[name] = home._modules[key]
        for parent, children in before.items():
            parent._modules.clear()
            parent._modules.update(children)
