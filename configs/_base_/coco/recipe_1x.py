# The papers' recipe for detectors on COCO, 12 epochs: AdamW, multi-scale training with DETR's crop
# (arXiv:2303.08347 follows Sparse R-CNN, arXiv:2011.12450, in its augmentation).
data = dict(root="data/coco", workers=4)

epochs = 12
total_batch_size = 16
batch_size = 2  # per GPU: 8 GPUs; fewer accumulate
seed = 0
precision = "fp32"  # bf16 is faster; the published figures are from fp32
eval_interval = 1
log_interval = 50
checkpoint = dict(interval=1, keep=2)

optimizer = dict(
    name="adamw",
    lr=1e-4,
    betas=[0.9, 0.999],
    weight_decay=0.05,
    exempt_from_decay="norm",
)
# 500 updates of 7,329 an epoch warm up, as in mmdetection's schedules; of a small set a tenth.
schedule = dict(name="step", warmup_updates=500, milestones=[8, 11], gamma=0.1)

_sides = [(480 + 32 * i, 1333) for i in range(11)]  # shorter side 480 to 800 pixels
_resize = dict(type="RandomChoiceResize", scales=_sides, keep_ratio=True)
_crop = [
    dict(
        type="RandomChoiceResize", scales=[(400, 4200), (500, 4200), (600, 4200)], keep_ratio=True
    ),
    dict(
        type="RandomCrop",
        crop_type="absolute_range",
        crop_size=(384, 600),
        allow_negative_crop=True,
    ),
    _resize,
]

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="RandomChoice", transforms=[[_resize], _crop]),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(1333, 800), keep_ratio=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
