"""Object detection and instance segmentation on sets in COCO's format."""
