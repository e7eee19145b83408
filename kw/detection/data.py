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

import numpy as np
from mmcv.transforms import BaseTransform, LoadImageFromFile
from mmengine.dataset import pseudo_collate

from ..config import ConfigError
from ..config.run_schema import BadImagesConfig
from ..data import (
    DataError,
    EvalBatchSampler,
    FaultyDataset,
    Loader,
    TrainBatchSampler,
    build_loader,
    read_image,
    seeded,
)
from ..errors import UserError, one_line
from .config import DetectorConfig
from .mmdet import CocoDataset, register_all_modules
from .schema import CocoDataConfig

__all__ = ["Samples", "build_eval_loader", "build_train_loader"]

_TRIES = 20


class Samples(FaultyDataset):
    """An mmdetection data set by keys ``(epoch, index)``.

    Args:
        dataset: the data set, complete. Its loading of images from files is replaced by this
            project's (:func:`kw.data.read_image`): OpenCV gives half a JPEG for half a file. The
            pixels of files in order are OpenCV's.
        seed: with the key it decides every random choice of the transforms, so that neither the
            number of loader processes nor what was drawn before matters.
        bad_images: what becomes of images that cannot be read; evaluation leaves them out, which
            makes all objects in them missed ones.
    """

    def __init__(self, dataset: Any, seed: int, bad_images: BadImagesConfig | None = None) -> None:
        bad_images = bad_images or BadImagesConfig(policy="raise")
        super().__init__(seed, not dataset.test_mode, bad_images)
        self.dataset = dataset
        self.metainfo = dataset.metainfo  # the runner asks for it
        steps = dataset.pipeline.transforms
        for place, step in enumerate(steps):
            if type(step) is LoadImageFromFile and _is_plain(step):
                steps[place] = LoadImage(step, bad_images.max_pixels)

    def __len__(self) -> int:
        return len(self.dataset)

    def path(self, index: int) -> str:
        """The file of an image."""
        return self.dataset.get_data_info(index)["img_path"]

    def read(self, index: int, key: tuple[int, int]) -> Any:
        """A transformed sample.

        Raises:
            BadImageError: the image cannot be read.
            DataError: its transforms fail or keep dropping it.
        """
        with seeded("detection", self.seed, *key):
            # A random crop may miss every object: another crop of the same image then.
            for _ in range(_TRIES if self.training else 1):
                try:
                    sample = self.dataset.prepare_data(index)
                except DataError:
                    raise
                except (OSError, AttributeError, ValueError) as error:
                    message = f"{self.path(index)}: {type(error).__name__}: {error}"
                    raise DataError(message) from error
                if sample is not None:
                    return sample
        raise DataError(f"{self.path(index)}: train_pipeline left no object in {_TRIES} tries")


def _is_plain(step: LoadImageFromFile) -> bool:
    """Whether it reads colour, by OpenCV, from a file of this machine."""
    how = (step.imdecode_backend, step.color_type)
    return how == ("cv2", "color") and not (step.backend_args or step.file_client_args)


class LoadImage(BaseTransform):
    """mmcv's ``LoadImageFromFile`` for files that OpenCV would take for good.

    Args:
        settings: the transform that it stands for.
        max_pixels: larger images are refused.
    """

    def __init__(self, settings: LoadImageFromFile, max_pixels: int) -> None:
        self.settings = settings
        self.max_pixels = max_pixels

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Read ``img_path``.

        Raises:
            BadImageError: it cannot be read.
        """
        # OpenCV turns colour images as their EXIF data say, so that annotations fit either.
        image = read_image(results["img_path"], self.max_pixels, upright=True)
        pixels = np.ascontiguousarray(np.asarray(image)[:, :, ::-1])  # BGR, as OpenCV's
        results["img"] = pixels.astype(np.float32) if self.settings.to_float32 else pixels
        results["img_shape"] = results["ori_shape"] = pixels.shape[:2]
        return results


def build_train_loader(
    config: DetectorConfig, classes: Sequence[str], rank: int, world_size: int
) -> Loader:
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
    sampler = TrainBatchSampler(
        len(dataset),
        run.batch_size,
        run.total_batch_size,
        rank,
        world_size,
        run.seed,
        groups,
    )
    samples = Samples(dataset, run.seed, data.bad_images)
    return build_loader(samples, sampler, data.workers, pseudo_collate)


def build_eval_loader(
    config: DetectorConfig, classes: Sequence[str], rank: int, world_size: int
) -> Loader:
    """This process's share of the test images, none of them twice.

    Raises:
        ConfigError: a transform of ``test_pipeline`` does not exist.
    """
    run = config.run
    dataset = _build(config.test_pipeline, "test_pipeline", run.data, False, classes)
    batch_size = run.eval_batch_size or run.batch_size
    sampler = EvalBatchSampler(len(dataset), batch_size, rank, world_size)
    samples = Samples(dataset, run.seed, run.data.bad_images)
    return build_loader(samples, sampler, run.data.workers, pseudo_collate)


def _build(
    pipeline: Sequence[Any],
    key: str,
    data: CocoDataConfig,
    training: bool,
    classes: Sequence[str],
    **settings: Any,
) -> Any:
    register_all_modules(init_default_scope=True)
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
