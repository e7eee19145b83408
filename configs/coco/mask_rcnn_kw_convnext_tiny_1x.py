# Reproduces  mask_rcnn_kw_convnext_tiny_1x of
#             "COCO val2017, Mask R-CNN FPN, 12 epochs".
# Expect      box AP 44.7, mask AP 40.6 (the authors' results page).
#             The results page labels this row 4x; its configuration is the 1x one.
# Weights     the best checkpoint of the classifier, at model.backbone.weights.
# Batch       8 GPUs x 2 images = 16; fewer GPUs accumulate to the same.
# Run         torchrun --nproc-per-node 8 tools/train.py \
#               configs/coco/mask_rcnn_kw_convnext_tiny_1x.py --launcher pytorch

_base_ = ["../_base_/coco/mask_rcnn_fpn.py"]

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
