"""Plans of the released networks, for the module names of timm's backbones and of torchvision's.

ResNets are named alike in both; rules for MobileNetV2 and ConvNeXt have a pattern for each.

Source of the layouts: the authors' release; the resulting sizes are tested against the
parameter counts and warehouses of the released checkpoints. DeiT's is this project's own.

A plan holds the settings that all models of its name share; ratios that depend on the budget are
passed to :func:`kw.convert`. Layers that no rule names stay static: stems of the ResNets,
classifiers, the depthwise or pointwise layers that a budget leaves out.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..registry import PLANS
from .plan import Plan, Rule
from .warehouse import WarehouseSettings


def _resnet(*static: str) -> Plan:
    """One warehouse a stage with all its 3x3 and 1x1 convolutions.

    The first convolution and the strided shortcut of a stage still belong to the stage before:
    their input has its width.
    """
    rule = Rule(
        r"layer(?P<stage>\d)\.\d+\.(conv\d|downsample\.0)",
        warehouse="layer{stage}",
        handover=r"layer[234]\.0\.(conv1|downsample\.0)",
    )
    return Plan((*map(Rule, static), rule))


# Layers of an inverted residual, in timm's names and in torchvision's. timm calls the pointwise
# layer after a depthwise one conv_pwl, except in the first block, which has one pointwise layer:
# conv_pw. torchvision numbers the layers; its first block begins with the depthwise one.
_EXPAND = (r"(?<!blocks\.0\.0\.)conv_pw", r"(?<!features\.1\.)conv\.0\.0")
_DEPTHWISE = (r"conv_dw", r"(conv\.1\.0|(?<=features\.1\.)conv\.0\.0)")
_PROJECT = (r"(conv_pwl|(?<=blocks\.0\.0\.)conv_pw)", r"(conv\.2|(?<=features\.1\.)conv\.1)")
_STEM = r"conv_stem|features\.0\.0"
_HEAD = r"conv_head|features\.18\.0"  # the last 1x1
_FEATURES = (1, 3, 5, 8, 12, 15, 18)  # torchvision's first block of stages 1 to 6, and the end


def _mobilenet_blocks(stage: int, *kinds: tuple[str, str]) -> str:
    """The layers of some kinds in stage 1 to 6.

    The seven settings of inverted residuals are timm's ``blocks.0`` to ``blocks.6``. A stage holds
    one of them without its first block, which the stage before has, and the first block of the
    next; the last stage holds two settings. torchvision numbers the blocks through.
    """
    timm, torchvision = ("|".join(names) for names in zip(*kinds, strict=True))
    own = r"0\.0" if stage == 1 else rf"{stage - 1}\.[1-9]"
    blocks = "|".join(map(str, range(_FEATURES[stage - 1], _FEATURES[stage])))
    return rf"blocks\.({own}|{stage}\.0)\.({timm})|features\.({blocks})\.({torchvision})"


def _mobilenetv2_1x() -> Iterator[Rule]:
    """Both pointwise kinds of a stage share a warehouse; the last 1x1 joins the last stage."""
    yield Rule(_STEM, "stem")
    for stage in range(1, 7):
        pointwise = _mobilenet_blocks(stage, _EXPAND, _PROJECT)
        rules = [
            Rule(f"{pointwise}|{_HEAD}" if stage == 6 else pointwise, f"stage{stage}_pointwise"),
            Rule(_mobilenet_blocks(stage, _DEPTHWISE), f"stage{stage}_depthwise"),
        ]
        # Warehouses are numbered in the order of first use, and the first block does not expand.
        yield from reversed(rules) if stage == 1 else rules


def _mobilenetv2_4x() -> Iterator[Rule]:
    """Pointwise layers that expand, those that project, and depthwise layers apart."""
    yield Rule(_STEM, "stem")
    for stage in range(1, 7):
        project = _mobilenet_blocks(stage, _PROJECT) + (f"|{_HEAD}" if stage == 6 else "")
        rules = [
            Rule(_mobilenet_blocks(stage, _EXPAND), f"stage{stage}_expand"),
            Rule(_mobilenet_blocks(stage, _DEPTHWISE), f"stage{stage}_depthwise"),
            Rule(project, f"stage{stage}_project"),
        ]
        yield from (*rules[1:], rules[0]) if stage == 1 else rules


def _mobilenetv2_1d2x() -> Iterator[Rule]:
    """Early pointwise layers have few parameters and stay static; the classifier is converted.

    Budget 1/2 in the layers with most parameters, 1 elsewhere.
    """
    half = {"cell_num_ratio": 0.5, "cell_inplane_ratio": 0.5, "cell_outplane_ratio": 0.5}
    yield Rule(_STEM, "stem")
    for stage in range(1, 6):
        yield Rule(_mobilenet_blocks(stage, _DEPTHWISE), f"stage{stage}_depthwise")
    yield Rule(_mobilenet_blocks(6, _EXPAND), "stage6_expand", settings=half)
    yield Rule(_mobilenet_blocks(6, _DEPTHWISE), "stage6_depthwise")
    project = f"{_mobilenet_blocks(6, _PROJECT)}|{_HEAD}"
    yield Rule(project, "stage6_project", settings=half)
    # 0.025 of 1280 features: cells of 32. A backbone without a classifier is converted as well.
    cells = {"cell_num_ratio": 0.5, "cell_inplane_ratio": 0.025}
    yield Rule(r"classifier(\.1)?", "classifier", settings=cells, optional=True)


def _convnext() -> Iterator[Rule]:
    """Per stage a warehouse for both pointwise layers and one for the depthwise; no handover."""
    yield Rule(r"stem\.0|features\.0\.0", "stem")
    for stage in (1, 2, 3):
        names = rf"stages\.{stage}\.downsample\.1|features\.{2 * stage}\.1"
        yield Rule(names, f"stage{stage}_downsample")
    for stage in range(4):
        blocks = rf"(stages\.{stage}\.blocks|features\.{2 * stage + 1})\.\d+\."
        yield Rule(blocks + r"(conv_dw|block\.0)", f"stage{stage}_depthwise")
        yield Rule(blocks + r"(mlp\.fc[12]|block\.[35])", f"stage{stage}_pointwise")


def _deit() -> Iterator[Rule]:
    """Every four blocks share a warehouse; the projection after the attention stays static.

    The paper reports DeiT, but neither code nor layout are public. This one was chosen because its
    sizes agree with the reported ones: within 0.05M for DeiT-Tiny 1x and 4x and DeiT-Small 1x.
    """
    for stage, blocks in enumerate(("[0-3]", "[4-7]", "8|9|10|11")):
        yield Rule(rf"blocks\.({blocks})\.(attn\.qkv|mlp\.fc[12])", f"stage{stage}")


_OWN = {
    "resnet18": _resnet(),
    # The first 1x1 and the stride-1 shortcut have no stage before that could hand cells over.
    "resnet50": _resnet(r"layer1\.0\.(conv1|downsample\.0)"),
    "mobilenetv2_1d2x": Plan(tuple(_mobilenetv2_1d2x()), WarehouseSettings(reduction=1 / 32)),
    "mobilenetv2_1x": Plan(tuple(_mobilenetv2_1x())),
    "mobilenetv2_4x": Plan(tuple(_mobilenetv2_4x()), WarehouseSettings(cell_num_ratio=4)),
    "convnext_tiny": Plan(tuple(_convnext()), WarehouseSettings(norm="layer")),
    "deit": Plan(tuple(_deit()), WarehouseSettings(norm="layer")),
}
PLANS.update(_OWN)
