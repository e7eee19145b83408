# Detects     boxes alone, with the backbone and the recipe of mask_rcnn_kw_resnet50_1x.py.
# Expect      nothing published for this combination.
# Weights     the best checkpoint of the classifier, at model.backbone.weights.
# Batch       8 GPUs x 2 images = 16; fewer GPUs accumulate to the same.
# Run         torchrun --nproc-per-node 8 tools/train.py \
#               configs/coco/faster_rcnn_kw_resnet50_1x.py --launcher pytorch

_base_ = ["../_base_/coco/faster_rcnn_fpn.py"]

model = dict(
    backbone=dict(
        network="../imagenet/resnet50/kw_resnet50_1x.yaml",
        weights="work_dirs/kw_resnet50_1x/best.pth",
        out_indices=(1, 2, 3, 4),  # layer1 to layer4
        frozen_stages=1,
    ),
)
