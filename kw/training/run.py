"""Training and testing a classifier: from a configuration to a finished run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import ConfigError, to_yaml
from ..config.run_schema import ContractionConfig, RunConfig
from ..config.schema import Config
from ..data import (
    BatchPreprocessor,
    DataError,
    Loader,
    deaths_explained,
    list_splits,
    open_training,
    open_validation,
)
from ..evaluation import Accuracy
from ..evaluation.accuracy import Metric
from ..evaluation.outcomes import Outcomes
from ..models import ImageClassifier, check_network, start_network
from ..models.build import say_other_pixels
from ..models.recompute import synchronised
from ..registry import HOOKS, METRICS
from ..warehouse import KWLayer, set_backend
from ..warehouse.ops import selector, set_assembly_precision
from ..warehouse.probe import evaluating
from .checkpoint import load_network
from .distributed import Process, from_all, host_barrier, process_group
from .folder import find_checkpoint, held
from .hooks import BadImageHook, FiniteHook, Hook, LoggerHook, LogHook, ProgressHook, RatesHook
from .hooks.bad_images import INSTEAD
from .hooks.pictures import PictureHook
from .logs import close_log, open_log
from .objective import build_loss, build_teacher, check_labels, check_same, check_sizes
from .optim import build_optimizer, decayed_by_layer
from .parallel import distribute
from .precision import autocast
from .presence import set_place
from .task import Task, headline
from .trainer import Trainer, set_seed


def train(
    config: Config,
    work_dir: str | Path,
    *,
    resume: bool | str | Path = False,
    launcher: str = "none",
) -> dict[str, float | None]:
    """Train and evaluate as a configuration says.

    Args:
        config: the run.
        work_dir: where configuration, logs, checkpoints and results go.
        resume: ``True`` continues from the newest checkpoint of ``work_dir``, if there is one; a
            path continues from that file.
        launcher: ``"none"``, ``"pytorch"`` (torchrun) or ``"slurm"``.

    Returns:
        The last evaluation: ``top1`` and ``top5`` in percent, ``loss``, ``images``; with the prefix
        ``ema_`` those of the moving average.

    Raises:
        ConfigError: a setting does not fit the data, the devices or the number of processes, or
            ``work_dir`` holds a run that is not to be resumed, or one that is under way.
        DataError: the data folder is not as expected, or too many images cannot be read.
        CheckpointError: the checkpoint cannot be read or is of another model.
        NonFiniteError: too many updates were not finite.
        MissingProcess: another process died, hangs or never came.
    """
    folder = Path(work_dir).expanduser()
    return start(config, folder, launcher, lambda p: build_trainer(config, folder, p, resume))


def start(
    config: RunConfig, work_dir: Path, launcher: str, build: Callable[[Process], Trainer]
) -> dict[str, float | None]:
    """Join the processes, lock the work directory, ``build`` the trainer of this one, and train.

    Returns:
        The last evaluation's figures. Launchers and errors are those of :func:`train`.
    """
    with (
        process_group(launcher, config.distributed.timeout_minutes) as process,
        held(work_dir, process),
    ):
        try:
            return build(process).run()
        finally:
            close_log()


def build_trainer(
    config: Config, work_dir: Path, process: Process, resume: bool | str | Path = False
) -> Trainer:
    """All of a training run, ready for ``trainer.run()``; arguments as for :func:`train`."""
    check_devices(config, process)
    if config.compile and config.distributed.strategy == "fsdp":
        raise ConfigError(
            "compile: true with distributed.strategy: fsdp: parameters change their kind whenever "
            "they are gathered, and torch.compile compiles anew; choose one of the two"
        )
    if config.compile and config.model.gradient_checkpointing:
        raise ConfigError(
            "compile: true with model.gradient_checkpointing: in a compiled pass BatchNorm would "
            "count blocks twice that are computed twice; choose one of the two"
        )
    if config.pictures is not None and config.distributed.strategy == "fsdp":
        raise ConfigError(
            "pictures with distributed.strategy: fsdp: one process draws, and has a part of the "
            "weights alone; set pictures: null"
        )
    hooks = build_hooks(config)
    if config.pictures is not None:
        hooks.append(PictureHook(config.pictures))
    open_log(work_dir, process)
    resume_from = find_checkpoint(resume, work_dir, process)
    listings = list_splits(config.data, config.model.num_classes)
    check_labels(config, listings["train"])
    check_same({split: each.identity for split, each in listings.items()})
    where = (process.device, process.rank, process.world_size)
    train_loader = open_training(config, *where, listings["train"])

    as_images = uses_channels_last(config, process.device)
    teacher = build_teacher(config, listings["train"], process.device, as_images)
    set_seed(config.seed)
    # A checkpoint to go on from brings its own weights.
    network = start_network(config.model, resumes=resume_from is not None)
    if resume_from is None:
        say_other_pixels(config.model, config.data.mean, config.data.std)
    prepare(network, config, process)
    if config.sync_bn and process.world_size > 1:
        network = synchronised(network)
    check_sizes(network, config.model, config)
    average = distribute(network, config, process)
    loss = build_loss(config, listings["train"], process.device)
    model = ImageClassifier(network, build_preprocessor(config, process.device), loss, teacher)
    val_loader = open_validation(config, *where, listings["val"])
    task = Task(
        model,
        network,
        lambda n: evaluate(n, model.preprocess, val_loader, config.precision, config.metrics),
        "mAP" if config.several_classes else "top1",
        list(listings["train"].classes),
        "config.yaml",
        to_yaml(config),
    )
    scales = decayed_by_layer(network, config.optimizer.layer_decay)
    optimizer = build_optimizer(network, config.optimizer, process.device, scales)
    return Trainer(
        task,
        config,
        process,
        work_dir,
        train_loader,
        val_loader,
        optimizer,
        average,
        hooks,
        resume_from,
    )


def prepare(network: nn.Module, config: Config, process: Process) -> None:
    """Check a network, choose how it computes, and move it to this process's device.

    Raises:
        ConfigError: it does not take images of ``data.input_size``, or has no such back end.
    """
    check_network(network, config.model, config.data.shape)
    set_contraction(config.contraction, network)
    if uses_channels_last(config, process.device):
        network.to(memory_format=torch.channels_last)
    network.to(process.device)
    if config.compile:
        mode = None if config.compile is True else config.compile.mode
        network.compile(mode=mode)


def uses_channels_last(config: Config, device: torch.device) -> bool:
    """Whether images and 4-D weights lie channels last; by default they do on GPUs, where the
    kernels of dynamic layers and those of 16 bit read them that way."""
    return device.type == "cuda" if config.channels_last is None else config.channels_last


def build_preprocessor(config: Config, device: torch.device) -> BatchPreprocessor:
    """What a classifier's run does to its batches, in training and evaluation, on a device."""
    return BatchPreprocessor(
        config.data,
        config.model.num_classes,
        config.label_smoothing,
        config.seed,
        uses_channels_last(config, device),
    )


