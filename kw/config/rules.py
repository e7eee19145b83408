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

__all__ = ["check_rules", "check_run_rules", "ignored_run_settings", "ignored_settings"]

Report = Callable[[Any, tuple[str, ...], str], None]

_OF_THE_MODEL = ("num_classes", "drop_rate", "drop_path_rate")


_WITHOUT_TEMPERATURE = ("condconv", "fdconv", "kerneldna")


def check_run_rules(config: RunConfig, report: Report) -> None:
    """Report broken rules that hold for all runs; arguments as for :func:`check_rules`."""

    def expect(right: bool, expected: str, *keys: str) -> None:
        if not right:
            report(config, keys, expected)

    optimizer, schedule, epochs = config.optimizer, config.schedule, config.epochs
    expect(
        config.total_batch_size % config.batch_size == 0,
        "a multiple of batch_size",
        "total_batch_size",
        "batch_size",
    )
    key = "schedule.warmup_epochs"
    expect(schedule.warmup_epochs <= epochs, "at most epochs", key, "epochs")
    _check_entries(report, config, "hooks", config.hooks, HOOKS)
    _check_entries(report, config, "loggers", config.loggers, LOGGERS)
    names = {"adamw": ["lr", "weight_decay", "betas", "eps"]}
    names["sgd"] = ["lr", "weight_decay", "momentum", "nesterov"]
    own = names.get(optimizer.name, ["lr", "weight_decay"])
    _check_arguments(
        report, config, "optimizer.args", optimizer.name, optimizer.args, OPTIMIZERS, 1, own
    )
    if optimizer.name in OPTIMIZERS and optimizer.weight_decay > 0:
        decays = takes(OPTIMIZERS[optimizer.name], "weight_decay")
        expected = f"0, because {optimizer.name} has no weight decay"
        expect(decays, expected, "optimizer.weight_decay", "optimizer.name")
    _check_arguments(report, config, "schedule.args", schedule.name, schedule.args, SCHEDULES, 1)
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
    expect(
        optimizer.momentum > 0 or not (optimizer.nesterov and optimizer.name == "sgd"),
        "false, because Nesterov's form needs a momentum",
        "optimizer.nesterov",
        "optimizer.momentum",
    )


def _check_arguments(
    report: Report,
    config: RunConfig,
    key: str,
    name: str,
    given: Mapping[str, Any],
    registry: Registry[Any],
    passed: int = 0,
    own: Collection[str] = (),
) -> None:
    """Report an unknown entry of a registry, or arguments that it does not take.

    Args:
        report: as for :func:`check_rules`.
        config: as for :func:`check_rules`.
        key: of the arguments.
        name: of the entry.
        given: its arguments.
        registry: where it is.
        passed: leading arguments that the caller passes, not the configuration.
        own: arguments that other keys set.
    """
    try:
        entry = registry.find(name)
    except UserError as error:
        beside = key.rpartition(".")[0]
        report(config, (f"{beside}.name",), f"another name: {error}")
        return
    taken = [each for each in own if each in given]
    if taken:
        report(config, (key,), f"no {taken[0]} among them, which has a key of its own")
    elif fault := argument_fault(entry, given, passed, own):
        report(config, (key,), f"for {name}: {fault}")


def _check_entries(
    report: Report,
    config: RunConfig,
    key: str,
    given: Mapping[str, Mapping[str, Any]],
    registry: Registry[Any],
    passed: int = 0,
) -> None:
    """Report what is wrong with entries by name, each with its arguments."""
    for name, args in given.items():
        try:
            fault = argument_fault(registry.find(name), args, passed)
        except UserError as error:
            report(config, (key,), f"other names: {error}")
            continue
        if fault:
            report(config, (key,), f"for {name}: {fault}")


def check_rules(config: Config, report: Report, check_model_name: bool) -> None:
    """Report every rule that a configuration of a classifier breaks.

    Args:
        config: settings of the right types and within their own bounds.
        report: called with the configuration, the keys concerned, the one to look at first, and
            what was expected of it.
        check_model_name: look ``model.name`` up in timm.
    """

    def expect(right: bool, expected: str, *keys: str) -> None:
        if not right:
            report(config, keys, expected)

    check_run_rules(config, report)
    _check_entries(report, config, "metrics", config.metrics, METRICS, 1)
    _check_entries(report, config, "data.transforms", config.data.transforms, TRANSFORMS)
    loss, dataset = config.loss, config.data.dataset
    _check_arguments(
        report, config, "loss.args", loss.name, loss.args, LOSSES, 2, ["class_weights"]
    )
    _check_classes(config, expect)
    _check_arguments(
        report, config, "data.dataset_args", dataset, config.data.dataset_args, DATASETS, 2
    )
    model, data, batch_size = config.model, config.data, config.batch_size
    expect(
        batch_size % 2 == 0 or not (data.mixup or data.cutmix),
        "an even number, because mixup and cutmix pair the images of a batch",
        "batch_size",
        "data.mixup",
        "data.cutmix",
    )

    key = "temperature_epochs"
    if model.peer is None or model.kernel_warehouse is not None:
        expect(
            config.temperature_epochs == 0 or model.kernel_warehouse is not None,
            "0 for a static network, which has no attention temperature",
            key,
            "model.kernel_warehouse",
            "model.peer",
        )
    else:
        expect(
            config.temperature_epochs == 0 or model.peer.method not in _WITHOUT_TEMPERATURE,
            f"0 for {model.peer.method}, whose attention has no temperature",
            key,
            "model.peer.method",
        )
    expect(
        model.peer is None or model.kernel_warehouse is None,
        "null beside model.kernel_warehouse: a network is converted to one method",
        "model.peer",
        "model.kernel_warehouse",
    )
    dynamic = model.kernel_warehouse
    if dynamic is not None and dynamic.cell_num_ratio is not None and dynamic.cell_num_ratio < 1:
        expect(
            config.temperature_epochs == 0 or dynamic.start == "paper",
            "0 below a budget of 1 for start: keep, which holds at temperature 0 alone",
            key,
            "model.kernel_warehouse.start",
        )
    if model.peer is not None:
        expect(
            model.peer.reduction is None or model.peer.method != "condconv",
            "null for CondConv, whose gates have no hidden units",
            "model.peer.reduction",
            "model.peer.method",
        )

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


def _check_classes(config: Config, expect: Callable[..., None]) -> None:
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
    if loss.name in LOSSES:
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
