"""Rules between settings, beyond each setting's type and bounds."""

from __future__ import annotations

import re
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
from .run_schema import RunConfig
from .schema import Config

__all__ = ["check_rules", "check_run_rules", "ignored_run_settings", "ignored_settings"]

Report = Callable[[Any, tuple[str, ...], str], None]

_NUMBER = r"\d+(\.\d+)?"
# timm reads a policy leniently: options that it does not know are ignored or fail an assertion.
_POLICIES = re.compile(
    rf"rand(-(m|n|mmax)\d+|-(p|mstd){_NUMBER}|-inc[01]|-t(weights|3aw|3a))*"
    rf"|augmix(-(m|w|d)\d+|-(a|mstd){_NUMBER}|-b[01])*"
    rf"|(original|originalr|v0|v0r|3a)(-mstd{_NUMBER})?"
)
_OF_THE_MODEL = ("num_classes", "drop_rate", "drop_path_rate")


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
    _check_arguments(report, config, "loss.args", loss.name, loss.args, LOSSES, 2)
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
            config.temperature_epochs == 0 or model.peer.method != "condconv",
            "0 for CondConv, whose gates have no temperature",
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

    if data.progressive is not None:
        growth, key = data.progressive, "data.progressive"
        expect(growth.start <= data.input_size, "at most data.input_size", f"{key}.start")
        expected = "less than epochs, so that some have data.input_size"
        expect(growth.epochs < config.epochs, expected, f"{key}.epochs", "epochs")
    for name in ("crop_scale", "crop_ratio"):
        low, high = getattr(data, name)
        expect(low <= high, "[low, high] with low <= high", f"data.{name}")
    expect(
        data.auto_augment is None or _POLICIES.fullmatch(data.auto_augment) is not None,
        "a timm policy such as 'rand-m9-mstd0.5-inc1', 'augmix-m3-w3', 'original', '3a', or null",
        "data.auto_augment",
    )
    expect(
        data.memory is None or data.auto_augment is None,
        "null beside data.memory: policies work on one image at a time, not on batches of tensors "
        "(data.color_jitter, data.random_erasing, data.mixup and data.cutmix do)",
        "data.auto_augment",
        "data.memory",
    )
    expect(
        data.memory is None or not data.transforms,
        "empty beside data.memory: they work on one image at a time, not on batches of tensors",
        "data.transforms",
        "data.memory",
    )
    pillow = data.decoder == "pillow"
    expect(
        pillow or data.memory is None,
        "pillow beside data.memory, which decodes every image once",
        "data.decoder",
        "data.memory",
    )
    expect(
        pillow or not data.transforms,
        "pillow beside data.transforms, which take Pillow images",
        "data.decoder",
        "data.transforms",
    )
    expect(
        pillow or data.interpolation != "lanczos",
        "bicubic, bilinear or nearest beside data.decoder simplejpeg",
        "data.interpolation",
        "data.decoder",
    )
    for name in _OF_THE_MODEL:
        expected = f"no {name} among them: set model.{name}"
        expect(name not in model.timm_args, expected, "model.timm_args")
    expected = _model_name_expected(model.name, check_model_name)
    expect(not expected, expected, "model.name")


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
    if config.model.drop_path_rate == 0:
        yield "model.drop_path_decay", "model.drop_path_rate is 0"
