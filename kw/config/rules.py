"""Rules between settings, beyond each setting's type and bounds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import pairwise
from typing import Any

from ..errors import UserError, did_you_mean
from ..registry import (
    DATASETS,
    HOOKS,
    LOGGERS,
    LOSSES,
    METRICS,
    OPTIMIZERS,
    SCHEDULES,
    TRANSFORMS,
    Registry,
    argument_fault,
    takes,
)
from .data_rules import check_data_rules
from .run_schema import RunConfig
from .schema import Config

Expect = Callable[..., None]
"""``(is right, what was expected, *keys)``: a rule; the first key is the one to look at."""

_OF_THE_MODEL = ("num_classes", "drop_rate", "drop_path_rate")
_WITHOUT_TEMPERATURE = ("condconv", "fdconv", "kerneldna")


def check_run_rules(config: RunConfig, expect: Expect) -> None:
    """The rules that hold for all runs; arguments as for :func:`check_rules`."""
    optimizer, schedule, epochs = config.optimizer, config.schedule, config.epochs
    right = config.total_batch_size % config.batch_size == 0
    expect(right, "a multiple of batch_size", "total_batch_size", "batch_size")
    key = "schedule.warmup_epochs"
    expect(schedule.warmup_epochs <= epochs, "at most epochs", key, "epochs")
    _check_entries(expect, "hooks", config.hooks, HOOKS)
    _check_entries(expect, "loggers", config.loggers, LOGGERS)
    names = {"adamw": ["lr", "weight_decay", "betas", "eps"]}
    names["sgd"] = ["lr", "weight_decay", "momentum", "nesterov"]
    own = names.get(optimizer.name, ["lr", "weight_decay"])
    _check_arguments(expect, "optimizer.args", optimizer.name, optimizer.args, OPTIMIZERS, 1, own)
    if optimizer.name in OPTIMIZERS and optimizer.weight_decay > 0:
        decays = takes(OPTIMIZERS[optimizer.name], "weight_decay")
        expected = f"0, because {optimizer.name} has no weight decay"
        expect(decays, expected, "optimizer.weight_decay", "optimizer.name")
    _check_arguments(expect, "schedule.args", schedule.name, schedule.args, SCHEDULES, 1)
    if schedule.name == "cosine":
        key = "schedule.final_lr"
        expect(schedule.final_lr <= optimizer.lr, "at most optimizer.lr", key, "optimizer.lr")
    elif schedule.name == "step":
        steps, key = schedule.milestones, "schedule.milestones"
        expected = "at least one epoch, e.g. [30, 60, 90], because schedule.name is 'step'"
        expect(bool(steps), expected, key)
        expect(all(a < b for a, b in pairwise(steps)), "epochs in rising order, none twice", key)
        expect(all(m < epochs for m in steps), "each less than epochs", key, "epochs")
    key = "temperature_epochs"
    expect(config.temperature_epochs <= epochs, "at most epochs", key, "epochs")
    if optimizer.name == "sgd" and optimizer.nesterov:
        expected = "false, because Nesterov's form needs a momentum"
        expect(optimizer.momentum > 0, expected, "optimizer.nesterov", "optimizer.momentum")


def _check_arguments(
    expect: Expect,
    key: str,
    name: str,
    given: Mapping[str, Any],
    registry: Registry[Any],
    passed: int = 0,
    own: Collection[str] = (),
) -> None:
    """Check an entry's name and its arguments, which stand at ``key``.

    The caller passes the leading ``passed``, other keys set those in ``own``.
    """
    try:
        entry = registry.find(name)
    except UserError as error:
        expect(False, f"another name: {error}", key.replace(".args", ".name"))
        return
    taken = [each for each in own if each in given]
    if taken:
        expect(False, f"no {taken[0]} among them, which has a key of its own", key)
    elif fault := argument_fault(entry, given, passed, own):
        expect(False, f"for {name}: {fault}", key)


def _check_entries(
    expect: Expect,
    key: str,
    given: Mapping[str, Mapping[str, Any]],
    registry: Registry[Any],
    passed: int = 0,
) -> None:
    """Check entries by name, each with its arguments."""
    for name, args in given.items():
        _check_arguments(expect, key, name, args, registry, passed)


def check_rules(config: Config, expect: Expect, check_model_name: bool) -> None:
    """The rules between the settings of a classifier.

    Args:
        config: settings of the right types and within their own bounds.
        expect: called for every rule.
        check_model_name: look ``model.name`` up in timm.
    """
    model, data, loss = config.model, config.data, config.loss
    check_run_rules(config, expect)
    _check_entries(expect, "metrics", config.metrics, METRICS, 1)
    _check_entries(expect, "data.transforms", data.transforms, TRANSFORMS)
    _check_arguments(expect, "loss.args", loss.name, loss.args, LOSSES, 2, ["class_weights"])
    _check_arguments(expect, "data.dataset_args", data.dataset, data.dataset_args, DATASETS, 2)
    _check_classes(config, expect)
    if data.mixup or data.cutmix:
        expected = "an even number, because mixup and cutmix pair the images of a batch"
        expect(config.batch_size % 2 == 0, expected, "batch_size", "data.mixup", "data.cutmix")
    _check_conversion(config, expect)
    check_data_rules(config, expect)
    for name in _OF_THE_MODEL:
        expected = f"no {name} among them: set model.{name}"
        expect(name not in model.timm_args, expected, "model.timm_args")
    expected = _model_name_expected(model.name, check_model_name)
    expect(not expected, expected, "model.name")
    teacher = config.distillation
    if teacher is not None and teacher.weights is not None:
        expected = _model_name_expected(teacher.teacher, check_model_name)
        if teacher.teacher.startswith("kw_"):
            expected = "a static network; of a converted one give a run, and weights: null"
        expect(not expected, expected, "distillation.teacher", "distillation.weights")


def _check_conversion(config: Config, expect: Expect) -> None:
    """Rules on the method of a dynamic network and its temperature."""
    dynamic, peer, key = config.model.kernel_warehouse, config.model.peer, "model.kernel_warehouse"
    expected = f"null beside {key}: a network is converted to one method"
    expect(peer is None or dynamic is None, expected, "model.peer", key)
    if peer is not None and peer.method == "condconv":
        expected = "null for CondConv, whose gates have no hidden units"
        expect(peer.reduction is None, expected, "model.peer.reduction", "model.peer.method")
    if config.temperature_epochs == 0:
        return
    if dynamic is not None:
        expected = "0 below a budget of 1 for start: keep, which holds at temperature 0 alone"
        for name, own in {"": dynamic, **dynamic.warehouses}.items():
            start = own.start or dynamic.start
            ratio = own.cell_num_ratio or dynamic.cell_num_ratio or 1
            where = f" (warehouse {name})" if name else ""
            right = start == "paper" or ratio >= 1
            expect(right, expected + where, "temperature_epochs", f"{key}.start")
    elif peer is not None:
        expected = f"0 for {peer.method}, whose attention has no temperature"
        right = peer.method not in _WITHOUT_TEMPERATURE
        expect(right, expected, "temperature_epochs", "model.peer.method")
    else:
        expected = "0 for a static network, which has no attention temperature"
        expect(False, expected, "temperature_epochs", key, "model.peer")


def _check_classes(config: Config, expect: Expect) -> None:
    """What the losses and the sampling of one class or of several an image need."""
    loss, key, count = config.loss, "loss.class_weights", config.model.num_classes
    expected = "no accuracy among them: one class an image has it by itself, several have none"
    expect("accuracy" not in config.metrics, expected, "metrics")
    if config.several_classes:
        one = "beside metrics.multilabel: an image has any number of classes"
        expect(loss.name != "cross_entropy", f"bce {one}", "loss.name")
        expect(loss.class_weights != "balanced", f"null or a list {one}", key)
        expect(config.data.sampling != "balanced", f"shuffle {one}", "data.sampling")
        expect(config.distillation is None, f"null {one}", "distillation")
    threshold = loss.args.get("threshold")
    if loss.name == "bce" and isinstance(threshold, (int, float)):
        absent = config.label_smoothing / (2 if config.several_classes else count)
        present = 1 - config.label_smoothing + absent
        margin = 1e-6  # targets are float32
        right = absent + margin < threshold < present - margin or threshold == absent == 0
        expected = (
            f"a threshold between {absent:g} and {present:g}, the targets of absent and present "
            "classes after label smoothing"
        )
        expect(right, expected, "loss.args", "label_smoothing")
    if loss.class_weights is None:
        return
    expected = f"null, because {loss.name} takes no class_weights"
    expect(takes(LOSSES[loss.name], "class_weights"), expected, key, "loss.name")
    if isinstance(loss.class_weights, list):
        right = len(loss.class_weights) == count and any(loss.class_weights)
        expected = f"{count} numbers, not all 0, one for each class"
        expect(right, expected, key, "model.num_classes")
    else:
        expected = "null or a list beside data.sampling: balanced, which makes up for the same"
        expect(config.data.sampling != "balanced", expected, key, "data.sampling")


def _model_name_expected(name: str, in_timm: bool) -> str:
    """The expected model name; empty where it is right or cannot be looked up."""
    if name.startswith("kw_"):
        static = name[3:].rpartition("_")[0]
        return f"the static network, e.g. {static!r}: model.kernel_warehouse converts it"
    if not in_timm:
        return ""
    try:
        import timm  # only here: it takes seconds
    except ImportError:
        return ""
    if timm.is_model(name):
        return ""
    return f"the name of a timm model{did_you_mean(name, timm.list_models(), 3, quoted=True)}"


def ignored_run_settings(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Settings of any run without effect, each with the reason."""
    optimizer, schedule = config.optimizer, config.schedule
    other = {"adamw": ("momentum", "nesterov"), "sgd": ("betas", "eps")}
    for name in other.get(optimizer.name, ("betas", "eps", "momentum", "nesterov")):
        yield f"optimizer.{name}", f"optimizer.name is {optimizer.name!r}"
    unused = {"cosine": ("milestones", "gamma"), "step": ("final_lr",)}
    for name in unused.get(schedule.name, ("milestones", "gamma", "final_lr")):
        yield f"schedule.{name}", f"schedule.name is {schedule.name!r}"
    if optimizer.weight_decay == 0:
        yield "optimizer.exempt_from_decay", "optimizer.weight_decay is 0"
    if config.contraction.backend != "auto":
        yield "contraction.planner", f"contraction.backend is {config.contraction.backend!r}"
    if config.precision == "fp32":
        yield "contraction.assembly_precision", "precision is 'fp32'"


