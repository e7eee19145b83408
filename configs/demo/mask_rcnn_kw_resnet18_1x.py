# The detection demo: Mask R-CNN on digits scattered over small canvases, with the classification
# demo's KernelWarehouse network as its backbone.
# Data        python -m kw.data.digit_scenes work_dirs/demo/digit_scenes
# Weights     make demo, or the first part of make demo-detection
# Run         python tools/train.py configs/demo/mask_rcnn_kw_resnet18_1x.py

_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py"]

_channels = 48

model = dict(
    data_preprocessor=dict(pad_size_divisor=16),
    backbone=dict(
        _delete_=True,
        type="kw.Backbone",
        network="kw_resnet18_1x.yaml",
        weights="work_dirs/demo/kw_resnet18_1x/best.pth",
        out_indices=(1, 2, 3, 4),
    ),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=_channels, num_outs=4),
    rpn_head=dict(
        in_channels=_channels,
        feat_channels=_channels,
        # Digits are 22 to 60 pixels high and never wider than high.
        anchor_generator=dict(scales=[4], ratios=[1.0, 1.5, 2.5], strides=[4, 8, 16, 32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(
            out_channels=_channels, featmap_strides=[4, 8, 16], finest_scale=28
        ),
        bbox_head=dict(in_channels=_channels, fc_out_channels=128),
        mask_roi_extractor=dict(
            out_channels=_channels, featmap_strides=[4, 8, 16], finest_scale=28
        ),
        mask_head=dict(num_convs=2, in_channels=_channels, conv_out_channels=_channels),
    ),
    # Small canvases need fewer regions than COCO's images.
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=300, max_per_img=150),
        rcnn=dict(sampler=dict(num=64)),
    ),
    test_cfg=dict(
        rpn=dict(nms_pre=300, max_per_img=100), rcnn=dict(score_thr=0.05, max_per_img=20)
    ),
)

data = dict(
    root="work_dirs/demo/digit_scenes",
    train_annotations="annotations/instances_train.json",
    train_images="train",
    val_annotations="annotations/instances_val.json",
    val_images="val",
    workers=1,
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs"),  # no mirroring: a mirrored digit is none
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale_factor=1.0, keep_ratio=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "ori_shape", "img_shape", "scale_factor")),
]

epochs = 7
total_batch_size = 8
batch_size = 8
eval_interval = 7
log_interval = 15
optimizer = dict(name="adamw", lr=2e-3, weight_decay=0.05, clip_grad=10.0)
schedule = dict(name="cosine", warmup_epochs=0.5)
