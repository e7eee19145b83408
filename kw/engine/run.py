"""Training and testing a classifier: from a configuration to a finished run."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import set_random_seed
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ..config import ConfigError, to_yaml
from ..config.run_schema import ContractionConfig, RunConfig
from ..config.schema import Config
from ..data import (
    BatchPreprocessor,
    Loader,
    check_data_root,
    deaths_explained,
    open_training,
    open_validation,
    stop_workers,
)
from ..models import ImageClassifier, build_network, check_network, start_network
from ..warehouse import KWLayer, set_backend
from ..warehouse.ops import planner, set_assembly_precision
from .checkpoint import load_checkpoint, load_network, refuse_other_classes
from .distributed import Process, process_group
from .folder import find_checkpoint, held
from .hooks import (
    BadImageHook,
    CheckpointHook,
    EmaHook,
    FiniteHook,
    LogHook,
    PictureHook,
    ScheduleHook,
)
from .hooks.bad_images import tell_bad_images
from .loops import EvalLoop, TrainLoop, evaluate
from .optim import UpdateWrapper, build_optimizer
from .parallel import distribute
from .presence import log_to, set_place
from .runner import Runner
from .schedule import Schedule
from .task import Task, headline

__all__ = [
    "assemble_runner",
    "build_preprocessor",
    "build_runner",
    "check_devices",
    "evaluate_checkpoint",
    "find_checkpoint",
    "run_to_end",
    "set_contraction",
    "train",
]

_runs = itertools.count()


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
    with (
        process_group(launcher, config.distributed.timeout_minutes) as process,
        held(Path(work_dir), process),
    ):
        return run_to_end(build_runner(config, Path(work_dir), process, resume))


def run_to_end(runner: Runner) -> dict[str, float | None]:
    """Train, and stop the loaders' processes whatever happens; returns the last metrics.

    Raises:
        Interrupted: SIGTERM or SIGINT came; a checkpoint is written.
    """
    log_to(Path(runner.log_dir, f"{runner.timestamp}.log"))
    try:
        with (
            runner.signals.watched(),
            deaths_explained(runner.train_dataloader, runner.val_dataloader),
        ):
            runner.train()
    finally:
        stop_workers(runner.train_dataloader)
        stop_workers(runner.val_dataloader)
    return runner.last_metrics


def build_runner(
    config: Config, work_dir: Path, process: Process, resume: bool | str | Path = False
) -> Runner:
    """All of a training run, ready for ``runner.train()``; arguments as for :func:`train`."""
    check_devices(config, process)
    if config.compile and config.distributed.strategy == "fsdp":
        raise ConfigError(
            "compile: true with distributed.strategy: fsdp: parameters change their kind whenever "
            "they are gathered, and torch.compile compiles anew; choose one of the two"
        )
    if config.pictures is not None and config.distributed.strategy == "fsdp":
        raise ConfigError(
            "pictures with distributed.strategy: fsdp: one process draws, and has a part of the "
            "weights alone; set pictures: null"
        )
    resume_from = find_checkpoint(resume, work_dir, process)
    classes = check_data_root(config.data.root, config.model.num_classes)
    train_loader = open_training(config, process.device, process.rank, process.world_size)

    set_random_seed(config.seed)
    # A checkpoint to go on from brings its own weights.
    network = start_network(config.model, resumes=resume_from is not None)
    check_network(network, config.model, config.data.input_size)
    set_contraction(config.contraction, network)
    if config.channels_last:
        network = network.to(memory_format=torch.channels_last)
    if config.sync_bn and process.world_size > 1:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    network.to(process.device)
    if config.compile:
        network.compile()
    average = distribute(network, config, process)
    model = ImageClassifier(network, build_preprocessor(config))
    val_loader = open_validation(config, process.device, process.rank, process.world_size)
    task = Task(
        model,
        network,
        # Looked up when it is called: the runner moves the model to its device.
        lambda n: evaluate(n, model.data_preprocessor, val_loader, config.precision),
        "top1",
        classes,
        "config.yaml",
        to_yaml(config),
    )
    optimizer = build_optimizer(network, config.optimizer, process.device)
    hooks = [] if config.pictures is None else [PictureHook(config.pictures)]
    return assemble_runner(
        task,
        config,
        process,
        work_dir,
        train_loader,
        val_loader,
        optimizer,
        average,
        resume_from,
        hooks,
    )


def build_preprocessor(config: Config) -> BatchPreprocessor:
    """What a classifier's run does to its batches, in training and evaluation."""
    return BatchPreprocessor(
        config.data,
        config.model.num_classes,
        config.label_smoothing,
        config.seed,
        config.channels_last,
    )


