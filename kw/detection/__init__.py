"""Detection and instance segmentation: mmdetection with KernelWarehouse backbones."""