def build_hooks(config: RunConfig) -> list[Hook]:
    """The hooks that every run has, in their order, and those of the configuration."""
    return [
        ProgressHook(),
        LoggerHook(config.loggers),
        BadImageHook(),
        LogHook(),
        FiniteHook(),
        RatesHook(),
        *(HOOKS.find(name)(**args) for name, args in config.hooks.items()),
    ]


@torch.no_grad()
def evaluate(
    network: nn.Module,
    preprocess: nn.Module,
    loader: Loader,
    precision: str,
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
    outcomes: Outcomes | None = None,
) -> dict[str, float | None]:
    """Evaluate a classifier on this process's share of a data set: exact on any number of them.

    Args:
        network: images -> logits; evaluated at the temperature that it has, left in the mode that
            it was in.
        preprocess: ``(batch, training) -> (images, labels)``.
        loader: disjoint shares over the processes, without padding.
        precision: autocast type of the forward pass, ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        metrics: further entries of :data:`kw.registry.METRICS`, with their arguments.
        outcomes: gets what is said of every image.

    Returns:
        See :meth:`kw.evaluation.Accuracy.compute`, in whose place the metric ``multilabel`` comes;
        and the figures of the other metrics.

    Raises:
        ConfigError: two metrics give a figure of one name.
        DataError: not one image can be read.
    """
    device = next(network.parameters()).device
    counts: list[Metric] = [METRICS.find(n)(device, **a) for n, a in (metrics or {}).items()]
    if "multilabel" not in (metrics or {}):
        counts.append(Accuracy(device))
    with evaluating(network):
        for batch in loader:
            images, labels = preprocess(batch, False)
            with autocast(precision, device.type):
                logits = network(images)
            for metric in counts:
                metric.update(logits, labels)
            if outcomes is not None:
                outcomes.update(logits, labels, batch["indices"])
    host_barrier("at the end of an evaluation")
    if outcomes is not None:
        outcomes.gather()
    figures: dict[str, float | None] = {}
    for each in counts:
        try:
            found: Mapping[str, Any] = each.compute()
        except ValueError as error:  # not one image can be read
            loader.faults.merge(loader.faults.take())
            loader.faults.check()
            raise DataError(str(error)) from error
        twice = [name for name in found if name in figures or name.startswith("ema_")]
        if twice:  # ema_ is put before the figures of the moving average
            raise ConfigError(f"metrics: another name than {twice[0]!r}, which is taken")
        # Metrics of others may give numbers of NumPy or torch.
        figures |= {n: v.item() if hasattr(v, "item") else v for n, v in found.items()}
    return figures


