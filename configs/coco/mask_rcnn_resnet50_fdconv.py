# Reproduces  mask_rcnn_resnet50_fdconv of
#             "COCO val2017, Mask R-CNN FPN, 12 epochs".
# Expect      box AP 42.4, mask AP 38.6 (the method's own paper).
# Weights     the best checkpoint of the classifier, at model.backbone.weights.
# Batch       8 GPUs x 2 images = 16; fewer GPUs accumulate to the same.
# Run         torchrun --nproc-per-node 8 tools/train.py \
#               configs/coco/mask_rcnn_resnet50_fdconv.py --launcher pytorch
# Differs     the recipe is KernelWarehouse's, as for all rows of this table; the classifier's too.

_base_ = ["../_base_/coco/mask_rcnn_fpn.py"]

model = dict(
    backbone=dict(
        network="../imagenet/resnet50/resnet50_fdconv.yaml",
        weights="work_dirs/resnet50_fdconv/best.pth",
        out_indices=(1, 2, 3, 4),  # layer1 to layer4
        frozen_stages=1,
    ),
)
