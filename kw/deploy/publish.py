"""A run as a repository of the Hugging Face Hub: its files, and their publication.

``model.safetensors`` with our description in its header; ``config.json`` as timm writes it, and
what is ours under ``kernelwarehouse``; the card; ``config.yaml`` or, of a detector, ``config.py``;
``results.json``. Checkpoints stay where they are: they hold pickles, and twice the weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import timm

from ..config import to_yaml
from ..config.schema import ModelConfig
from ..hub import (
    CARD,
    CONFIG,
    DATA,
    PREFIX,
    PROGRAM,
    RESULTS,
    SETTINGS,
    WEIGHTS,
    HubError,
    hub_errors,
    sha256,
    split_name,
)
from ..models.build import without_sources
from ..models.paper_models import PAPER_MODELS
from ..models.weights import CheckpointError
from ..training.trained import detector_config, trained_file
from ..version import __version__
from .card import card
from .classifier import Classifier, load
from .description import Description
from .export import Options, export
from .source import Source, read_source, without_places
from .verify import TOLERANCE, compare, random_images

_PRIVATE = ("weights", "freeze", "gradient_checkpointing", "drop_rate", "drop_path_rate")
_USE = """\
```python
import kw  # kernelwarehouse

classifier = kw.load("{name}")
classifier.predict(["image.jpg"], k=5)
```

    kw predict {name} image.jpg

{timm}:

```python
import timm{kw}

network = timm.create_model("{name}", pretrained=True)
```

`config.yaml` has the settings of the training run."""


@dataclass(frozen=True)
class Plan:
    """How a run is published.

    Attributes:
        name: ``user/model[@branch]``.
        weights: of the checkpoint: ``"auto"``, ``"ema"`` or ``"model"``.
        precision: of the file: ``"fp32"``, ``"fp16"`` or ``"bf16"``; it is read as float32.
        licence: of the weights, by the hub's name (``"apache-2.0"``); None leaves it out.
    """

    name: str
    weights: str = "auto"
    precision: str = "fp32"
    licence: str | None = None


def write_folder(run: str | Path, folder: Path, plan: Plan) -> list[str]:
    """Write the repository of a run, a work directory or a checkpoint in it, into a folder that is
    new, empty or was written here before; returns what the user should know, a sentence each.

    Raises:
        HubError: the folder has other files, or is the run's own.
        UserError: the run cannot be read, or the written file computes something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    there = {path.name for path in folder.iterdir()}
    if there and (not {CONFIG, WEIGHTS} <= there or there - {*DATA, PROGRAM}):
        other = min(there - {*DATA, PROGRAM} or there)
        raise HubError(f"{folder}: has other files ({other}): expected a new or empty folder")
    checkpoint = trained_file(run)
    if checkpoint.parent.exists() and folder.samefile(checkpoint.parent):
        raise HubError(f"{folder}: has the run itself: expected another folder")
    for name in there:
        (folder / name).unlink()
    about_results = _results(checkpoint, folder, plan.weights)
    if detector_config(run) is None:
        content, text, notes = _classifier(run, folder, plan)
    else:
        from ..detection.publish import write_detector

        content, text, notes = write_detector(run, folder, plan, (folder / RESULTS).is_file())
    own = {"version": __version__, "precision": plan.precision, "sha256": sha256(folder / WEIGHTS)}
    content["kernelwarehouse"] |= own
    (folder / CONFIG).write_text(json.dumps(content, indent=2, ensure_ascii=False), "utf-8")
    (folder / CARD).write_text(f"---\n{_front(content, plan)}\n---\n\n{text}", "utf-8")
    notes += about_results
    if plan.licence is None:
        notes.append("the card states no licence: --license NAME does")
    return notes


