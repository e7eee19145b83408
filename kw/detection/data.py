"""COCO data sets with mmdetection's transforms, whose random choices depend only on the image.

A sample is the result of mmdetection's ``PackDetInputs``, ``{"inputs": uint8 [3, H, W],
"data_samples": DetDataSample}``; a batch has lists of both.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmcv.transforms import BaseTransform, LoadImageFromFile
from mmengine.dataset import pseudo_collate

from ..config import ConfigError
from ..config.run_schema import BadImagesConfig
from ..data import (
    BadImageError,
    DataError,
    EvalBatchSampler,
    Loader,
    TolerantDataset,
    TrainBatchSampler,
    build_loader,
    derive_seed,
    read_image,
    seeded,
)
from ..errors import UserError, one_line, say
from .annotations import ids_of, load_annotations
from .config import DetectorConfig
from .mmdet import CocoDataset, FixScaleResize, RandomShift, Rotate, register_all_modules
from .schema import CocoDataConfig
from .usage import Usage

_TRIES = 20


class Samples(TolerantDataset):
    """An mmdetection data set by keys ``(epoch, index)``.

    Args:
        dataset: the data set. :func:`kw.data.read_image` replaces its reading of files, because
            OpenCV returns half a JPEG for half a file. The pixels of good files are the same.
        seed: together with the key it decides every random choice of the transforms, whatever the
            number of loader processes.
        bad_images: what to do with images that cannot be read; evaluation leaves them out and
            counts all their objects as missed.
        upright: turn images as their EXIF data say.
        masks: whether training needs masks.

    Raises:
        ConfigError: a transform mixes several images, or does not move masks as it moves images.
    """

    def __init__(
        self,
        dataset: Any,
        seed: int,
        bad_images: BadImagesConfig | None = None,
        upright: bool = True,
        masks: bool = False,
    ) -> None:
        bad_images = bad_images or BadImagesConfig(policy="raise")
        super().__init__(seed, not dataset.test_mode, bad_images)
        self.dataset = dataset
        steps = dataset.pipeline.transforms
        self._pipeline = "train_pipeline" if self.training else "test_pipeline"
        self._masks = masks
        steps[:] = with_our_reading(steps, bad_images.max_pixels, upright, self._pipeline)
        parts = list(_parts(steps))
        self._with_generators = [part for part in parts if hasattr(part, "set_random_seed")]
        if masks:
            _refuse_misplaced_masks(parts, self._pipeline)

    def __len__(self) -> int:
        return len(self.dataset)

    def path(self, index: int) -> str:
        """The file of an image."""
        return self.dataset.get_data_info(index)["img_path"]

    def read(self, index: int, key: tuple[int, ...]) -> Any:
        """A transformed sample.

        Raises:
            BadImageError, ConfigError: it cannot be read; the transforms make no sample.
            DataError: they fail, or keep dropping it and other images.
        """
        with seeded("detection", self.seed, *key):
            for part in self._with_generators:
                part.set_random_seed(derive_seed("detection", self.seed, *key))
            # A random crop may miss every object: try another crop of the same image, then, as
            # mmdetection does, other images.
            others = [*self._candidates(key)][1:] if self.training else []
            for each in (index, *others):
                for _ in range(_TRIES if self.training else 1):
                    sample = self._prepared(each)
                    if sample is not None:
                        check_sample(sample, self._pipeline, self.training, self._masks)
                        return sample
        drops = f"left no object in {_TRIES} tries, nor in those of other images"
        drops = drops if self.training else "left out the image in its only try"
        raise DataError(
            f"{self.path(index)}: {self._pipeline} {drops}: loosen what filters "
            "(FilterAnnotations, random crops), or remove the image"
        )

    def _prepared(self, index: int) -> Any:
        try:
            return self.dataset.prepare_data(index)
        except (UserError, MemoryError):
            raise
        except Exception as error:  # of transforms of mmdetection or the user
            what = f"{self._pipeline} fails on it: {one_line(error)}"
            if not self.training:  # evaluation goes on without the image
                raise BadImageError.of(self.path(index), what) from error
            raise DataError(f"{self.path(index)}: {what}") from error


def _parts(step: Any) -> Iterator[Any]:
    """Transforms, those inside of them, and Albumentations, which draws from generators of its
    own."""
    if isinstance(step, BaseTransform) or hasattr(step, "set_random_seed"):
        yield step
    inside = vars(step).values() if isinstance(step, BaseTransform) else step
    if isinstance(step, (list, tuple, BaseTransform)):
        for part in inside:
            yield from _parts(part)


def _refuse_misplaced_masks(parts: Sequence[Any], pipeline: str) -> None:
    """Refuse what moves images and boxes, and masks otherwise or not at all."""
    polygons = any(not getattr(part, "poly2mask", True) for part in parts)
    for part in parts:
        if isinstance(part, RandomShift):
            raise ConfigError(f"{pipeline}: RandomShift moves boxes, but not masks: leave it out")
        if isinstance(part, FixScaleResize) and part.keep_ratio:
            raise ConfigError(
                f"{pipeline}: FixScaleResize rounds the sizes of images down, but not those of "
                "masks, which are a row or column larger: use Resize"
            )
        if isinstance(part, Rotate) and polygons:
            # https://github.com/open-mmlab/mmdetection/issues/11758
            raise ConfigError(
                f"{pipeline}: Rotate turns polygons about a corner, but images about their centre: "
                "load masks by LoadAnnotations with poly2mask=True"
            )


def with_our_reading(
    steps: Sequence[Any], max_pixels: int, upright: bool, pipeline: str
) -> list[Any]:
    """The transforms of a pipeline, with :class:`LoadImage` in place of mmcv's plain reading.

    Raises:
        ConfigError: a transform mixes several images, or a transform with its own reading of files
            would turn images that are to be left as stored.
    """
    for step in steps:
        if isinstance(step, LoadImageFromFile) and not (upright or _is_plain(step)):
            raise ConfigError(
                f"{pipeline}: data.exif_orientation=ignore has no effect on {type(step).__name__} "
                "with settings of its own; leave them out"
            )
        if hasattr(step, "get_indexes"):
            raise ConfigError(
                f"{pipeline}: {type(step).__name__} mixes several images; the transforms here get "
                "one at a time: leave it out"
            )
    return [
        LoadImage(step, max_pixels, upright)
        if type(step) is LoadImageFromFile and _is_plain(step)
        else step
        for step in steps
    ]


def check_sample(sample: Any, pipeline: str, training: bool = False, masks: bool = False) -> None:
    """Refuse a sample that a detector cannot use; the message names the transform to add."""
    packed = sample.get("data_samples") if isinstance(sample, dict) else None
    if packed is None or "inputs" not in sample:
        raise ConfigError(f"{pipeline}: expected to load an image and to end with PackDetInputs")
    if training:
        needed = ["bboxes", "labels", *(["masks"] if masks else [])]
        missing = [key for key in needed if key not in packed.gt_instances]
        remedy = f"LoadAnnotations with with_bbox{' and with_mask' if masks else ''}"
    else:
        needed = ["img_id", "ori_shape", "img_shape"]
        missing = [key for key in needed if key not in packed.metainfo]
        remedy = "PackDetInputs with them in meta_keys"
    if missing:
        raise ConfigError(f"{pipeline} gives no {', '.join(missing)}: it needs {remedy}")


def _is_plain(step: LoadImageFromFile) -> bool:
    """Whether it reads colour images with OpenCV from local files."""
    how = (step.imdecode_backend, step.color_type)
    return how == ("cv2", "color") and not (step.backend_args or step.file_client_args)


class LoadImage(BaseTransform):
    """mmcv's ``LoadImageFromFile`` with its ``settings``, but refuses damaged files and those of
    more than ``max_pixels``."""

    def __init__(self, settings: LoadImageFromFile, max_pixels: int, upright: bool = True) -> None:
        self.settings = settings
        self.max_pixels = max_pixels
        self.upright = upright

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Read ``img_path``, whose size must be that of the annotation file."""
        path = results["img_path"]
        image = read_image(path, self.max_pixels, self.upright)
        said = results.get("width"), results.get("height")
        if None not in said and said != image.size:
            raise DataError(
                f"{path}: read as {image.width} x {image.height} pixels, the annotation file says "
                f"{said[0]} x {said[1]}: its objects would lie elsewhere; kw inspect annotations "
                "lists such images and what helps (data.exif_orientation, the file's sizes)"
            )
        pixels = np.ascontiguousarray(np.asarray(image)[:, :, ::-1])  # BGR, as OpenCV's
        results["img"] = pixels.astype(np.float32) if self.settings.to_float32 else pixels
        results["img_shape"] = results["ori_shape"] = pixels.shape[:2]
        return results


