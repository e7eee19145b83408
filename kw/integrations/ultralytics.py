"""Trainers for Ultralytics YOLO whose networks are dynamic: detect, segment, classify, pose.

``YOLO("yolo11n.pt").train(trainer=trainer(cell_num_ratio=1), data=...)``; see docs/ultralytics.md.
Checkpoints of Ultralytics hold whole modules: opening one imports this module.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import say
from ..warehouse import KWConv2d, KWLayer, Plan, Warehouse
from ..warehouse.attention import KernelAttention
from .core import Recipe, plans_of, repeat

_NEEDS = (
    "kw.integrations.ultralytics needs Ultralytics 8.4, from 8.4.190 on: pip install "
    "'ultralytics>=8.4.190,<8.5'"
)
try:
    from thop.profile import register_hooks
    from ultralytics import __version__
    from ultralytics.engine.trainer import BaseTrainer
    from ultralytics.models import yolo
    from ultralytics.nn.modules import Classify, Conv, DWConv, RepConv
    from ultralytics.nn.modules.block import RepVGGDW
    from ultralytics.utils import DEFAULT_CFG
    from ultralytics.utils.torch_utils import unwrap_model
except ImportError as error:
    raise ImportError(f"{_NEEDS}; {type(error).__name__}: {error}") from error
if not (8, 4, 190) <= tuple(map(int, re.findall(r"\d+", __version__)[:3])) < (8, 5):
    raise ImportError(f"{_NEEDS}; this is {__version__}")

_VARIABLE = "KW_ULTRALYTICS_RECIPE"
# Ends the first name in a converted network's yaml, so that a trainer that would build the static
# network from it, and load what fits, stops at this message.
_MARK = " of a converted network: use train(trainer=kw.integrations.ultralytics.trainer(), ...)"


class DynamicConv(nn.Module):
    """A ``Conv`` whose convolution is dynamic. It is not a ``Conv``, because ``fuse()`` would merge
    the normalisation of one into its weight, and this kernel is another for every image."""

    conv: nn.Module
    bn: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """``[B, I, H, W]`` -> ``[B, O, H', W']``."""
        y: Tensor = self.act(self.bn(self.conv(x)))
        return y


def _count(layer: KWConv2d, _inputs: Any, output: Tensor) -> None:
    """Multiply-adds, for the GFLOPs that Ultralytics prints: of assembly and convolution."""
    kernel = torch.Size(layer.partition.kernel_shape).numel()
    each = layer.warehouse.partition.cells + output[0, 0].numel()
    layer.total_ops += len(output) * kernel * each


register_hooks[KWConv2d] = _count


def _static(model: Any, freeze: Any) -> str:
    """A pattern for the names of layers that stay static: of the head, which depends on the
    classes; of frozen modules; and of modules whose kernels ``fuse()`` adds."""
    last = len(model.model) - 1
    frozen = range(freeze) if isinstance(freeze, int) else freeze or ()
    inside = [f"model.{place}" for place in frozen]
    if not isinstance(model.model[last], Classify):
        inside.append(f"model.{last}")
    for name, module in model.named_modules():
        plain = type(module) in (Conv, DWConv) or not isinstance(module, Conv)
        if isinstance(module, RepConv | RepVGGDW) or not plain:
            inside.append(name)
    return rf"({'|'.join(map(re.escape, inside))})\..+" if inside else ""


class _Dynamic(BaseTrainer):
    """What the trainers add to those of Ultralytics.

    Args:
        recipe: how the network becomes dynamic; ``None``: as the trainer that started this process
            on one of several GPUs, or the plan ``"auto"``.
    """

    def __init__(
        self,
        cfg: Any = DEFAULT_CFG,
        overrides: dict[str, Any] | None = None,
        _callbacks: dict[str, Any] | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        self.recipe = recipe or Recipe(**json.loads(os.environ.get(_VARIABLE, "{}")))
        super().__init__(cfg, overrides, _callbacks)
        if self.args.quantize == 8:
            raise ValueError("quantize=8 knows static convolutions only; train without it")
        self.recipe.check(self.epochs)

    def train(self) -> None:
        """As Ultralytics; the processes that it starts on several GPUs get the recipe."""
        if self.ddp:
            os.environ[_VARIABLE] = json.dumps(asdict(self.recipe))
        try:
            super().train()
        finally:
            if self.ddp:
                del os.environ[_VARIABLE]

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
        """A dynamic network, from static weights or those of a converted network.

        Raises:
            ValueError: as :func:`kw.convert`; a plan for layers that stay static; weights of a
                converted network that does not fit, or that was fused.
        """
        if isinstance(cfg, dict):
            cfg = copy.deepcopy(cfg)
            cfg["backbone"][0][2] = cfg["backbone"][0][2].removesuffix(_MARK)
        plans = plans_of(weights) if isinstance(weights, nn.Module) else []
        model = super().get_model(cfg, None if plans else weights, verbose)
        static = _static(model, self.args.freeze)
        if plans:
            self._go_on(model, weights, plans)
        else:
            settings = dict(self.recipe.settings)
            if self.recipe.plan == "auto":  # a user's pattern comes on top
                both = filter(None, (static, settings.get("static")))
                settings["static"] = "|".join(f"(?:{pattern})" for pattern in both)
            size = 224 if self.args.task == "classify" else 640
            example = torch.zeros(2, self.data["channels"], size, size)
            replace(self.recipe, settings=settings).convert(model, example)
        for name, module in model.named_modules():
            if isinstance(module, KWLayer) and re.fullmatch(static, name):
                raise ValueError(
                    f"layer {name!r} is converted but has to be static: it is of the head, frozen, "
                    "or fused; leave it out of the plan, or freeze nothing"
                )
            if isinstance(module, Conv) and isinstance(module.conv, KWLayer):
                module.__class__ = DynamicConv
        model.kw_recipe = asdict(self.recipe)
        model.yaml = copy.deepcopy(model.yaml)
        model.yaml["backbone"][0][2] += _MARK
        return model

    def _go_on(self, model: Any, weights: nn.Module, plans: list[dict[str, Any]]) -> None:
        """Convert a static network as another one was, and give it that one's weights."""
        if self.resume:
            self.recipe = Recipe(**getattr(weights, "kw_recipe", {}))
        repeat(model, plans)
        model.load(weights)
        theirs, head = weights.state_dict(), f"model.{len(model.model) - 1}."
        for name, value in model.state_dict().items():
            found = theirs.get(name, torch.empty(0)).shape
            if found != value.shape and not name.startswith(head):
                raise ValueError(
                    f"the converted network that is to go on has no {name!r} of {[*value.shape]}: "
                    "it is of another size, or was fused by predict, val or export; open its file "
                    "again"
                )
        if not self.resume:
            self.recipe.convert(model)  # says that it is converted already

    def run_callbacks(self, event: str) -> None:
        """As Ultralytics; the network and its average get the temperature first."""
        if event == "on_train_epoch_start":
            self._batch = 0
        if event == "on_train_batch_start":
            # Equal in both before an update: the average, which averages it too, then has it after.
            done = self.epoch + self._batch / len(self.train_loader)
            if self.recipe.anneal or not self._batch:
                network = unwrap_model(self.model)
                network = getattr(network, "student_model", network)  # a teacher keeps its own
                self.recipe.set_temperature(done, network, self.ema.ema if self.ema else None)
            self._batch += 1
        if event == "on_train_end":
            self.recipe.end(unwrap_model(self.model))
        super().run_callbacks(event)

    def build_optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """As Ultralytics; but no Muon for cells and attention, of which it would make one matrix
        orthogonal that is none, and no fast warm-up for logits, which begin as trained ones."""
        optimizer = super().build_optimizer(model, *args, **kwargs)
        own = [m for m in model.modules() if isinstance(m, Warehouse | KernelAttention)]
        values = {id(p) for module in own for p in module.parameters()}
        for name, into in (("muon", "weight"), ("bias", "bn")):
            groups = [g for g in optimizer.param_groups if g["param_group"] == name]
            target = [g for g in optimizer.param_groups if g["param_group"] == into][-1]
            for group in groups:
                target["params"] += [p for p in group["params"] if id(p) in values]
                group["params"] = [p for p in group["params"] if id(p) not in values]
            if name == "muon" and groups:
                say("MuSGD: cells and attention branches are trained by its SGD, without Muon")
        return optimizer


