"""The configuration of a classification run, as types.

A configuration file is a tree of these dataclasses written as YAML. The type hints define it:
:mod:`kw.config.checking` checks files against them, and :func:`kw.config.reference` writes the
reference from them. Every setting carries its meaning, its unit and the values that it may take.

``None`` (``null`` in YAML) turns an optional part off.
"""

# ruff: noqa: RUF009 -- setting() and table() return dataclasses.field()
from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ..registry import ATTENTION_FUNCTIONS, LOSSES, PEERS
from .data_schema import DataConfig
from .fields import setting, table
from .run_schema import OptimizerConfig, RunConfig

_STARTS = ("keep", "paper")


@dataclass
class _PlanConfig:
    # A base class of its own only so that `plan` comes first and needs no default.
    plan: str | dict[str, Any] = setting(
        doc="which layer joins which warehouse: a name known to kw.convert, or a mapping of rules",
        example="resnet18",
    )


@dataclass
class WarehouseConfig:
    """Settings of one warehouse; null leaves the plan's own value."""

    cell_num_ratio: float | None = setting(
        None, "b: cells per mixture, the convolutional parameter budget", "(0, 1000]"
    )
    cell_inplane_ratio: float | None = setting(
        None, "input channels of a cell / greatest common divisor of the layers'", "(0, 1000]"
    )
    cell_outplane_ratio: float | None = setting(
        None, "output channels of a cell / greatest common divisor of the layers'", "(0, 1000]"
    )
    nonlocal_basis_ratio: float | None = setting(
        None, "rank / number of the cells that are not a layer's own; 1 = full attention", "(0, 1]"
    )
    reduction: float | None = setting(
        None, "hidden width of the attention / input channels", "(0, 64]"
    )
    norm: str | None = setting(
        None, "normalisation inside the attention", choices=("batch", "layer")
    )
    attention: str | None = setting(
        None, "attention function; contrasting is the papers'", choices=ATTENTION_FUNCTIONS
    )
    spatial_partition: bool | None = setting(
        None, "true: cells are 1 x 1; false: cells keep the kernel's spatial size"
    )
    start: str | None = setting(
        None,
        "keep: start with the static network's weights and outputs; paper: random cells and "
        "attention, annealed over temperature_epochs",
        choices=_STARTS,
    )
    firmness: float | None = setting(
        None,
        "start keep: scale of the logits / number of cells; with larger values coefficients change "
        "more slowly",
        "[0.001, 1e6]",
    )


@dataclass
class KernelWarehouseConfig(WarehouseConfig, _PlanConfig):
    """The conversion to a KernelWarehouse network: a plan, and settings that replace its own."""

    warehouses: dict[str, WarehouseConfig] = setting(
        {}, "settings of single warehouses, by name; they take precedence over those of all"
    )

    def overrides(self) -> dict[str, Any]:
        """Settings that differ from the plan's, as keyword arguments of :func:`kw.convert`."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        del given["plan"]
        for name, own in given["warehouses"].items():
            given["warehouses"][name] = {k: v for k, v in own.items() if v is not None}
        return given


@dataclass
class PeerConfig:
    """The conversion to another dynamic convolution; null leaves the method's own value."""

    method: str = setting(doc="method of kw.peers", choices=PEERS, example="dyconv")
    kernels: int | None = setting(
        None,
        "kernels per converted layer; fdconv: groups of frequencies; kerneldna: parents among "
        "the layers of a shape",
        "[1, 1024]",
    )
    reduction: float | None = setting(
        None, "all but condconv: hidden width of the attention / input channels", "(0, 64]"
    )
    layers: str | None = setting(
        None, "layers to convert: a regular expression that matches the whole name"
    )
    start: str | None = setting(
        None,
        "keep: start with the static network's weights and outputs; paper: random kernels and "
        "attention, annealed over temperature_epochs if the method has a temperature",
        choices=_STARTS,
    )

    def settings(self) -> dict[str, Any]:
        """Changed settings, as keyword arguments of :func:`kw.peers.convert`."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        del given["method"]
        return given


@dataclass
class StemConfig:
    """A stem for small images, in place of a ResNet's 7x7 convolution of stride 2 and pooling."""

    stride: int = setting(1, "stride of its 3x3 convolution", "[1, 4]")
    pool: bool = setting(False, "keep the max-pooling of stride 2 after it")


