# Detects     boxes alone, with the backbone and the recipe of mask_rcnn_kw_convnext_tiny_1x.py.
# Expect      nothing published for this combination.
# Weights     the best checkpoint of the classifier, at model.backbone.weights.
# Batch       8 GPUs x 2 images = 16; fewer GPUs accumulate to the same.
# Run         torchrun --nproc-per-node 8 tools/train.py \
#               configs/coco/faster_rcnn_kw_convnext_tiny_1x.py --launcher pytorch

_base_ = ["../_base_/coco/faster_rcnn_fpn.py"]

model = dict(
    backbone=dict(
        network="../imagenet/convnext/kw_convnext_tiny_1x.yaml",
        weights="work_dirs/kw_convnext_tiny_1x/best.pth",
        out_indices=(0, 1, 2, 3),  # the four stages
        drop_path_rate=0.4,
        output_norm=True,
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

optimizer = dict(layer_decay=dict(rate=0.95, blocks=3))  # stem and six groups
schedule = dict(milestones=[9, 11])
