"""Images from folders to the device: dataset, transforms, samplers, loaders, batch preprocessing.

The demo's data are written by :mod:`kw.data.digits`, which is run as a program and therefore not
imported here.
"""

from kw.data.dataset import DataError, ImageFolder, Sample, check_data_root
from kw.data.loader import build_eval_loader, build_loader, build_train_loader, stop_workers
from kw.data.preprocess import BatchPreprocessor
from kw.data.samplers import EvalBatchSampler, TrainBatchSampler
from kw.data.seeding import derive_seed, seeded
from kw.data.transforms import build_transform

__all__ = [
    "BatchPreprocessor",
    "DataError",
    "EvalBatchSampler",
    "ImageFolder",
    "Sample",
    "TrainBatchSampler",
    "build_eval_loader",
    "build_loader",
    "build_train_loader",
    "build_transform",
    "check_data_root",
    "derive_seed",
    "seeded",
    "stop_workers",
]
