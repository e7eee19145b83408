"""The settings that every run has, whatever it trains: optimizer, schedule, batches, checkpoints.

:class:`kw.config.schema.Config` adds to them what a classifier needs, and
``kw.detection.schema.DetectionConfig`` what a detector needs.
"""

# ruff: noqa: RUF009 -- setting() and table() return dataclasses.field()
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..registry import SCHEDULES
from .fields import setting, table


@dataclass(kw_only=True)
class OptimizerConfig:
    """The optimizer. The learning rate is that of ``total_batch_size``: it is not rescaled."""

    name: str = setting(
        "adamw", "adamw, sgd, another optimizer of torch or timm (name in lower case), or your own"
    )
    lr: float = setting(doc="learning rate after warm-up", bounds="(0, 1e6]", example=0.1)
    weight_decay: float = setting(0.0, "decoupled (adamw) or L2 (sgd) decay", "[0, 1e6]")
    exempt_from_decay: str = setting(
        "norm_and_bias",
        "parameters without decay: 1-D ones and biases; those of normalisation layers; or none",
        choices=("norm_and_bias", "norm", "none"),
    )
    betas: list[float] = setting(
        [0.9, 0.999], "adamw: decay of the moment estimates", "[0, 1)", length=2
    )
    eps: float = setting(1e-8, "adamw: added to the denominator", "(0, 1]")
    momentum: float = setting(0.9, "sgd: momentum", "[0, 1)")
    nesterov: bool = setting(False, "sgd: Nesterov's form")
    args: dict[str, Any] = setting({}, "further keyword arguments of the optimizer")
    attention_lr: float = setting(
        1.0, "factor on the learning rate of attention branches", "(0, 1e6]"
    )
    head_lr: float = setting(
        1.0,
        "factor on the learning rate of the classifier; above 1 for a new classifier on a "
        "pretrained network",
        "(0, 1e6]",
    )
    clip_grad: float | None = setting(
        None, "clip the gradient's global L2 norm to this", "(0, inf)"
    )


@dataclass
class ScheduleConfig:
    """The learning rate over time; it changes with every optimizer update."""

    name: str = setting("cosine", "shape after warm-up", choices=SCHEDULES)
    warmup_epochs: float = setting(0.0, "linear warm-up from 0, epochs", "[0, 1_000_000]")
    warmup_updates: int = setting(
        0,
        "minimum length of the warm-up, updates (for small data sets); at most a tenth of the run",
        "[0, 1_000_000]",
    )
    final_lr: float = setting(1e-6, "cosine: learning rate at the end", "[0, 1e6]")
    milestones: list[float] = setting(
        [], "step: epochs at which the rate is multiplied", "(0, 1_000_000]"
    )
    gamma: float = setting(0.1, "step: the factor", "(0, 1]")
    args: dict[str, Any] = setting({}, "keyword arguments of another schedule")


@dataclass
class EmaConfig:
    """Exponential moving average of the weights, evaluated beside the model."""

    decay: float = setting(0.9999, "share of the old average kept per update", "(0, 1)")
    warmup: bool = setting(
        False,
        "keep min(decay, (1 + t) / (10 + t)) after t updates, so that the average follows the "
        "weights early on; false: decay from the third update on",
    )


@dataclass
class CheckpointConfig:
    """When checkpoints are written. The last epoch's always is, and the best is always kept."""

    interval: int = setting(1, "epochs between checkpoints", "[1, 1_000_000]")
    updates: int | None = setting(
        None,
        "updates between checkpoints within an epoch; null = none within epochs",
        "[1, 1_000_000_000]",
    )
    minutes: float | None = setting(
        None, "minutes between checkpoints within an epoch; null = none", "(0, 1_000_000]"
    )
    keep: int = setting(2, "newest checkpoints kept", "[1, 1_000_000]")


@dataclass
class ContractionConfig:
    """How dynamic layers compute: speed, and for the precisions also accuracy
    (docs/benchmarks.md)."""

    backend: str = setting("auto", "back end of all dynamic layers; auto = chosen for each layer")
    planner: str = setting(
        "model",
        "how auto chooses. model: by predicted cost; measure: times the best candidates once "
        "per shape and stores the result in $KW_CACHE_DIR; off: always the same back end",
        choices=("model", "measure", "off"),
    )
    assembly_precision: str = setting(
        "autocast",
        "precision bf16 or fp16: autocast mixes cells in 16 bits; float32 in float32, and "
        "rounds the assembled kernel",
        choices=("autocast", "float32"),
    )
    float32_matmul_precision: str = setting(
        "highest",
        "torch.set_float32_matmul_precision: high lets NVIDIA GPUs multiply float32 matrices in "
        "TF32 (10 mantissa bits), medium in bf16",
        choices=("highest", "high", "medium"),
    )


