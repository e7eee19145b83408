"""Configurations of detectors: mmengine's Python files, with the settings of a run checked.

A file sets the keys of mmdetection, ``model``, ``train_pipeline`` and ``test_pipeline``, and those
of a run of this project (:class:`kw.detection.schema.DetectionConfig`). mmdetection's settings of
data loaders, optimizers and hooks, which come with its base files, are not used: a warning names
them.

A Python configuration is a program: run only files that you trust.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmengine.config import Config as MMConfig

from ..config import ConfigError
from ..config.checking import check_tree
from ..config.loading import read_option
from ..config.tree import OPTIONS, Entry, Origin, merge, rebuilt
from ..errors import did_you_mean
from .origins import entry_with_origins, packages_from_metadata, read_origins
from .schema import SCHEMA, DetectionConfig

_LIMIT = "max_per_img"
_OURS = "kw.Backbone"
_OF_MMDET = ("model", "train_pipeline", "test_pipeline")
_OF_RUN = tuple(field.name for field in dataclasses.fields(DetectionConfig))
# mmdetection's keys, and what sets the same here.
_INSTEAD = {
    "optim_wrapper": "optimizer, ema and precision",
    "param_scheduler": "schedule",
    "train_cfg": "epochs and eval_interval",
    "custom_hooks": "hooks",
    "train_dataloader": "data, batch_size and train_pipeline",
    "val_dataloader": "data, eval_batch_size and test_pipeline",
    "data_root": "data.root",
    "resume": "--resume",
    "resume_from": "--resume",
    "max_epochs": "epochs",
}


@dataclasses.dataclass(frozen=True)
class DetectorConfig:
    """A configuration that was checked as far as possible without building anything.

    Attributes:
        run: data, optimizer, schedule and the other settings of a run.
        model: the detector, for mmdetection's registry.
        train_pipeline: transforms of training images, for mmdetection's registry.
        test_pipeline: transforms of test images, for mmdetection's registry.
        source: the file.
        custom_imports: the user's modules that register names of the file (mmengine's key).
    """

    run: DetectionConfig
    model: dict[str, Any]
    train_pipeline: list[Any]
    test_pipeline: list[Any]
    source: str
    custom_imports: dict[str, Any] | None = None

    @property
    def reads_masks(self) -> bool:
        """Whether training reads masks from the annotations."""
        steps = (step for step in self.train_pipeline if isinstance(step, dict))
        return any(step.get("with_mask", False) for step in steps)

    def to_python(self, places: bool = True) -> str:
        """A Python text with all settings; reading it gives an equal configuration.

        Args:
            places: False leaves out what is of this machine: folders, files of weights to start
                from, accounts of trackers. What builds the detector stays.
        """
        content = dataclasses.asdict(self.run)
        content.update({name: getattr(self, name) for name in _OF_MMDET})
        if self.custom_imports is not None:
            content["custom_imports"] = self.custom_imports
        return str(MMConfig(content if places else _without_places(content)).pretty_text)


def without_weights(model: dict[str, Any]) -> dict[str, Any]:
    """A detector's settings without start weights of any part, for one that loads a checkpoint."""
    settings: dict[str, Any] = rebuilt(model, _without_files)
    backbone = {k: v for k, v in settings["backbone"].items() if k not in ("weights", "init_cfg")}
    if backbone.get("type") == _OURS:
        backbone["resumes"] = True
    return {**settings, "backbone": backbone}


def _without_files(value: Any) -> Any:
    """Settings without the files that mmengine initialises modules from."""
    if not isinstance(value, dict) or "checkpoint" not in str(value.get("init_cfg")):
        return value
    return {k: v for k, v in value.items() if k != "init_cfg"}


def _without_places(content: dict[str, Any]) -> dict[str, Any]:
    from ..deploy.source import name_alone
    from ..models.build import without_sources
    from .backbone import read_network

    model, root = without_weights(content["model"]), Path(content["data"]["root"])
    backbone = model["backbone"]
    if backbone.pop("resumes", False):
        network = without_sources(read_network(backbone["network"]))
        backbone["network"] = _without_none(dataclasses.asdict(network))
    data = {**content["data"], "root": root.name or "data"}
    rest = {"model": model, "data": data, "load_from": None, "loggers": {}}
    found: dict[str, Any] = rebuilt({**content, **rest}, name_alone)
    return found


