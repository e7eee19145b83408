# Reproduces  mask_rcnn_kw_resnet50_1x of
#             "COCO val2017, Mask R-CNN FPN, 12 epochs".
# Expect      box AP 41.8, mask AP 38.4 (the authors' results page).
# Weights     the best checkpoint of the classifier, at model.backbone.weights.
# Batch       8 GPUs x 2 images = 16; fewer GPUs accumulate to the same.
# Run         torchrun --nproc-per-node 8 tools/train.py \
#               configs/coco/mask_rcnn_kw_resnet50_1x.py --launcher pytorch

_base_ = ["../_base_/coco/mask_rcnn_fpn.py"]

model = dict(
    backbone=dict(
        network="../imagenet/resnet50/kw_resnet50_1x.yaml",
        weights="work_dirs/kw_resnet50_1x/best.pth",
        out_indices=(1, 2, 3, 4),  # layer1 to layer4
        frozen_stages=1,
    ),
)
