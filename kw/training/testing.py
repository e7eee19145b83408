"""Checkpoints of classifiers on validation images and ImageNet's other sets, at sizes and views."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..config.schema import Config
from ..data import Listing, list_splits, open_validation, test_images
from ..evaluation.outcomes import Outcomes, calibration
from ..evaluation.sets import SETS, TestSet, open_set, wnids
from ..evaluation.views import TTA, Views
from ..models import build_network
from .checkpoint import CheckpointError, load_checkpoint, named_classes, refuse_other_classes
from .distributed import Process, process_group
from .objective import check_labels, check_same
from .run import build_preprocessor, check_devices, evaluate, evaluate_weights, prepare


@dataclass(frozen=True)
class Testing:
    """What checkpoints are evaluated on, and how.

    Attributes:
        name: ``"val"`` for ``data.root``'s validation images, or a key of
            ``kw.evaluation.sets.SETS``.
        root: folder of such a set, see ``kw.evaluation.sets.open_set``.
        sizes: of the network's input, one evaluation for each; empty for ``data.input_size``.
        crop_ratio: in place of ``data.test_crop_ratio``; without it the set's own, where it has
            one (1 for ``"c"``).
        tta: a key of ``kw.evaluation.views.TTA``.
        figures: folder for ``kw.training.figures.write_figures``.
    """

    __test__ = False  # no class of tests

    name: str = "val"
    root: Path | None = None
    sizes: Sequence[int] = ()
    crop_ratio: float | None = None
    tta: str | None = None
    figures: Path | None = None


_PLAIN = Testing()


def evaluate_checkpoint(
    config: Config, checkpoint: str | Path, *, launcher: str = "none", testing: Testing = _PLAIN
) -> dict[str, Any]:
    """Evaluate a checkpoint, exactly, on any number of processes.

    Args:
        config: model and data.
        checkpoint: a file that :func:`kw.training.train` wrote.
        launcher: as for :func:`kw.training.train`.
        testing: of what; by default of ``data.root``/val.

    Returns:
        The headline figures (see :func:`kw.training.task.headline`), ``ece`` in percent among them
        (``kw.evaluation.outcomes.calibration``); ``set``, ``input_size`` and
        ``crop_ratio``, which they are of; ``epoch`` and ``checkpoint``.

    Raises:
        ConfigError: a setting does not fit the devices or the network.
        DataError: the data folder is not as expected.
        CheckpointError: the checkpoint cannot be read, is of another model, or was trained on other
            classes than those of the data.
        MissingProcess: another process died, hangs or never came.
    """
    (found,) = evaluate_checkpoints([(config, checkpoint)], testing, launcher=launcher)
    return found


def evaluate_checkpoints(
    runs: Sequence[tuple[Config, str | Path]],
    testing: Testing = _PLAIN,
    *,
    launcher: str = "none",
) -> list[dict[str, Any]]:
    """Evaluate several, of one run or of different ones; see :func:`evaluate_checkpoint`.

    Returns:
        The figures of each at each size, in that order.
    """
    if testing.figures is not None:
        from ..pictures.style import check_matplotlib

        check_matplotlib()
        if len(runs) * max(len(testing.sizes), 1) > 1:
            raise ConfigError("--figures: of one checkpoint at one size; call it for each")
    found = []
    with process_group(launcher, runs[0][0].distributed.timeout_minutes) as process:
        for config, checkpoint in runs:
            check_devices(config, process)
            state = load_checkpoint(checkpoint)
            test_set = _open(config, state, checkpoint, testing)
            check_same({test_set.name: test_set.listing.identity})
            sizes: list[int | list[int]] = [*testing.sizes] or [config.data.input_size]
            for size in sizes:
                found.append(_evaluate(config, state, checkpoint, test_set, testing, size, process))
    return found


def _open(config: Config, state: Any, checkpoint: str | Path, testing: Testing) -> TestSet:
    """The images, and what counts as right."""
    if config.several_classes and (
        testing.name != "val" or testing.tta is not None or testing.figures is not None
    ):
        raise ConfigError(
            f"checkpoint {checkpoint}: is of images with several classes each (metrics.multilabel):"
            " no --set, --tta or --figures"
        )

    def val() -> Listing:
        listing = list_splits(config.data, config.model.num_classes, ["val"])["val"]
        refuse_other_classes(state, listing.classes, f"checkpoint {checkpoint}", config.data.root)
        check_labels(config, listing)
        return listing

    if testing.name == "val":
        return TestSet("val", "validation images", val())
    count = config.model.num_classes
    classes = named_classes(state, count, str(checkpoint))
    if classes is None and count == len(wnids()):
        classes = list(wnids())  # as converted checkpoints have them
    if classes is None:
        raise CheckpointError(
            f"checkpoint {checkpoint}: names no classes (meta.classes), and has {count}, not "
            f"ImageNet's {len(wnids())}: --set {testing.name} cannot tell which are the set's"
        )
    return open_set(testing.name, testing.root, classes, val)


def _evaluate(
    config: Config,
    state: Any,
    checkpoint: str | Path,
    test_set: TestSet,
    testing: Testing,
    size: int | list[int],
    process: Process,
) -> dict[str, Any]:
    own = SETS[test_set.name].crop_ratio if test_set.name in SETS else None
    ratio = testing.crop_ratio or own or config.data.test_crop_ratio
    config = replace(config, data=replace(config.data, input_size=size, test_crop_ratio=ratio))
    network = build_network(config.model)
    prepare(network, config, process)
    data = config.data
    if test_set.name != "val":  # read once: nothing is gained by holding them
        root = str(testing.root) if testing.root and test_set.name != "real" else data.root
        data = replace(data, root=root, memory=None)
    if testing.tta is not None and TTA[testing.tta][0]:
        if not isinstance(size, int):
            raise ConfigError(
                f"--tta {testing.tta}: takes crops of a square, and data.input_size is {size}; "
                "--tta flip takes any, --sizes gives a square"
            )
        side = math.floor(size / ratio)  # of the square that crops are taken from
        if side == size:
            raise ConfigError(
                f"--tta {testing.tta}: images are resized to {size} and cropped to {size}: all "
                "crops are the same; give a smaller --crop-ratio, such as 0.875"
            )
        data = replace(data, input_size=side, test_crop_ratio=1.0)
    shown = replace(config, data=data)
    where = (process.device, process.rank, process.world_size)
    loader = open_validation(shown, *where, test_set.listing)
    preprocess = build_preprocessor(shown, process.device).to(process.device)
    view = Views(network, testing.tta, size if isinstance(size, int) else 0, test_set.subset)
    last: Outcomes | None = None

    def measure() -> dict[str, Any]:
        nonlocal last
        how = (preprocess, loader, config.precision, config.metrics)
        if config.several_classes:  # no class is the right one
            return evaluate(view, *how)
        last = Outcomes(len(loader.dataset), process.device)
        found = evaluate(view, *how, last)
        read = last.best[:, 0] >= 0
        right = test_set.hits(last.best)[:, 0]
        found["ece"] = calibration(last.confidence[read], right[read]).ece
        return test_set.refine(found, last.best)

    found = evaluate_weights(network, state, checkpoint, loader, measure)
    if testing.figures is not None and process.is_main:
        from .figures import write_figures

        assert last is not None
        of = f"{Path(checkpoint).parent.name}/{Path(checkpoint).name}, {test_set.title}"
        write_figures(testing.figures, test_set, last, test_images(shown, test_set.listing), of)
    conditions: dict[str, Any] = {"set": test_set.name}
    if test_set.complete is not None:
        conditions["complete"] = test_set.complete
    if test_set.subset is not None:
        conditions["classes"] = len(test_set.subset)
    conditions.update(input_size=size, crop_ratio=ratio)
    if testing.tta is not None:
        conditions["tta"] = testing.tta
    epoch_and_file = {key: found.pop(key) for key in ("epoch", "checkpoint")}
    return {**found, **conditions, **epoch_and_file}