def load_detector_config(
    path: str | os.PathLike[str], options: Iterable[str] = ()
) -> DetectorConfig:
    """Read and check a detector's configuration; the file is run as a program.

    Args:
        path: a Python file; its ``_base_`` files are read with it.
        options: ``a.b=value`` strings that replace settings; the value in YAML's flow style.

    Raises:
        ConfigError: a line for each problem, with file, line, key, value and what was expected.
    """
    path = os.fspath(path)
    origins = read_origins(path)
    content = _run_file(path)
    named_in = origins.get("model.backbone.network", Origin(path)).source
    _resolve_network(content, path, Path(named_in).parent)
    given = _apply_options(options, content)
    problems = [problem for name in content if (problem := _foreign(name, origins))]
    problems += [
        f"{path}: {name} is missing: mmdetection's {name}"
        for name in _OF_MMDET
        if name not in content
    ]
    if problems:
        raise ConfigError(*problems)
    if "checkpoint" not in origins and isinstance(content.get("checkpoint"), str):
        del content["checkpoint"]  # of mmdetection's RTMDet, for the weights of its backbone
    unused = [name for name in content if name not in (*_OF_MMDET, *_OF_RUN, "custom_imports")]
    if unused:
        message = f"{path}: not used, from mmdetection's base files: {', '.join(unused)}"
        warnings.warn(message, stacklevel=2)
    tree = entry_with_origins(
        {name: content[name] for name in _OF_RUN if name in content}, "", origins, Origin(path)
    )
    run = check_tree(merge(tree, given), SCHEMA)
    run.data.root = os.path.expanduser(run.data.root)
    _resolve_network(content, path, None)
    model = content["model"]
    if run.data.max_detections is not None:
        _set_limit(model, run.data.max_detections)
    pipelines = content["train_pipeline"], content["test_pipeline"]
    return DetectorConfig(run, model, *pipelines, path, content.get("custom_imports"))


def _run_file(path: str) -> dict[str, Any]:
    try:
        with packages_from_metadata():
            config = MMConfig.fromfile(path, lazy_import=False)
        content = config.to_dict()
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # the program may raise anything
        raise ConfigError(f"{path}: cannot be run: {type(error).__name__}: {error}") from error
    return {k: v for k, v in content.items() if not k.startswith("_") and k != "filename"}


def _foreign(name: str, origins: dict[str, Origin]) -> str | None:
    """The problem of a key that is not used; keys of mmdetection's files are only warned of."""
    known = (*_OF_MMDET, *_OF_RUN, "custom_imports")
    if name in known:
        return None
    origin = origins.get(name)
    instead = _INSTEAD.get(name)
    if instead is None and origin is not None:
        return (
            f"{origin}: {name}: expected a known key{did_you_mean(name, known)} "
            "(a variable of the file's own starts "
            f"with an underscore; valid here: {', '.join(known)})"
        )
    if origin is not None:
        return f"{origin}: {name} is mmdetection's and has no effect here: set {instead}"
    return None


def _apply_options(options: Iterable[str], content: dict[str, Any]) -> Entry:
    """Set the ``--cfg-options`` of mmdetection's parts, and return those of the run as a tree."""
    given = Entry({}, Origin(OPTIONS))
    problems: list[str] = []
    for option in options:
        key = option.partition("=")[0].strip()
        try:
            entry = read_option(option)
        except ConfigError as error:
            problems.extend(error.problems)
            continue
        if key.split(".")[0] in _OF_RUN:
            given = merge(given, entry)
        elif key.split(".")[0] in _OF_MMDET:
            if (problem := _set(content, key, entry.find(key)[0].plain())) is not None:
                problems.append(f"{OPTIONS}: {key}: {problem}")
        else:
            names = (*_OF_RUN, *_OF_MMDET)
            hint = did_you_mean(key.split(".")[0], names)
            problems.append(f"{OPTIONS}: {key}: expected a known key{hint}")
    if problems:
        raise ConfigError(*problems)
    return given


