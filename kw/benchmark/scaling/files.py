"""Result files: ``profile-*.json``, ``step-*.json`` and ``processes-*.json`` of a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..cases import STATIC
from ..conditions import BenchmarkError
from ..machine import describe_code, describe_machine, describe_versions
from ..results import Measured, Result, read_results, spread_of
from ..steps import PARTS
from .buckets import Gradient
from .model import Step
from .processes import Measurement
from .profile import StepProfile

__all__ = [
    "Folder",
    "Processes",
    "Profile",
    "SingleStep",
    "provenance",
    "read_folder",
    "read_profile",
    "read_step",
    "to_dict",
]


@dataclass(frozen=True)
class Profile:
    """A measured step with its gradients, and of what.

    Attributes:
        model: the configuration's name.
        input_size: side of the images, pixels.
        dtype: of the step.
        threads: on CPU.
        measured: the figures.
        where: machine, versions, code and date.
    """

    model: str
    input_size: int
    dtype: str
    threads: int
    measured: StepProfile
    where: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of the file."""
        device = self.where["machine"]["device"]
        words = [self.dtype, f"b{self.measured.step.images}", f"{self.input_size}"]
        return "-".join(["profile", self.model, device, *words, f"t{self.threads}"])


@dataclass(frozen=True)
class SingleStep:
    """A step of one device without gradients' times: predicted, or another tool's measurement.

    Attributes:
        model: the configuration's name.
        device: for tables.
        dtype: of the step.
        predicted: ``False`` where it was measured.
        step: the figures.
        where: machine, versions, code and date.
    """

    model: str
    device: str
    dtype: str
    predicted: bool
    step: Step
    where: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of the file."""
        return f"step-{self.model}-{self.device}-{self.dtype}-b{self.step.images}"


@dataclass(frozen=True)
class Processes:
    """Processes that trained one network together.

    Attributes:
        model: the configuration's name.
        images: of a process's batch.
        input_size: side of the images, pixels.
        threads: of each process, on CPU.
        bucket_mb: limit of DDP's buckets, MiB.
        measured: the figures.
        where: machine, versions, code and date.
    """

    model: str
    images: int
    input_size: int
    threads: int
    bucket_mb: float
    measured: Measurement
    where: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of the file."""
        device = self.where["machine"]["device"]
        size = f"b{self.images}-{self.input_size}-t{self.threads}"
        return f"processes-{self.model}-{device}-{size}"


@dataclass(frozen=True)
class Folder:
    """What a folder holds; of profiles and steps one a model.

    Attributes:
        profiles: by model.
        steps: likewise; on a GPU.
        processes: in the order of their names.
        on_cpu: steps that ``tools/benchmark.py`` measured on CPU, by model.
    """

    profiles: dict[str, Profile]
    steps: dict[str, SingleStep]
    processes: list[Processes]
    on_cpu: dict[str, SingleStep]


