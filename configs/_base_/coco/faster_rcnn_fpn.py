# Faster R-CNN with FPN as mmdetection has it, on a backbone of this project.
_base_ = ["mmdet::_base_/models/faster-rcnn_r50_fpn.py", "boxes_only.py"]

model = dict(
    backbone=dict(_delete_=True, type="kw.Backbone", norm_eval=True),
)