@dataclass
class ModelConfig:
    """The network: a timm backbone, and how it is converted."""

    name: str = setting(doc="timm model name of the static network", example="resnet18")
    num_classes: int = setting(1000, "classes of the classifier", "[1, 1_000_000]")
    drop_rate: float = setting(0.0, "dropout before the classifier", "[0, 0.99]")
    drop_path_rate: float = setting(
        0.0, "probability that a residual branch is dropped", "[0, 0.99]"
    )
    drop_path_decay: str = setting(
        "linear",
        "linear: the rate grows from 0 to drop_path_rate with depth (timm); "
        "constant: every block has it (the papers' ResNets)",
        choices=("linear", "constant"),
    )
    timm_args: dict[str, Any] = setting({}, "further keyword arguments of timm.create_model")
    weights: str | None = setting(
        None,
        "pretrained weights: a file (.safetensors, .pth) of the static or of the converted "
        "network; timm or timm:TAG downloads timm's, hf-hub:user/model[@revision] a model's",
    )
    freeze: list[str] = setting(
        [], "regular expressions: parameters and modules with matching names are not trained"
    )
    gradient_checkpointing: bool = setting(
        False,
        "keep the inputs of blocks alone and compute their insides again in the backward pass: "
        "less memory, for another forward pass",
    )
    stem: StemConfig | None = setting(
        None, "ResNets: a stem for small images, e.g. {stride: 2}; null = the network's own"
    )
    kernel_warehouse: KernelWarehouseConfig | None = setting(
        None, "conversion, e.g. {plan: resnet18, cell_num_ratio: 4}; null = the static network"
    )
    peer: PeerConfig | None = setting(
        None, "conversion to another dynamic convolution instead, e.g. {method: dyconv, kernels: 4}"
    )


@dataclass
class LossConfig:
    """The training loss; evaluations report the cross-entropy, of several classes an image bce."""

    name: str = setting(
        "cross_entropy", "cross_entropy; bce: binary cross-entropy of each class", choices=LOSSES
    )
    args: dict[str, Any] = setting({}, "keyword arguments of the loss")
    class_weights: str | list[float] | None = setting(
        None,
        "factors on the loss of each class, in the order of the classes; balanced: images / "
        "(classes x the class's images), of the training set",
        "[0, inf)",
        choices=("balanced",),
    )


@dataclass
class DistillationConfig:
    """A teacher, whose logits for the same images are learned beside the labels
    (docs/recipes.md)."""

    teacher: str = setting(
        doc="a run of this project (work directory or checkpoint); with weights, the timm name of "
        "a static network",
        example="resnet50",
    )
    weights: str | None = setting(
        None, "of a timm network: a file, or timm or timm:TAG, as model.weights; null = a run"
    )
    kind: str = setting(
        "soft",
        "soft: the teacher's probabilities (Hinton et al., 2015); hard: its most likely class "
        "(DeiT)",
        choices=("soft", "hard"),
    )
    temperature: float = setting(
        1.0, "soft: T, by which both networks' logits are divided", "(0, 1000]"
    )
    alpha: float = setting(
        0.5, "the teacher's share: (1 - alpha) loss + alpha distillation", "(0, 1]"
    )


@dataclass
class PicturesConfig:
    """Pictures for TensorBoard during training; they need matplotlib (docs/visualizing.md)."""

    interval: int = setting(1, "epochs between pictures", "[1, 1_000_000]")
    images: int = setting(16, "test images over which coefficients are averaged", "[1, 1024]")


@dataclass
class CompileConfig:
    """How torch.compile compiles the network."""

    mode: str = setting(
        "default",
        "of torch.compile; reduce-overhead launches what it compiled as CUDA graphs",
        choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    )


@dataclass(kw_only=True)
class ClassifierOptimizerConfig(OptimizerConfig):
    """The optimizer of a classifier."""

    layer_decay: float = setting(
        1.0,
        "factor on the learning rate from layer to layer, from the classifier to the stem; cells "
        "have the rate of the deepest layer that uses them. 1 = the same rate for all",
        "(0, 1]",
    )


@dataclass
class _Classification:
    # A base class of its own so that model and data come first.
    model: ModelConfig = field(metadata={"doc": "the network"})
    data: DataConfig = field(metadata={"doc": "images and augmentation"})


@dataclass(kw_only=True)
class Config(RunConfig, _Classification):
    """One training run of a classifier."""

    optimizer: ClassifierOptimizerConfig = field(metadata={"doc": "the optimizer"})
    loss: LossConfig = table(LossConfig, "what training minimises")
    distillation: DistillationConfig | None = setting(
        None, "learning from a teacher, e.g. {teacher: resnet50, weights: timm}; null = none"
    )
    metrics: dict[str, dict[str, Any]] = setting(
        {}, "metrics besides the accuracy: registered names, with their arguments"
    )
    label_smoothing: float = setting(0.0, "probability mass spread over all classes", "[0, 0.99]")
    channels_last: bool | None = setting(
        None, "NHWC memory layout of images and 4-D weights; null = on GPUs"
    )
    compile: bool | CompileConfig = setting(
        False, "compile the network with torch.compile; {mode: ...} is its mode"
    )
    custom_imports: list[str] = setting(
        [],
        "your modules that register names used here; imported only if the command line or the "
        "environment allows it (docs/extending.md)",
    )
    pictures: PicturesConfig | None = setting(
        None, "heat maps of coefficients and a training batch for TensorBoard; null = none"
    )

    @property
    def several_classes(self) -> bool:
        """Whether an image has any number of classes, each decided by itself."""
        return "multilabel" in self.metrics