def provenance(device: str) -> dict[str, Any]:
    """Where, with what and when something is measured."""
    return {
        "machine": describe_machine(device),
        "versions": describe_versions(device),
        "code": describe_code(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def to_dict(result: Profile | SingleStep | Processes) -> dict[str, Any]:
    """Plain types, for JSON."""
    return asdict(result)


def read_folder(folder: Path, benchmarks: Path | None = None) -> Folder:
    """All results in a folder.

    Args:
        folder: of this package's results.
        benchmarks: of those of ``tools/benchmark.py``; ``None`` leaves them out.

    Raises:
        BenchmarkError: a file is not as it is written here, or a model has two profiles or steps.
    """
    profiles: dict[str, Profile] = {}
    steps: dict[str, SingleStep] = {}
    processes = []
    for path in sorted(folder.glob("*.json")):
        content = _read(path)
        try:
            kind = path.name.split("-")[0]
            if kind == "profile":
                found = _profile(content)
                _add(profiles, found.model, found, path)
            elif kind == "step":
                step = _single(content)
                _add(steps, step.model, step, path)
            elif kind == "processes":
                measured = {
                    key: {int(count): value for count, value in by_count.items()}
                    for key, by_count in content["measured"].items()
                }
                reduce = measured["reduce"]
                for count, times in reduce.items():
                    reduce[count] = {int(size): seconds for size, seconds in times.items()}
                processes.append(Processes(**{**content, "measured": Measurement(**measured)}))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, BenchmarkError):
                raise
            raise BenchmarkError(f"{path} is no result of tools/scaling.py: {error!r}") from error
    others = [] if benchmarks is None else read_results(benchmarks)
    on_cpu = {own.model: own for result in others for own in _steps_on_cpu(result)}
    return Folder(profiles, steps, processes, on_cpu)


def read_profile(path: Path) -> Profile:
    """One profile.

    Raises:
        BenchmarkError: the file cannot be read or is none.
    """
    content = _read(path)
    try:
        return _profile(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BenchmarkError(f"{path} is no profile of tools/scaling.py: {error!r}") from error


def read_step(path: Path, model: str) -> tuple[Step, str]:
    """A model's step, measured or predicted, and on which device.

    Args:
        path: what ``tools/benchmark.py --mode train`` or ``tools/scaling.py predict`` wrote.
        model: name of the configuration.

    Raises:
        BenchmarkError: the file cannot be read, is neither, or has no figure of the model.
    """
    content = _read(path)
    try:
        if "step" in content:
            single = _single(content)
            if single.model != model:
                raise BenchmarkError(f"{path} is a step of {single.model}; expected one of {model}")
            return single.step, f"{single.device}{', predicted' if single.predicted else ''}"
        result = Result.from_dict(content)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, BenchmarkError):
            raise
        raise BenchmarkError(
            f"{path}: neither tools/benchmark.py nor tools/scaling.py predict wrote it: {error!r}"
        ) from error
    if result.conditions.mode == "train":
        for network in result.networks:
            if network.model == model and (step := _step_of(result, network)) is not None:
                return step, result.machine["device"]
    names = ", ".join(dict.fromkeys(network.model for network in result.networks))
    raise BenchmarkError(
        f"{path} has no training step of {model}; it has {result.conditions.mode} of {names}; "
        "measure one with tools/benchmark.py --mode train"
    )


def _single(content: dict[str, Any]) -> SingleStep:
    return SingleStep(**{**content, "step": Step(**content["step"])})


def _steps_on_cpu(result: Result) -> list[SingleStep]:
    """Of a result of ``tools/benchmark.py``, if it is about training steps on CPU."""
    conditions = result.conditions
    if (conditions.mode, conditions.device) != ("train", "cpu"):
        return []
    where: dict[str, Any] = {
        key: getattr(result, key) for key in ("machine", "versions", "code", "date")
    }
    dtype = f"{conditions.dtype}, {conditions.threads} threads"
    found = ((network.model, _step_of(result, network)) for network in result.networks)
    return [
        SingleStep(model, "cpu", dtype, False, step, where)
        for model, step in found
        if step is not None
    ]


def _step_of(result: Result, network: Measured) -> Step | None:
    """Medians of a static network, or of a dynamic one as a user gets it."""
    if network.backend not in (STATIC, "auto") or not network.seconds:
        return None
    medians = [spread_of(network.seconds[part]).median for part in PARTS["train"][:3]]
    return Step(result.conditions.batch_size, *medians)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchmarkError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BenchmarkError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise BenchmarkError(f"{path}: expected an object, found {type(content).__name__}")
    return content


def _profile(content: dict[str, Any]) -> Profile:
    measured = content["measured"]
    gradients = [Gradient(**gradient) for gradient in measured["gradients"]]
    found = StepProfile(Step(**measured["step"]), gradients)
    return Profile(**{**content, "measured": found})


def _add(found: dict[str, Any], model: str, value: Any, path: Path) -> None:
    if model in found:
        raise BenchmarkError(
            f"{path}: {model} is there twice, the other file is {found[model].name}.json; the page "
            "shows one of each: remove the other"
        )
    found[model] = value
