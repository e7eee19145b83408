_base_ = ["../_base_/coco/mask_rcnn_fpn.py"]

model = dict(
    backbone=dict(
        network="../imagenet/resnet50/kw_resnet50_1x.yaml",
        weights="work_dirs/kw_resnet50_1x/best.pth",
        out_indices=(1, 2, 3, 4),
        frozen_stages=1,
    ),
)