def build_train_loader(
    config: DetectorConfig,
    classes: Sequence[str],
    rank: int,
    world_size: int,
    masks: bool = False,
) -> Loader:
    """The training images of one process; epochs as in :class:`kw.data.TrainBatchSampler`.

    A message counts the objects that are left out, by reason and category.

    Raises:
        ConfigError: the batch does not fit the processes or the images, or a transform of
            ``train_pipeline`` does not exist.
        DataError: there is no image or no object to train on.
    """
    run, data = config.run, config.run.data
    file = Path(data.root, data.train_annotations)
    usage = _listed(file, classes, data)
    if not usage.used:
        raise DataError(f"{file}: nothing to train on: {usage}; kw inspect annotations lists them")
    filters = {"filter_empty_gt": not data.keep_empty, "min_size": data.min_size}
    dataset = _build(config, True, classes, filter_cfg=filters)
    if usage.reasons:
        say(f"{file}: {usage}")
    infos = map(dataset.get_data_info, range(len(dataset)))
    groups = [int(info["width"] > info["height"]) for info in infos]
    sampler = TrainBatchSampler(
        len(dataset),
        run.batch_size,
        run.total_batch_size,
        rank,
        world_size,
        run.seed,
        groups if data.group_by_aspect else None,
    )
    samples = Samples(dataset, run.seed, data.bad_images, data.exif_orientation == "apply", masks)
    return build_loader(samples, sampler, data.workers, pseudo_collate)


