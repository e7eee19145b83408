# A detector learns eight images by heart: Mask R-CNN on a narrow KernelWarehouse ResNet18, from
# random weights, evaluated on the images that it is trained on. It shows that boxes, classes, masks
# and their evaluation learn; AP here says nothing about other images.
# Data        python scripts/subset_coco.py data/coco/annotations/instances_train2017.json \
#               data/coco/annotations/first_8.json --images 8
# Run         python tools/train.py configs/demo/overfit_coco.py
# Elsewhere   --cfg-options data.root=FOLDER, which holds annotations/first_8.json and train2017/
# Expect      box AP50 0.81, mask AP50 0.75 (box AP 0.73, mask AP 0.46) in about 4 minutes with two
#             threads on two CPU cores: measured on images 25, 30, 42, 49, 61, 71, 72 and 73 of
#             train2017, reduced to a longest side of 416 pixels. After half of the run box AP50 is
#             0.62. Other images and other machines differ.

_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py"]

_width = 64  # channels of the pyramid and of the heads
_norm = dict(type="GN", num_groups=8)  # BatchNorm needs more images

model = dict(
    data_preprocessor=dict(pad_size_divisor=64),
    backbone=dict(
        _delete_=True,
        type="kw.Backbone",
        network=dict(
            name="resnet18",
            timm_args=dict(channels=[32, 64, 128, 256], norm_layer="groupnorm1"),
            kernel_warehouse=dict(plan="resnet18", norm="layer"),
        ),
    ),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=_width, norm_cfg=_norm),
    rpn_head=dict(
        in_channels=_width,
        feat_channels=_width,
        anchor_generator=dict(scales=[4]),  # 16 to 256 pixels
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=_width),
        bbox_head=dict(in_channels=_width, fc_out_channels=256),
        mask_roi_extractor=dict(out_channels=_width),
        mask_head=dict(in_channels=_width, conv_out_channels=_width, num_convs=2),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=dict(sampler=dict(num=128, pos_fraction=0.5)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=200)),
)

_resize = dict(type="Resize", scale=(416, 320), keep_ratio=True)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    _resize,
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    _resize,
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]

data = dict(
    root="data/coco",
    train_annotations="annotations/first_8.json",
    train_images="train2017",
    val_annotations="annotations/first_8.json",
    val_images="train2017",
    workers=2,
)
epochs = 100
total_batch_size = 4
batch_size = 4
eval_interval = 50
checkpoint = dict(interval=50, keep=1)
optimizer = dict(name="adamw", lr=1e-3, weight_decay=1e-4, clip_grad=1.0)
schedule = dict(name="cosine", warmup_epochs=10, final_lr=1e-5)
