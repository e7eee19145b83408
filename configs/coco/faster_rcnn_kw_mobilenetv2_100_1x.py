# Detects     boxes alone, with the backbone and the recipe of mask_rcnn_kw_mobilenetv2_100_1x.py.
# Expect      nothing published for this combination.
# Weights     the best checkpoint of the classifier, at model.backbone.weights.
# Batch       8 GPUs x 2 images = 16; fewer GPUs accumulate to the same.
# Run         torchrun --nproc-per-node 8 tools/train.py \
#               configs/coco/faster_rcnn_kw_mobilenetv2_100_1x.py --launcher pytorch

_base_ = ["../_base_/coco/faster_rcnn_fpn.py"]

model = dict(
    backbone=dict(
        network="../imagenet/mobilenetv2/kw_mobilenetv2_100_1x.yaml",
        weights="work_dirs/kw_mobilenetv2_100_1x/best.pth",
        out_indices=(1, 2, 3, 5),  # strides 4, 8, 16, and the last 1x1 convolution
        frozen_stages=1,
    ),
    neck=dict(in_channels=[24, 32, 96, 1280]),
)
