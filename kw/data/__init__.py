"""Images from folders to the device: dataset, transforms, samplers, loaders, batch preprocessing.

The demo's data are written by :mod:`kw.data.digits`, which is run as a program and therefore not
imported here.
"""

from typing import TYPE_CHECKING

from ..lazy import lazily

if TYPE_CHECKING:
    from .dataset import UNREADABLE, ImageFolder, Sample
    from .faults import BadImage, FaultLog, TolerantDataset
    from .listing import Listing, list_splits
    from .loader import Loader, build_loader, deaths_explained, stop_workers
    from .preprocess import BatchPreprocessor
    from .reading import BadImageError, DataError, read_image
    from .samplers import EvalBatchSampler, TrainBatchSampler
    from .seeding import derive_seed, seeded, uniform_draws
    from .splits import open_training, open_validation, read_files, test_images
    from .transforms import build_transform

__all__ = [
    "UNREADABLE",
    "BadImage",
    "BadImageError",
    "BatchPreprocessor",
    "DataError",
    "EvalBatchSampler",
    "FaultLog",
    "ImageFolder",
    "Listing",
    "Loader",
    "Sample",
    "TolerantDataset",
    "TrainBatchSampler",
    "build_loader",
    "build_transform",
    "deaths_explained",
    "derive_seed",
    "list_splits",
    "open_training",
    "open_validation",
    "read_files",
    "read_image",
    "seeded",
    "stop_workers",
    "test_images",
    "uniform_draws",
]

__getattr__ = lazily(
    __name__,
    {
        "dataset": "UNREADABLE ImageFolder Sample",
        "faults": "BadImage FaultLog TolerantDataset",
        "listing": "Listing list_splits",
        "loader": "Loader build_loader deaths_explained stop_workers",
        "preprocess": "BatchPreprocessor",
        "reading": "BadImageError DataError read_image",
        "samplers": "EvalBatchSampler TrainBatchSampler",
        "seeding": "derive_seed seeded uniform_draws",
        "splits": "open_training open_validation read_files test_images",
        "transforms": "build_transform",
    },
)
