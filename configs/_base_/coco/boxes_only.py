# The same recipe for detectors without masks: they are not read from the annotations.
_base_ = ["recipe_1x.py"]

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    *_base_.train_pipeline[2:],
]
