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

__all__ = [
    "BadImagesConfig",
    "CheckpointConfig",
    "ContractionConfig",
    "DistributedConfig",
    "EmaConfig",
    "NonFiniteConfig",
    "OptimizerConfig",
    "RunConfig",
    "ScheduleConfig",
]


@dataclass(kw_only=True)
class OptimizerConfig:
    """The optimizer. The learning rate belongs to ``total_batch_size``: it is not rescaled."""

    name: str = setting(
        "adamw",
        "adamw, sgd, or another of torch's or timm's by its name in lower case, or your own",
    )
    lr: float = setting(doc="learning rate after warm-up", above=0, maximum=1e6, example=0.1)
    weight_decay: float = setting(
        0.0, "decoupled (adamw) or L2 (sgd) decay", minimum=0, maximum=1e6
    )
    exempt_from_decay: str = setting(
        "norm_and_bias",
        "parameters without decay: 1-D ones and biases, those of normalisation layers, or none",
        choices=("norm_and_bias", "norm", "none"),
    )
    betas: list[float] = setting(
        [0.9, 0.999], "adamw: decay of the moment estimates", minimum=0, below=1, length=2
    )
    eps: float = setting(1e-8, "adamw: added to the denominator", above=0, maximum=1)
    momentum: float = setting(0.9, "sgd: momentum", minimum=0, below=1)
    nesterov: bool = setting(False, "sgd: Nesterov's form")
    args: dict[str, Any] = setting({}, "further arguments of the optimizer, by name")
    attention_lr: float = setting(
        1.0, "factor on the learning rate of attention branches", above=0, maximum=1e6
    )
    head_lr: float = setting(
        1.0,
        "factor on the learning rate of the classifier: above 1 for a new one on a trained network",
        above=0,
        maximum=1e6,
    )
    clip_grad: float | None = setting(None, "clip the gradient's global L2 norm to this", above=0)


@dataclass
class ScheduleConfig:
    """The learning rate over time; it changes with every optimizer update."""

    name: str = setting("cosine", "shape after warm-up", choices=SCHEDULES)
    warmup_epochs: float = setting(0.0, "linear warm-up from 0, epochs", minimum=0, maximum=10**6)
    warmup_updates: int = setting(
        0,
        "warm-up of at least so many updates, but of no more than a tenth of the run for that: for "
        "sets that are small",
        minimum=0,
        maximum=10**6,
    )
    final_lr: float = setting(1e-6, "cosine: learning rate at the end", minimum=0, maximum=1e6)
    milestones: list[float] = setting(
        [], "step: epochs at which the rate is multiplied", above=0, maximum=10**6
    )
    gamma: float = setting(0.1, "step: the factor", above=0, maximum=1)
    args: dict[str, Any] = setting({}, "arguments of another schedule, by name")


@dataclass
class EmaConfig:
    """Exponential moving average of the weights, evaluated beside the model."""

    decay: float = setting(0.9999, "share of the old average kept per update", above=0, below=1)


@dataclass
class CheckpointConfig:
    """When checkpoints are written; the best is always kept, and the last epoch's written."""

    interval: int = setting(1, "epochs between checkpoints", minimum=1, maximum=10**6)
    updates: int | None = setting(
        None,
        "also after every so many updates, within epochs; null = not",
        minimum=1,
        maximum=10**9,
    )
    minutes: float | None = setting(
        None, "also after so many minutes; null = not", above=0, maximum=10**6
    )
    keep: int = setting(2, "newest checkpoints kept", minimum=1, maximum=10**6)


@dataclass
class ContractionConfig:
    """How dynamic layers compute: speed, and with the precisions its price in accuracy
    (docs/benchmarks.md)."""

    backend: str = setting(
        "auto", "back end of every dynamic layer; auto = the selector's choice for each"
    )
    planner: str = setting(
        "model",
        "model: by predicted cost; measure: time the likely ones once per shape and keep the "
        "result in $KW_CACHE_DIR; off: always the same one",
        choices=("model", "measure", "off"),
    )
    assembly_precision: str = setting(
        "autocast",
        "under bf16 and fp16, autocast: mix cells in 16 bit; float32: mix them in float32 and "
        "round the assembled kernel",
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
        "ddp: gradients are reduced in buckets of about so many MiB",
        above=0,
        maximum=10**5,
    )
    timeout_minutes: float = setting(
        10.0,
        "the run ends when a process waits longer than this for another",
        above=0,
        maximum=10**5,
    )


@dataclass
class BadImagesConfig:
    """What becomes of image files that cannot be read (docs/faults.md)."""

    policy: str = setting(
        "skip",
        "skip: train on another image instead, count as wrong in evaluation; raise: stop",
        choices=("skip", "raise"),
    )
    max_fraction: float = setting(
        0.001,
        "skip: the run stops when more of a data set's files are bad, rounded up to whole files",
        minimum=0,
        maximum=1,
    )
    max_pixels: int = setting(
        178_956_970,
        "larger images count as bad before memory is asked for; the default is the most that "
        "Pillow opens",
        minimum=1,
        maximum=178_956_970,
    )


@dataclass
class NonFiniteConfig:
    """What becomes of updates whose loss or gradient is not finite: they are skipped."""

    patience: int = setting(
        20, "the run stops after as many skipped updates in a row", minimum=1, maximum=10**9
    )
    max_fraction: float = setting(
        0.1,
        "the run stops when more of an epoch's updates (and more than patience) were skipped",
        minimum=0,
        maximum=1,
    )


@dataclass(kw_only=True)
class RunConfig:
    """How a run trains, on any number of devices."""

    optimizer: OptimizerConfig = field(metadata={"doc": "the optimizer"})
    epochs: int = setting(
        doc="passes over the training images", minimum=1, maximum=10**6, example=100
    )
    total_batch_size: int = setting(
        doc="images per optimizer update, over all devices and accumulation steps",
        minimum=1,
        maximum=2**24,
        example=256,
    )
    batch_size: int = setting(
        doc="images per device and forward pass", minimum=1, maximum=2**16, example=32
    )
    seed: int = setting(0, "seed of every random choice", minimum=0, maximum=2**31 - 1)
    schedule: ScheduleConfig = table(ScheduleConfig, "the learning rate over time")
    temperature_epochs: float = setting(
        0.0,
        "epochs over which the attention temperature falls from 1 to 0",
        minimum=0,
        maximum=10**6,
    )
    ema: EmaConfig | None = setting(None, "average of the weights")
    precision: str = setting(
        "fp32", "autocast type of forward and loss", choices=("fp32", "bf16", "fp16")
    )
    non_finite: NonFiniteConfig = table(NonFiniteConfig, "updates whose loss is not finite")
    sync_bn: bool = setting(False, "BatchNorm statistics over all processes")
    distributed: DistributedConfig = table(DistributedConfig, "training on several processes")
    contraction: ContractionConfig = table(ContractionConfig, "how dynamic layers compute")
    eval_interval: int = setting(1, "epochs between evaluations", minimum=1, maximum=10**6)
    eval_batch_size: int | None = setting(
        None, "images per device in evaluation; null = batch_size", minimum=1, maximum=2**16
    )
    log_interval: int = setting(50, "updates between log lines", minimum=1, maximum=10**9)
    checkpoint: CheckpointConfig = table(CheckpointConfig, "checkpoints")
    hooks: dict[str, dict[str, Any]] = setting(
        {},
        "further hooks by registered name, with their arguments, in the order in which they are "
        "called, e.g. {early_stopping: {patience: 5}}",
    )
