"""Images from folders to the device: dataset, transforms, samplers, loaders, batch preprocessing.

The demo's data are written by :mod:`kw.data.digits`, which is run as a program and therefore not
imported here.
"""

from kw.data.dataset import UNREADABLE, ImageFolder, Sample, check_data_root
from kw.data.faults import BadImage, FaultLog, FaultyDataset
from kw.data.loader import (
    Loader,
    build_eval_loader,
    build_loader,
    build_train_loader,
    deaths_explained,
    stop_workers,
)
from kw.data.preprocess import BatchPreprocessor
from kw.data.reading import BadImageError, DataError, read_image
from kw.data.samplers import EvalBatchSampler, TrainBatchSampler
from kw.data.seeding import derive_seed, seeded, uniform_draws
from kw.data.splits import open_training, open_validation, test_images
from kw.data.transforms import build_transform

__all__ = [
    "UNREADABLE",
    "BadImage",
    "BadImageError",
    "BatchPreprocessor",
    "DataError",
    "EvalBatchSampler",
    "FaultLog",
    "FaultyDataset",
    "ImageFolder",
    "Loader",
    "Sample",
    "TrainBatchSampler",
    "build_eval_loader",
    "build_loader",
    "build_train_loader",
    "build_transform",
    "check_data_root",
    "deaths_explained",
    "derive_seed",
    "open_training",
    "open_validation",
    "read_image",
    "seeded",
    "stop_workers",
    "test_images",
    "uniform_draws",
]
