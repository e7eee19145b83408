"""COCO data sets through mmdetection's transforms, with random choices that depend on the image
alone.

A sample is what mmdetection's ``PackDetInputs`` makes, ``{"inputs": uint8 [3, H, W],
"data_samples": DetDataSample}``; a batch has lists of both.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

from mmengine.dataset import pseudo_collate
from torch.utils.data import DataLoader, Dataset

from ..config import ConfigError
from ..data import DataError, EvalBatchSampler, TrainBatchSampler, build_loader, seeded
from ..errors import UserError, one_line
from .config import DetectorConfig
from .mmdet import CocoDataset
from .schema import CocoDataConfig

__all__ = ["Samples", "build_eval_loader", "build_train_loader"]

_TRIES = 20


class Samples(Dataset[Any]):
    """An mmdetection data set by keys ``(epoch, index)``.

    Args:
        dataset: the data set, complete.
        seed: with the key it decides every random choice of the transforms, so that neither the
            number of loader processes nor what was drawn before matters.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.metainfo = dataset.metainfo  # the runner asks for it
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        """A transformed sample.

        Raises:
            DataError: the image cannot be read, or its transforms keep dropping it.
        """
        epoch, index = key
        with seeded("detection", self.seed, epoch, index):
            # A random crop may miss every object: another crop of the same image then.
            for _ in range(1 if self.dataset.test_mode else _TRIES):
                try:
                    sample = self.dataset.prepare_data(index)
                except (OSError, AttributeError, ValueError) as error:
                    path = self.dataset.get_data_info(index)["img_path"]
                    raise DataError(f"{path}: {type(error).__name__}: {error}") from error
                if sample is not None:
                    return sample
        path = self.dataset.get_data_info(index)["img_path"]
        raise DataError(f"{path}: train_pipeline left no object in {_TRIES} tries")


def build_train_loader(
    config: DetectorConfig, classes: Sequence[str], rank: int, world_size: int
) -> DataLoader[Any]:
    """The training images of one process; epochs as in :class:`kw.data.TrainBatchSampler`.

    Raises:
        ConfigError: the batch does not fit the processes or the images, or a transform of
            ``train_pipeline`` does not exist.
        DataError: no image is left to train on.
    """
    run, data = config.run, config.run.data
    filters = {"filter_empty_gt": not data.keep_empty, "min_size": data.min_size}
    dataset = _build(
        config.train_pipeline, "train_pipeline", data, True, classes, filter_cfg=filters
    )
    if len(dataset) == 0:
        raise DataError(
            f"{data.train_annotations}: no image with an object of "
            f"{', '.join(classes[:5])} and a side of {data.min_size} pixels (data.min_size)"
        )
    groups = None
    if data.group_by_aspect:
        infos = map(dataset.get_data_info, range(len(dataset)))
        groups = [int(info["width"] > info["height"]) for info in infos]
    try:
        sampler = TrainBatchSampler(
            len(dataset),
            run.batch_size,
            run.total_batch_size,
            rank,
            world_size,
            run.seed,
            groups,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return build_loader(Samples(dataset, run.seed), sampler, data.workers, pseudo_collate)


def build_eval_loader(
    config: DetectorConfig, classes: Sequence[str], rank: int, world_size: int
) -> DataLoader[Any]:
    """This process's share of the test images, none of them twice.

    Raises:
        ConfigError: a transform of ``test_pipeline`` does not exist.
    """
    run = config.run
    dataset = _build(config.test_pipeline, "test_pipeline", run.data, False, classes)
    batch_size = run.eval_batch_size or run.batch_size
    sampler = EvalBatchSampler(len(dataset), batch_size, rank, world_size)
    return build_loader(Samples(dataset, run.seed), sampler, run.data.workers, pseudo_collate)


def _build(
    pipeline: Sequence[Any],
    key: str,
    data: CocoDataConfig,
    training: bool,
    classes: Sequence[str],
    **settings: Any,
) -> Any:
    try:
        # pycocotools prints how it is getting on.
        with contextlib.redirect_stdout(io.StringIO()):
            return CocoDataset(
                data_root=data.root,
                ann_file=data.train_annotations if training else data.val_annotations,
                data_prefix={"img": data.train_images if training else data.val_images},
                metainfo={"classes": tuple(classes)},
                pipeline=list(pipeline),
                test_mode=not training,
                **settings,
            )
    except (UserError, MemoryError):
        raise
    except Exception as error:  # what mmdetection makes of settings that it does not expect
        raise ConfigError(f"{key}: mmdetection cannot build it: {one_line(error)}") from error