def build_eval_loader(
    config: DetectorConfig, classes: Sequence[str], rank: int, world_size: int
) -> Loader:
    """The test images of one process; each image belongs to one process. Arguments as above.

    Raises:
        ConfigError: a transform of ``test_pipeline`` does not exist, or the samples lack something.
        DataError: the annotation file cannot be read.
    """
    run, data = config.run, config.run.data
    dataset = _build(config, False, classes)
    batch_size = run.eval_batch_size or run.batch_size
    sampler = EvalBatchSampler(len(dataset), batch_size, rank, world_size)
    samples = Samples(dataset, run.seed, data.bad_images, data.exif_orientation == "apply")
    _try_one(samples)
    return build_loader(samples, sampler, data.workers, pseudo_collate)


def _try_one(samples: Samples) -> None:
    """Read a test image: what the transforms lack is said now, not after an epoch."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)  # threads that start here would be missing in forked loader processes
    try:
        for index in range(min(len(samples), _TRIES)):
            with contextlib.suppress(BadImageError):
                samples.read(index, (0, index))
                break
    finally:
        cv2.setNumThreads(threads)


def _listed(file: Path, classes: Sequence[str], data: CocoDataConfig) -> Usage:
    content = load_annotations(file)
    names = dict(zip(ids_of(classes, content, str(file)), classes, strict=True))
    try:
        sizes = {each["id"]: (each["width"], each["height"]) for each in content["images"]}
        return Usage.of(content["annotations"], names, sizes, min_size=data.min_size)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{file} cannot be read: {one_line(error)}; kw inspect annotations lists what is wrong"
        ) from error


def _build(config: DetectorConfig, training: bool, classes: Sequence[str], **settings: Any) -> Any:
    register_all_modules(init_default_scope=True)
    data, key = config.run.data, "train_pipeline" if training else "test_pipeline"
    try:
        # pycocotools prints its progress.
        with contextlib.redirect_stdout(io.StringIO()):
            return CocoDataset(
                data_root=data.root,
                ann_file=data.train_annotations if training else data.val_annotations,
                data_prefix={"img": data.train_images if training else data.val_images},
                metainfo={"classes": tuple(classes)},
                pipeline=list(getattr(config, key)),
                test_mode=not training,
                **settings,
            )
    except (UserError, MemoryError):
        raise
    except Exception as error:  # mmdetection raises any kind for wrong settings
        raise ConfigError(f"{key}: mmdetection cannot build it: {one_line(error)}") from error