class DetectionTrainer(_Dynamic, yolo.detect.DetectionTrainer):
    """Ultralytics' trainer for detection, with a dynamic network."""


class SegmentationTrainer(_Dynamic, yolo.segment.SegmentationTrainer):
    """Ultralytics' trainer for instance segmentation, with a dynamic network."""


class ClassificationTrainer(_Dynamic, yolo.classify.ClassificationTrainer):
    """Ultralytics' trainer for classification, with a dynamic network."""


class PoseTrainer(_Dynamic, yolo.pose.PoseTrainer):
    """Ultralytics' trainer for poses, with a dynamic network."""


_TRAINERS = {
    "detect": DetectionTrainer,
    "segment": SegmentationTrainer,
    "classify": ClassificationTrainer,
    "pose": PoseTrainer,
}


def trainer(
    plan: Any = "auto", *, anneal: float = 0.0, **settings: Any
) -> Callable[..., BaseTrainer]:
    """What ``YOLO.train(trainer=...)`` takes, for the task of the network.

    Args:
        plan: as for :func:`kw.convert`.
        anneal: epochs over which the temperature falls from 1 to 0, for training from nothing; 0:
            the network starts as the static one.
        **settings: of all warehouses, such as ``cell_num_ratio=4``.

    Raises:
        ValueError: settings that contradict each other; later, a task without a trainer.
    """
    plan = plan.to_mapping() if isinstance(plan, Plan) else plan
    return functools.partial(_of_task, Recipe(plan, settings, anneal))


def _of_task(
    recipe: Recipe, cfg: Any = DEFAULT_CFG, overrides: Any = None, _callbacks: Any = None
) -> BaseTrainer:
    task = (overrides or {}).get("task")
    if task not in _TRAINERS:
        raise ValueError(f"task {task!r} has no dynamic trainer; {', '.join(_TRAINERS)} have")
    return _TRAINERS[task](cfg, overrides, _callbacks, recipe)