def evaluate_weights(
    network: nn.Module,
    state: Mapping[str, Any],
    checkpoint: str | Path,
    loader: Loader,
    measure: Callable[[], Mapping[str, float | None]],
) -> dict[str, Any]:
    """Measure each set of weights of a checkpoint, the model's own and their average.

    Args:
        network: what they are loaded into.
        state, checkpoint: the checkpoint, and its file.
        loader: of the images; its processes are stopped, whatever happens.
        measure: gives figures of the network as it is.

    Returns:
        The headline figures (see :func:`kw.training.task.headline`), ``epoch`` and ``checkpoint``.

    Raises:
        CheckpointError: the checkpoint is of another model.
        DataError: too many images cannot be read.
    """
    metrics: dict[str, float | None] = {}
    with deaths_explained(loader):
        for prefix, key in (("", "state_dict"), ("ema_", "ema_state_dict")):
            if key in state:
                load_network(network, state[key], str(checkpoint))
                set_place("in the evaluation")
                metrics.update({prefix + name: value for name, value in measure().items()})
        own = loader.faults.take()
        for _, path, reason in loader.faults.merge(own):
            warnings.warn(f"cannot read {path}: {reason}; {INSTEAD['val']}", stacklevel=2)
        for share in from_all(own):  # the bound is on those of all processes
            loader.faults.merge(share)
        loader.faults.check()
    epoch = state.get("meta", {}).get("epoch")
    return {**headline(metrics), "epoch": epoch, "checkpoint": str(checkpoint)}


def set_contraction(config: ContractionConfig, network: nn.Module) -> None:
    """Set how dynamic layers compute; a static network has none.

    Selector and precisions are settings of the process.

    Raises:
        ConfigError: a back end that does not exist or cannot do one of the layers.
    """
    selector.mode = config.planner
    set_assembly_precision(config.assembly_precision)
    torch.set_float32_matmul_precision(config.float32_matmul_precision)
    has_layers = any(isinstance(module, KWLayer) for module in network.modules())
    if has_layers and config.backend != "auto":
        try:
            set_backend(network, config.backend)
        except ValueError as error:
            raise ConfigError(f"contraction.backend: {error}") from error


def check_devices(config: RunConfig, process: Process) -> None:
    """Refuse settings that these devices cannot follow, before anything is built.

    Raises:
        ConfigError: a setting needs other devices or another strategy.
    """
    if config.sync_bn and process.world_size > 1 and process.device.type == "cpu":
        raise ConfigError("sync_bn: torch synchronises BatchNorm on GPUs only; set sync_bn: false")
    if config.distributed.strategy == "fsdp" and config.optimizer.name not in ("adamw", "sgd"):
        raise ConfigError(
            f"distributed.strategy: fsdp with optimizer.name: {config.optimizer.name}: its state "
            "is not known to be sharded as the parameters are; set adamw or sgd"
        )
    if config.distributed.strategy == "fsdp" and config.precision == "fp16":
        raise ConfigError(
            "distributed.strategy: fsdp with precision: fp16: the loss scaler would have to agree "
            "over sharded gradients; set precision: bf16, or strategy: ddp"
        )