def ignored_settings(config: Config) -> Iterator[tuple[str, str]]:
    """Settings of a classifier without effect, each with the reason."""
    yield from ignored_run_settings(config)
    data = config.data
    if config.model.kernel_warehouse is None and config.model.peer is None:
        for name in ("backend", "planner", "assembly_precision"):
            yield f"contraction.{name}", "the network is static"
        yield "optimizer.attention_lr", "the network is static"
    if data.random_erasing is not None and data.random_erasing.probability == 0:
        for name in ("mode", "count"):
            yield f"data.random_erasing.{name}", "data.random_erasing.probability is 0"
    mixes = [alpha for alpha in (data.mixup, data.cutmix) if alpha > 0]
    if not mixes:
        yield "data.mix_probability", "data.mixup and data.cutmix are both 0"
    if len(mixes) < 2:
        yield "data.mix_switch_probability", "data.mixup and data.cutmix are not both on"
    if data.auto_augment is not None and "3a" not in data.auto_augment:
        yield "data.color_jitter", "data.auto_augment replaces it"
    if config.distillation is not None and config.distillation.kind == "hard":
        yield "distillation.temperature", "distillation.kind is 'hard'"
    if data.memory is not None:
        yield "data.augment_on", "data.memory augments on the device"
    elif data.auto_augment is None and not data.color_jitter:
        yield "data.augment_on", "data.auto_augment and data.color_jitter are both off"
    if config.model.drop_path_rate == 0:
        yield "model.drop_path_decay", "model.drop_path_rate is 0"
