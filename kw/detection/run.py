"""Training and testing a detector: the trainer, with COCO's figures as its metrics."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import DataError, Loader
from ..errors import memory_for, say
from ..hub import sha256
from ..models.recompute import synchronised
from ..training import load_checkpoint, set_contraction
from ..training.distributed import Process, from_all, from_first, host_barrier, process_group
from ..training.folder import find_checkpoint
from ..training.logs import open_log
from ..training.objective import check_same
from ..training.optim import build_optimizer
from ..training.parallel import distribute
from ..training.precision import autocast
from ..training.presence import set_place
from ..training.run import build_hooks, check_devices, evaluate_weights, start
from ..training.task import Task
from ..training.trainer import Trainer, set_seed
from .annotations import Report, load_annotations
from .config import DetectorConfig, detection_limits, without_weights
from .data import build_eval_loader, build_train_loader
from .detector import (
    EpochInfo,
    WithLosses,
    build_detector,
    has_masks,
    keep_maps_exact,
    lr_scales,
)
from .evaluation import COCO_DETECTIONS, CocoEvaluator
from .schema import CocoDataConfig
from .sets import check_sets, check_test_annotations, class_names, trained_classes
from .start import start_detector


def train(
    config: DetectorConfig,
    work_dir: str | Path,
    *,
    resume: bool | str | Path = False,
    launcher: str = "none",
) -> dict[str, float | None]:
    """Train and evaluate a detector; arguments and errors as for :func:`kw.training.train`.

    Returns:
        COCO's twelve figures of the last evaluation, ``bbox_mAP`` and so on, in [0, 1], and
        ``segm_mAP`` and so on for a detector of masks; with the prefix ``ema_`` those of the
        moving average.

    Raises:
        DataError: the data have errors; the message has all that were found.
    """
    folder = Path(work_dir).expanduser()
    return start(config.run, folder, launcher, lambda p: build_trainer(config, folder, p, resume))


def build_trainer(
    config: DetectorConfig, work_dir: Path, process: Process, resume: bool | str | Path = False
) -> Trainer:
    """A training run, ready for ``trainer.run()``; arguments as for :func:`train`."""
    run = config.run
    check_devices(run, process)
    open_log(work_dir, process)
    resume_from = find_checkpoint(resume, work_dir, process)
    held = _held(run.data, run.data.train_annotations, run.data.val_annotations)
    classes = class_names(run.data)
    set_seed(run.seed)
    if resume_from is not None:  # it has all weights
        detector = build_detector(without_weights(config.model), classes)
    elif run.load_from is not None:
        detector = start_detector(config.model, classes, run.load_from)
    else:
        detector = build_detector(config.model, classes)
    if run.precision != "fp32":
        keep_maps_exact(detector)
    masks = has_masks(detector)
    if run.data.check:
        _check_data(lambda: check_sets(run.data, masks), process)
    set_contraction(run.contraction, detector)
    if run.sync_bn and process.world_size > 1:
        detector = synchronised(detector)
    detector.to(process.device)
    average = distribute(detector, run, process)
    place = process.rank, process.world_size
    train_loader = build_train_loader(config, classes, *place, masks)
    val_loader = build_eval_loader(config, classes, *place)
    evaluator = _evaluator(config, classes, masks)
    del held
    task = Task(
        WithLosses(detector),
        detector,
        lambda network: evaluate_detector(network, val_loader, evaluator, run.precision),
        "bbox_mAP",
        classes,
        "config.py",
        config.to_python(),
    )
    scales = lr_scales(detector, run.optimizer.layer_decay)
    optimizer = build_optimizer(detector, run.optimizer, process.device, scales)
    hooks = [*build_hooks(run), EpochInfo()]
    return Trainer(
        task,
        run,
        process,
        work_dir,
        train_loader,
        val_loader,
        optimizer,
        average,
        hooks,
        resume_from,
    )


@torch.no_grad()
def evaluate_detector(
    detector: nn.Module, loader: Loader, evaluator: CocoEvaluator, precision: str
) -> dict[str, float | None]:
    """COCO's figures on a data set that is divided among the processes; a collective call.

    An unreadable image, which the loader leaves out, has no detections. ``precision`` is the
    autocast type of the forward pass, ``"fp32"``, ``"bf16"`` or ``"fp16"``.
    """
    training = detector.training
    detector.eval()
    device = next(detector.parameters()).device
    model: Any = detector
    seen = strange = 0
    for batch in loader:
        with memory_for(lambda: map(_name, batch["data_samples"])):  # noqa: B023 -- called inside
            with autocast(precision, device.type):
                samples = model.val_step(batch)
            for sample in samples:
                found = sample.pred_instances
                masks = found.masks if "masks" in found else None
                boxes, scores = found.bboxes.float(), found.scores.float()
                endless = ~(boxes.isfinite().all(1) & scores.isfinite())
                strange += int(endless.sum())
                # They overlap nothing. Heads that have learnt little may give some.
                boxes, scores = boxes.masked_fill(endless[:, None], 0), scores.nan_to_num(0, 0, 0)
                evaluator.add(sample.img_id, boxes, scores, found.labels, masks)
                seen += 1
    detector.train(training)
    host_barrier("at the end of an evaluation, computing its figures")
    figures = evaluator.compute()
    if strange := sum(from_all(strange)):
        say(f"{strange:,} detections with a box or a score that is not finite count as wrong")
    sampler: Any = loader.batch_sampler
    if left_out := sum(from_all(len(sampler.indices) - seen)):
        figures["unreadable_images"] = float(left_out)
    return figures


def _name(sample: Any) -> str:
    return str(sample.get("img_path", f"image {sample.img_id}"))


def evaluate_checkpoint(
    config: DetectorConfig, checkpoint: str | Path, *, launcher: str = "none"
) -> dict[str, Any]:
    """Evaluate a checkpoint of a detector; arguments and errors as for :func:`train`.

    Returns:
        The headline figures (see :func:`kw.training.task.headline`), ``epoch`` and ``checkpoint``.
    """
    run = config.run
    state = load_checkpoint(checkpoint)
    with process_group(launcher, run.distributed.timeout_minutes) as process:
        check_devices(run, process)
        held = _held(run.data, run.data.val_annotations)
        classes = trained_classes(state, run.data, f"checkpoint {checkpoint}")
        detector = build_detector(without_weights(config.model), classes)
        if run.precision != "fp32":
            keep_maps_exact(detector)
        set_contraction(run.contraction, detector)
        detector.to(process.device)
        masks = has_masks(detector)
        if run.data.check:
            look = partial(check_test_annotations, run.data, masks, classes)
            _check_data(lambda: [look()], process)
        loader = build_eval_loader(config, classes, process.rank, process.world_size)
        evaluator = _evaluator(config, classes, masks)
        del held
        return evaluate_weights(
            detector,
            state,
            checkpoint,
            loader,
            lambda: evaluate_detector(detector, loader, evaluator, run.precision),
        )


def _held(data: CocoDataConfig, *files: str) -> list[dict[str, Any]]:
    """The content of annotation files, the same on all processes; held, it is read once for all."""
    held = {file: load_annotations(Path(data.root, file)) for file in files}
    digests = {file: sha256(Path(data.root, file)).encode() for file in held}
    check_same({file: (len(held[file]["images"]), digests[file]) for file in held})
    return [*held.values()]


def _evaluator(config: DetectorConfig, classes: list[str], masks: bool) -> CocoEvaluator:
    """The evaluator of the test images, or a DataError if they have no object."""
    data = config.run.data
    file = Path(data.root, data.val_annotations)
    most = data.max_detections or COCO_DETECTIONS
    evaluator = CocoEvaluator(file, classes, masks, most)
    if not (in_image := evaluator.objects):
        raise DataError(
            f"{file}: no object to evaluate against (of {', '.join(classes[:5])}; crowds do not "
            "count); kw predict takes images that are not annotated"
        )
    most = min([most, *detection_limits(config.model)])
    if beyond := {i: n for i, n in in_image.items() if n > most}:
        worst = max(beyond, key=beyond.__getitem__)
        say(
            f"{file}: {len(beyond):,} images have more than {most} objects (image {worst}: "
            f"{beyond[worst]:,}), of which {most} can be found at most; data.max_detections sets "
            "the limit"
        )
    return evaluator


def _check_data(check: Callable[[], list[Report]], process: Process) -> None:
    """Check the data on one process; errors are raised on all, warnings are printed."""
    set_place("checking the data")
    wrong = ""
    if process.is_main:
        try:
            reports = check()
            wrong = "\n".join(report.render() for report in reports if report.errors)
            for report in reports:
                if not report.errors and report.warnings:
                    told = [f"{each.count:,} {each.text}" for each in report.warnings]
                    say(f"{report.annotations_file} (kw inspect annotations): {'; '.join(told)}")
        except DataError as error:
            wrong = str(error)
    if wrong := from_first(wrong):
        raise DataError(wrong)
