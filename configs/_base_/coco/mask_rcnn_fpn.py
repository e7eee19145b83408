# Mask R-CNN with FPN as mmdetection has it, on a backbone of this project.
_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "recipe_1x.py"]

model = dict(
    backbone=dict(_delete_=True, type="kw.Backbone", norm_eval=True),
)