def publish(folder: Path, plan: Plan, private: bool = False, message: str | None = None) -> str:
    """Upload a folder of :func:`write_folder` as one commit, to the plan's name; a branch is made
    if it is not there. Files of the same names are replaced, nothing is deleted.

    Returns:
        Where it is, and what was replaced; a sentence each line.

    Raises:
        HubError: the hub refuses or cannot be reached, or the repository is public and
            ``private`` was asked for.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    repository, branch = split_name(plan.name)
    api = HfApi(library_name="kernelwarehouse", library_version=__version__)
    with hub_errors(plan.name):
        try:
            if private and not api.model_info(repository).private:
                raise HubError(
                    f"{repository} is there and public: --private is for new repositories; make it "
                    "private in its settings first, or leave --private out"
                )
        except RepositoryNotFoundError:
            pass
        # Not False, which would make public what the owner's settings keep private.
        api.create_repo(repository, private=private or None, exist_ok=True)
        if branch is not None:
            api.create_branch(repository, branch=branch, exist_ok=True)
        try:
            before = api.model_info(repository, revision=branch)
            there = {file.rfilename for file in before.siblings or ()}
        except RevisionNotFoundError:  # no commit yet
            before, there = None, set()
        done = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=branch,
            commit_message=message or f"Weights and card, kernelwarehouse {__version__}",
        )
    said = [f"published {done.commit_url}"]
    names = {path.name for path in folder.iterdir()}
    if before is not None and (replaced := sorted(names & there)):
        said.append(f"replaced {', '.join(replaced)}; as they were: {repository}@{before.sha}")
    if others := sorted(there - names - {".gitattributes"}):
        said.append(f"left as they are: {', '.join(others)}")
    return "\n".join(said)


def _classifier(run: str | Path, folder: Path, plan: Plan) -> tuple[dict[str, Any], str, list[str]]:
    """Write a classifier's weights and settings; its config.json, card, and notes."""
    source = read_source(run, weights=plan.weights)
    notes = list(source.notes)
    if modules := source.description.config.custom_imports:
        notes.append(f"import {', '.join(modules)} first, which its configuration names")
    config = replace(without_places(source.description.config), custom_imports=[])
    description = replace(source.description, config=config)
    title = split_name(plan.name)[0].rpartition("/")[2]
    source = Source(source.network, replace(description, model=title), notes)
    written = export(source, folder / WEIGHTS, Options(plan.precision), with_card=False)
    os.replace(written.path, folder / WEIGHTS)
    (folder / SETTINGS).write_text(to_yaml(description.config), "utf-8")

    config, data = description.config, description.config.data
    network: Any = source.network
    settings = getattr(network, "pretrained_cfg", None) or {}  # not of every user's network
    images = {
        "input_size": [data.channels, *data.shape],
        "fixed_input_size": bool(settings.get("fixed_input_size")),
        "interpolation": data.interpolation,
        "crop_pct": data.test_crop_ratio,
        "crop_mode": "center",
        "mean": data.mean,
        "std": data.std,
        "num_classes": config.model.num_classes,
        "first_conv": settings.get("first_conv"),
        "classifier": settings.get("classifier"),
    }
    name, arguments = _architecture(folder / WEIGHTS, description, images)
    needs_us = name == "kernelwarehouse" or name.startswith("kw_")
    content: dict[str, Any] = {
        "architecture": name,
        "num_classes": config.model.num_classes,
        "num_features": getattr(network, "num_features", None),
        "label_names": description.classes,
        "model_args": arguments,
        "pretrained_cfg": images,
        "kernelwarehouse": {
            "task": "classification",
            "several_classes": config.several_classes,
            "weights": description.weights,
            "needs_kernelwarehouse": needs_us,
        },
    }
    how = (
        "timm loads it too, once kernelwarehouse is imported" if needs_us else "timm alone loads it"
    )
    use = _USE.format(
        name=PREFIX + plan.name,
        timm=how,
        kw=", kw" if needs_us else "",
    )
    return content, card(title, WEIGHTS, source, written.input, written.random, None, use), notes


def _architecture(
    file: Path, description: Description, settings: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The name and arguments with which timm makes this network, tried: the first that loads the
    file and computes the same."""
    model = description.config.model
    classifier, images = load(file), next(random_images(description.input))
    assert isinstance(classifier, Classifier)
    for name, arguments in _candidates(model):
        try:
            made = timm.create_model(
                name,
                pretrained=True,
                pretrained_cfg={**settings, "file": str(file)},
                num_classes=model.num_classes,
                **arguments,
            )
        except (CheckpointError, RuntimeError):  # other shapes
            continue
        if compare(classifier.network, made.eval(), [images]).largest <= TOLERANCE:
            return name, arguments
    return "kernelwarehouse", {"model": _settings(model)}


def _candidates(model: ModelConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    own = without_sources(model).timm_args
    backbone = model.name.partition(".")[0]
    if model.kernel_warehouse is None and model.peer is None:
        yield backbone, own
    elif model.kernel_warehouse is not None:
        for name, released in PAPER_MODELS.items():
            if (released.backbone, released.plan) == (backbone, model.kernel_warehouse.plan):
                yield name, own


def _settings(model: ModelConfig) -> dict[str, Any]:
    """What a network's structure depends on, of the configuration's ``model``."""
    given = asdict(without_sources(model))
    return {k: v for k, v in given.items() if k not in _PRIVATE and v is not None}


def _front(content: dict[str, Any], plan: Plan) -> str:
    """The card's head, which the hub reads."""
    from huggingface_hub import ModelCardData

    own = content["kernelwarehouse"]
    tasks = {"classification": "image-classification", "detection": "object-detection"}
    data = ModelCardData(
        library_name="kernelwarehouse" if own.get("needs_kernelwarehouse", True) else "timm",
        pipeline_tag=tasks[own["task"]],
        license=plan.licence,
        tags=[
            "kernelwarehouse",
            "dynamic-convolution",
            *(["timm"] * ("pretrained_cfg" in content)),
        ],
    )
    return str(data.to_yaml())


def _results(checkpoint: Path, folder: Path, weights: str) -> list[str]:
    """Copy the run's results if they are those of the checkpoint's ``weights``; a note if not."""
    try:
        results = json.loads((checkpoint.parent / RESULTS).read_text("utf-8"))
    except (OSError, ValueError):
        return []
    of = Path(str(results.get("checkpoint"))).name if isinstance(results, dict) else ""
    if of != checkpoint.name:
        return [f"{RESULTS} of the run is of {of}, not of {checkpoint.name}: left out"]
    if weights not in ("auto", judged := results.get("weights", weights)):
        return [f"{RESULTS} of the run is of its {judged!r} weights, not {weights!r}: left out"]
    (folder / RESULTS).write_text(json.dumps({**results, "checkpoint": of}, indent=2), "utf-8")
    return []
