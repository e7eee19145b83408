"""Plans of the released networks, for the module names of timm's backbones.

Source of the layouts: the authors' release as restated in the paper's appendix; the sizes that they
lead to are tested against the released checkpoints.
"""

from __future__ import annotations

from .plan import Plan, Rule

__all__ = ["PLANS"]

# One warehouse a stage with all its 3x3 and 1x1 convolutions. The first convolution and the strided
# shortcut of a stage still belong to the stage before: their input has its width.
RESNET_BASIC = Plan(
    (
        Rule(r"conv1"),
        Rule(
            r"layer(?P<stage>\d)\.\d+\.(conv\d|downsample\.0)",
            warehouse="layer{stage}",
            handover=r"layer[234]\.0\.(conv1|downsample\.0)",
        ),
        Rule(r"fc"),
    )
)

PLANS: dict[str, Plan] = {"resnet18": RESNET_BASIC}