@dataclass
class DistributedConfig:
    """How several processes train one network (docs/scaling.md)."""

    strategy: str = setting(
        "ddp",
        "ddp: every process holds the whole network; fsdp: parameters, gradients, optimizer state "
        "and moving average are sharded over the processes",
        choices=("ddp", "fsdp"),
    )
    bucket_mb: float = setting(
        25.0,
        "ddp: approximate size of the buckets in which gradients are reduced, MiB",
        "(0, 100_000]",
    )
    timeout_minutes: float = setting(
        10.0,
        "the run ends with an error if a process waits longer than this for another",
        "(0, 100_000]",
    )


@dataclass
class BadImagesConfig:
    """How image files that cannot be read are handled (docs/faults.md)."""

    policy: str = setting(
        "skip",
        "skip: train on another image instead, count as wrong in evaluation; raise: stop the run",
        choices=("skip", "raise"),
    )
    max_fraction: float = setting(
        0.001,
        "skip: the run stops if a larger fraction of a data set's files is bad, rounded up to "
        "whole files",
        "[0, 1]",
    )
    max_pixels: int = setting(
        178_956_970,
        "larger images are not decoded and count as bad; the default is Pillow's limit",
        "[1, 178_956_970]",
    )


@dataclass
class NonFiniteConfig:
    """Updates whose loss or gradient is not finite are skipped; when the run stops."""

    patience: int = setting(
        20, "the run stops after this many skipped updates in a row", "[1, 1_000_000_000]"
    )
    max_fraction: float = setting(
        0.1,
        "the run stops if a larger fraction of an epoch's updates (and more than patience) is "
        "skipped",
        "[0, 1]",
    )


@dataclass(kw_only=True)
class RunConfig:
    """How a run trains, on any number of devices."""

    optimizer: OptimizerConfig = field(metadata={"doc": "the optimizer"})
    epochs: int = setting(
        doc="passes over the training images", bounds="[1, 1_000_000]", example=100
    )
    total_batch_size: int = setting(
        doc="images per optimizer update, over all devices and accumulation steps",
        bounds="[1, 16_777_216]",
        example=256,
    )
    batch_size: int = setting(
        doc="images per device and forward pass", bounds="[1, 65_536]", example=32
    )
    seed: int = setting(0, "seed of every random choice", "[0, 2_147_483_647]")
    schedule: ScheduleConfig = table(ScheduleConfig, "the learning rate over time")
    temperature_epochs: float = setting(
        0.0, "epochs over which the attention temperature falls from 1 to 0", "[0, 1_000_000]"
    )
    ema: EmaConfig | None = setting(None, "moving average of the weights; null = none")
    precision: str = setting(
        "fp32",
        "autocast type of forward pass and loss; fp32 = no autocast",
        choices=("fp32", "bf16", "fp16"),
    )
    non_finite: NonFiniteConfig = table(
        NonFiniteConfig, "updates whose loss or gradient is not finite"
    )
    sync_bn: bool = setting(False, "BatchNorm statistics over all processes")
    distributed: DistributedConfig = table(DistributedConfig, "training on several processes")
    contraction: ContractionConfig = table(ContractionConfig, "how dynamic layers compute")
    eval_interval: int = setting(1, "epochs between evaluations", "[1, 1_000_000]")
    eval_batch_size: int | None = setting(
        None, "images per device in evaluation; null = batch_size", "[1, 65_536]"
    )
    loggers: dict[str, dict[str, Any]] = setting(
        {"tensorboard": {}},
        "where figures and pictures go besides log.jsonl: tensorboard, wandb, mlflow, trackio or "
        "your own, with their arguments, e.g. {tensorboard: {}, wandb: {project: mine}}",
    )
    log_interval: int = setting(50, "updates between log lines", "[1, 1_000_000_000]")
    checkpoint: CheckpointConfig = table(CheckpointConfig, "checkpoints")
    hooks: dict[str, dict[str, Any]] = setting(
        {},
        "further hooks: registered names, with their arguments, in the order in which they are "
        "called, e.g. {early_stopping: {patience: 5}}",
    )