def assemble_runner(
    task: Task,
    config: RunConfig,
    process: Process,
    work_dir: Path,
    train_loader: DataLoader[Any],
    val_loader: DataLoader[Any],
    optimizer: Optimizer,
    average: nn.Module | None,
    resume_from: Path | None,
    more_hooks: Sequence[Hook] = (),
) -> Runner:
    """A runner with the hooks that every run has, and the task's own.

    Args:
        task: what is trained.
        config: how it is trained.
        process: this process.
        work_dir: where configuration, logs, checkpoints and results go.
        train_loader: its batch sampler is a :class:`kw.data.TrainBatchSampler`.
        val_loader: what the task's evaluation reads.
        optimizer: of the task's parameters.
        average: what holds their moving average (:func:`kw.engine.parallel.distribute`).
        resume_from: checkpoint to continue from.
        more_hooks: of this kind of task.
    """
    sampler: Any = train_loader.batch_sampler
    hooks: list[Hook] = [
        ScheduleHook(),
        LogHook(config.log_interval),
        BadImageHook(config.log_interval),
        FiniteHook(config.non_finite, config.log_interval),
        CheckpointHook(**dataclasses.asdict(config.checkpoint)),
        *more_hooks,
    ]
    if config.ema is not None and average is not None:
        hooks.append(EmaHook(config.ema.decay, average))
    optim_wrapper = UpdateWrapper(
        optimizer,
        sampler.accumulation,
        config.optimizer.clip_grad,
        config.precision,
        process.device.type,
    )
    return Runner(
        task=task,
        config=config,
        process=process,
        schedule=Schedule(config, sampler.updates_per_epoch),
        resume_from=resume_from,
        work_dir=str(work_dir),
        train_dataloader=train_loader,
        train_cfg={
            "type": TrainLoop,
            "max_epochs": config.epochs,
            "val_interval": config.eval_interval,
        },
        optim_wrapper=optim_wrapper,
        val_dataloader=val_loader,
        val_cfg={"type": EvalLoop},
        val_evaluator=task.evaluate,
        custom_hooks=hooks,
        # Ranks draw their own drop path; data are seeded by what they are, not by who reads them.
        randomness={"seed": config.seed, "diff_rank_seed": True},
        experiment_name=f"{work_dir.name}_{next(_runs)}",
        default_scope=None,
        visualizer={"type": "Visualizer", "vis_backends": None},
    )


def evaluate_checkpoint(
    config: Config, checkpoint: str | Path, *, launcher: str = "none"
) -> dict[str, Any]:
    """Evaluate a checkpoint on ``data.root``/val, exactly, on any number of processes.

    Args:
        config: model and data.
        checkpoint: a file that :func:`train` wrote.
        launcher: as for :func:`train`.

    Returns:
        The headline figures (see :func:`kw.engine.task.headline`), ``epoch`` and ``checkpoint``.

    Raises:
        ConfigError: a setting does not fit the devices.
        DataError: the data folder is not as expected.
        CheckpointError: the checkpoint cannot be read, is of another model, or was trained on other
            classes than those of the data.
        MissingProcess: another process died, hangs or never came.
    """
    state = load_checkpoint(checkpoint)
    with process_group(launcher, config.distributed.timeout_minutes) as process:
        check_devices(config, process)
        classes = check_data_root(config.data.root, config.model.num_classes, ["val"])
        refuse_other_classes(state, classes, f"checkpoint {checkpoint}", config.data.root)
        loader = open_validation(config, process.device, process.rank, process.world_size)
        network = build_network(config.model)
        check_network(network, config.model, config.data.input_size)
        set_contraction(config.contraction, network)
        preprocess = build_preprocessor(config).to(process.device)
        network.to(process.device)
        if config.channels_last:
            network.to(memory_format=torch.channels_last)
        if config.compile:
            network.compile()
        return evaluate_weights(
            network,
            state,
            checkpoint,
            loader,
            lambda: evaluate(network, preprocess, loader, config.precision),
        )


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
        state: the checkpoint.
        checkpoint: its file.
        loader: of the images; its processes are stopped, whatever happens.
        measure: gives figures of the network as it is.

    Returns:
        The headline figures (see :func:`kw.engine.task.headline`), ``epoch`` and ``checkpoint``.

    Raises:
        CheckpointError: the checkpoint is of another model.
    """
    metrics: dict[str, float | None] = {}
    try:
        for prefix, key in (("", "state_dict"), ("ema_", "ema_state_dict")):
            if key in state:
                load_network(network, state[key], str(checkpoint))
                set_place("in the evaluation")
                with deaths_explained(loader):
                    found = measure()
                metrics.update({prefix + name: value for name, value in found.items()})
        tell_bad_images(loader)
    finally:
        stop_workers(loader)
    epoch = state.get("meta", {}).get("epoch")
    return {**headline(metrics), "epoch": epoch, "checkpoint": str(checkpoint)}


def set_contraction(config: ContractionConfig, network: nn.Module) -> None:
    """Make dynamic layers compute as configured; a static network has none to be told.

    Planner and precisions are settings of the process.

    Raises:
        ConfigError: a back end that does not exist or cannot do one of the layers.
    """
    planner.mode = config.planner
    set_assembly_precision(config.assembly_precision)
    torch.set_float32_matmul_precision(config.float32_matmul_precision)
    has_layers = any(isinstance(module, KWLayer) for module in network.modules())
    if has_layers and config.backend != "auto":
        try:
            set_backend(network, config.backend)
        except ValueError as error:
            raise ConfigError(f"contraction.backend: {error}") from error


def check_devices(config: RunConfig, process: Process) -> None:
    """Refuse settings that these devices cannot follow, before anything is built."""
    if config.sync_bn and process.world_size > 1 and process.device.type == "cpu":
        raise ConfigError("sync_bn: torch synchronises BatchNorm on GPUs only; set sync_bn: false")
    if config.distributed.strategy == "fsdp" and config.precision == "fp16":
        raise ConfigError(
            "distributed.strategy: fsdp with precision: fp16: the loss scaler would have to agree "
            "over sharded gradients; set precision: bf16, or strategy: ddp"
        )
