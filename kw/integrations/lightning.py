"""Lightning: a callback that converts a module's network and sets its temperature.

For trainers of ``lightning`` and of ``pytorch_lightning``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ..warehouse.temperature import has_temperature, set_temperature
from .core import Recipe, host, plans_by_part, plans_of, refuse_other, repeat

_KEY = "kernelwarehouse"


def _callbacks() -> list[type]:
    """``Callback`` of each package that is installed: a trainer insists on its own."""
    found, errors = [], []
    for package, module in (("lightning", "lightning.pytorch"), ("pytorch_lightning", None)):
        try:
            found.append(host(package, "2.6", module).Callback)
        except ImportError as error:
            errors.append(str(error))
    if not found:
        raise ImportError("; ".join(errors))
    return found


class KernelWarehouse(*_callbacks()):  # type: ignore[misc]
    """Converts the network of a ``LightningModule`` before its optimizer is made, and sets the
    temperature before every update, also of averages that other callbacks keep.

    Args:
        recipe: plan, settings and annealing; default: the derived plan, from the module's weights.
        network: the attribute that is converted, ``""`` for the module itself. Default: its only
            child with parameters. It must be there after ``__init__`` or ``configure_model``.
        example: for the plan ``"auto"``, inputs of that network. Default: the module's
            ``example_input_array``, else images of the network's size.
    """

    def __init__(
        self, recipe: Recipe | None = None, network: str | None = None, example: Any = None
    ) -> None:
        self.recipe = Recipe() if recipe is None else recipe
        self.network, self.example = network, example
        self.temperature: float | None = None

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        """Convert, in every stage: tests and predictions load checkpoints of converted networks.

        Raises:
            ValueError: a strategy that splits parameters or trains a copy of the module, an average
                that was made already, or what :func:`kw.convert` refuses.
        """
        kinds = [kind.__name__ for kind in type(trainer.strategy).__mro__]
        whole = {"SingleDeviceStrategy", "DDPStrategy"}
        if not {*kinds} & whole or "DeepSpeedStrategy" in kinds:  # whose base is DDP's
            raise ValueError(f"{kinds[0]}: layers share their cells, which it splits; use 'ddp'")
        module.configure_model()  # does nothing unless the user has written one
        network = self._network(module)
        if has_temperature(network):
            return
        launcher = type(trainer.strategy.launcher).__name__
        if stage == "fit" and launcher == "_MultiProcessingLauncher":
            # Lightning would load what fits into the module here, which stays static, and no word
            # of it: https://github.com/Lightning-AI/pytorch-lightning/issues/14534
            raise ValueError(
                f"{kinds[0]} trains copies in processes that it starts, in notebooks for instance: "
                "convert before fit, by recipe.convert(module.network), or use 'ddp' in a script"
            )
        if _averages(trainer, module):
            raise ValueError("a callback has copied the static network; put KernelWarehouse first")
        example = module.example_input_array if self.example is None else self.example
        if isinstance(example, torch.Tensor) and len(example) == 1:
            example = torch.cat([example, example])
        self.recipe.convert(network, example)

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        if not has_temperature(module):
            raise ValueError(
                f"{type(module).__name__} has built its network anew since it was converted; "
                "build it in __init__, or once: def configure_model(self): if self.model is None:"
            )
        goes_on = trainer.ckpt_path or trainer.global_step
        epochs = trainer.max_epochs if (trainer.max_epochs or -1) >= 0 else float("inf")
        self.recipe.check(epochs, None if goes_on else module)

    def on_train_start(self, trainer: Any, module: Any) -> None:
        updates = -(-trainer.num_training_batches // trainer.accumulate_grad_batches)
        if trainer.max_steps >= 0 and updates < float("inf"):
            self.recipe.check(trainer.max_steps / updates)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        every, batches = trainer.accumulate_grad_batches, trainer.num_training_batches
        if self.recipe.anneal and batches == float("inf"):
            raise ValueError(
                f"anneal is {self.recipe.anneal} epochs, but the training data has no length; say "
                "how many batches are an epoch: Trainer(limit_train_batches=...)"
            )
        # Batches whose gradients are added up have one temperature.
        epoch = trainer.current_epoch + index // every * every / batches
        self.temperature = self.recipe.set_temperature(epoch, module)

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        """An average of buffers lags behind the temperature: set it before the average is used."""
        for average in _averages(trainer, module) if self.temperature is not None else ():
            set_temperature(average, self.temperature)  # type: ignore[arg-type]

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.on_validation_start(trainer, module)
        self.recipe.end(module)

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        self.on_validation_start(trainer, module)
        checkpoint[_KEY] = plans_by_part(module)

    def on_load_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        _apply_plans(module, checkpoint)

    def _network(self, module: Any) -> nn.Module:
        children = [n for n, c in module.named_children() if any(True for _ in c.parameters())]
        if self.network is None and len(children) != 1:
            raise ValueError(
                f"{type(module).__name__} has {len(children)} parts with parameters "
                f"({', '.join(children) or 'none'}); say which is the network: "
                "KernelWarehouse(network=...), '' for the module itself"
            )
        network = module.get_submodule(children[0] if self.network is None else self.network)
        return getattr(network, "_orig_mod", network)  # torch.compile's wrapper has not yet run


class ConvertedModule:
    """First base of a ``LightningModule``: ``class Net(ConvertedModule, LightningModule)``.

    Its checkpoints, also those of weights alone, have the plans, and ``Net.load_from_checkpoint``
    builds the converted network from them, without trainer and callback.
    """

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        checkpoint[_KEY] = plans_by_part(self)  # type: ignore[arg-type]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        _apply_plans(self, checkpoint)


def _apply_plans(module: Any, checkpoint: dict[str, Any]) -> None:
    for name, plans in checkpoint.get(_KEY, {}).items():
        network = module.get_submodule(name)
        if not has_temperature(network):
            repeat(network, plans)
        else:
            refuse_other(plans, plans_of(network), f"the checkpoint's {name or 'network'}")


def _averages(trainer: Any, module: Any) -> list[nn.Module]:
    """The copies of the module that callbacks keep."""
    values = [value for callback in trainer.callbacks for value in vars(callback).values()]
    kinds = (AveragedModel, type(module))
    return [value for value in values if isinstance(value, kinds) and value is not module]