def _set(content: dict[str, Any], key: str, value: Any) -> str | None:
    """Set a key of mmdetection's parts; a list that replaces a tuple becomes a tuple. The reason
    why it cannot be set: a step to it does not exist."""
    target: Any = content
    *steps, last = key.split(".")
    for i, name in enumerate(steps):
        step = _step(target, name)
        if step is None:
            return f"there is no {'.'.join(steps[: i + 1])}"
        target = target[step]
    place: Any = last if isinstance(target, dict) else _step(target, last)
    if isinstance(target, (list, tuple)) and place is None:
        return f"there is no {key}"
    if not isinstance(target, (dict, list)):
        return f"{'.'.join(steps)} has no members"
    old = target.get(last) if isinstance(target, dict) else target[place]
    as_tuple = isinstance(old, tuple) and isinstance(value, list)
    target[place] = rebuilt(tuple(value) if as_tuple else value, _with_sizes)
    return None


def _step(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        return name if name in value else None
    if isinstance(value, list) and name.isdigit() and int(name) < len(value):
        return int(name)
    return None


def detection_limits(model: dict[str, Any]) -> list[int]:
    """The limits in a detector's settings on its detections of an image."""
    limits = [part.get(_LIMIT) for part in _test_settings(model)] + [model.get("num_queries")]
    return [limit for limit in limits if isinstance(limit, int) and limit > 0]  # -1: no limit


def _set_limit(model: dict[str, Any], limit: int) -> None:
    """Set the number of detections of an image that a detector gives."""
    parts = [part for part in _test_settings(model) if _LIMIT in part]
    if not parts:
        raise ConfigError(f"data.max_detections: model.test_cfg has no {_LIMIT} to set")
    queries = model.get("num_queries")
    if isinstance(queries, int) and queries < limit:
        raise ConfigError(
            f"data.max_detections = {limit}: model.num_queries is {queries}, and a detector finds "
            "no more objects than it has queries; set model.num_queries as well"
        )
    for part in parts:
        part[_LIMIT] = limit


def _test_settings(model: dict[str, Any]) -> list[dict[str, Any]]:
    """The test settings of a detector of one stage, and of the last stage of two."""
    settings = model.get("test_cfg")
    parts = [settings, settings.get("rcnn")] if isinstance(settings, dict) else []
    return [part for part in parts if isinstance(part, dict)]


def _with_sizes(value: Any) -> Any:
    """Image sizes as tuples, which mmdetection expects and YAML does not have."""
    found = dict(value) if isinstance(value, dict) else {}
    for name in {"scale", "crop_size", "size"} & found.keys():
        if isinstance(found[name], list):
            found[name] = tuple(found[name])
    if isinstance(found.get("scales"), list):
        found["scales"] = [tuple(s) if isinstance(s, list) else s for s in found["scales"]]
    return found or value


def _resolve_network(content: dict[str, Any], path: str, folder: Path | None) -> None:
    """Replace the file name of the backbone's classifier, relative to ``folder``, by its settings,
    in place: the configuration that a run saves then needs no other file."""
    model = content.get("model")
    backbone = model.get("backbone") if isinstance(model, dict) else None
    if not isinstance(backbone, dict) or backbone.get("type") != _OURS:
        return
    if "network" not in backbone:
        raise ConfigError(f"{path}: model.backbone.network is missing: a classification YAML file")
    from .backbone import read_network

    config = read_network(backbone["network"], folder)
    settings = _without_none(dataclasses.asdict(config))
    for name, nothing in (("weights", "None"), ("freeze", "[]")):
        found = settings.pop(name, None)
        if found and name not in backbone and content.get("load_from") is None:
            raise ConfigError(
                f"{path}: model.backbone.network has {name} = {found!r}, which is for training the "
                f"classifier: set model.backbone.{name} to what the detector wants, or {nothing}"
            )
    backbone["network"] = settings


def _without_none(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_none(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if value is not None
    }
