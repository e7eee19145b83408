"""Several hundred random mistakes in the shipped configurations: each refused in one message.

A case that is accepted must do what it says: its setting is in the resolved configuration, or a
warning says why it has no effect. Networks are built without data (on the meta device), runs up to
their first update.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from breadth import breadth
from mutations import MISSING, Case, Writer, file_cases, setting_cases, text_cases, unknown_cases

import kw.training.run as training_run
from kw.config import Config, load_config, to_dict
from kw.data.loader import stop_workers
from kw.errors import UserError
from kw.training.distributed import Process

ROOT = Path(__file__).parents[1]
SEED = 20260
SECONDS = 10
COUNTS = {"settings": 300, "unknown": 70, "texts": 110}
META = torch.device("meta")
SHIPPED = [
    "imagenet/resnet18/kw_resnet18_1x.yaml",
    "imagenet/resnet18/resnet18.yaml",
    "imagenet/resnet18/resnet18_odconv4x_100ep.yaml",
    "imagenet/resnet18/resnet18_condconv8x_100ep.yaml",
    "imagenet/resnet50/kw_resnet50_1d2x.yaml",
    "imagenet/mobilenetv2/kw_mobilenetv2_050_4x.yaml",
    "imagenet/convnext/kw_convnext_tiny_1x.yaml",
    "imagenet/deit/kw_deit_tiny_1x.yaml",
    "imagenet/deit/deit_tiny.yaml",
    "demo/resnet18.yaml",
    "demo/kw_resnet18_1x.yaml",
]


class Hangs(BaseException):
    """A case took too long. No ``except Exception`` swallows it."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Seconds of computing or, for one that waits, six times as many of the clock."""
    began, rounds = time.process_time(), iter(range(5))

    def stop(*_: object) -> None:
        if time.process_time() - began >= 0.9 * seconds or next(rounds, None) is None:
            raise Hangs
        signal.alarm(seconds)  # other work on the machine delays it

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def place(
    images: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Writer, list[Path], Path]:
    """Where variants are written, the shipped files there, and a folder for anything else."""
    folder = tmp_path_factory.mktemp("bad_input")
    shutil.copytree(ROOT / "configs", folder / "configs")
    fitting = {
        "model.num_classes": 4,
        "data.root": str(images),
        "data.workers": 0,
        "batch_size": 4,
        "total_batch_size": 16,
    }
    shipped = [folder / "configs" / name for name in SHIPPED]
    return Writer(folder / "configs", fitting), shipped, folder


@pytest.fixture(autouse=True)
def on_the_meta_device(monkeypatch: pytest.MonkeyPatch) -> None:
    build = training_run.start_network

    def build_without_data(*args: Any, **options: Any) -> torch.nn.Module:
        with META:
            return build(*args, **options)

    monkeypatch.setattr(training_run, "start_network", build_without_data)


def attempt(case: Case, work_dir: Path) -> tuple[str, str]:
    """What becomes of a case: ``("refused" | "accepted", "")``, or ``("wrong", why)``."""
    try:
        with time_limit(SECONDS), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            config = load_config(str(case.file), case.options)
            trainer = training_run.build_trainer(config, work_dir, Process(0, 1, META))
            stop_workers(trainer.train_loader)
    except UserError as error:
        return ("wrong", why) if (why := fault_of_message(str(error), case)) else ("refused", "")
    except Hangs:
        return "wrong", f"took more than {SECONDS} s"
    except BaseException as error:
        return "wrong", f"{type(error).__name__}: {error}"
    said = [str(warning.message) for warning in told]
    return ("wrong", why) if (why := fault_of_config(config, said, case)) else ("accepted", "")


def fault_of_message(message: str, case: Case) -> str:
    """What is wrong with a message: it must name the key, or the file where there is no key."""
    if not message.strip() or "Traceback" in message or len(message) > 6000:
        return f"not a message: {message[:300]!r}"
    names = [case.file.name[:50]]
    if case.key:
        names = case.key.split(".")[-4:]
        names = names[1:] if names[0] in ("model", "data") and len(names) > 1 else names
    elif case.file.parent.name == "files":
        names.append("/files/")  # a base
    else:
        names += ["--cfg-options", "model.", "data.", "configs/_base_", "batch_size"]
    if not any(name in message for name in names):
        return f"names none of {names}: {message[:300]!r}"
    return ""


def fault_of_config(config: Config, said: list[str], case: Case) -> str:
    """Why a configuration that was accepted does not do what was written."""
    resolved = to_dict(config)
    if case.key:
        wanted = {case.key: case.value}
    else:
        wanted = dict(leaves(yaml.load(case.file.read_text(), yaml.BaseLoader) or {}))
        given = [option.split("=")[0] for option in case.options]
        wanted = {key: value for key, value in wanted.items() if key not in given}
    for key, value in wanted.items():
        if key.split(".")[0] == "_base_" or any(f" {key} = " in line for line in said):
            continue
        found = find(resolved, key)
        if not same(found, value):
            return f"{key} is {found!r}, was set to {value!r}"
    return ""


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, child in value.items():
            yield from leaves(child, f"{key}.{name}" if key else name)
    else:
        yield key, value


def find(tree: Any, key: str) -> Any:
    for name in key.split("."):
        if not isinstance(tree, dict) or name not in tree:
            return MISSING
        tree = tree[name]
    return tree


def same(found: Any, wanted: Any) -> bool:
    """Equal as YAML: text stands for what it says, and a mapping for the settings that it has."""
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(
            name in found and same(found[name], child) for name, child in wanted.items()
        )
    if isinstance(wanted, list):
        return (
            isinstance(found, list) and len(found) == len(wanted) and all(map(same, found, wanted))
        )
    if isinstance(wanted, str) and not isinstance(found, str):
        if found is None or isinstance(found, bool):
            return (
                wanted.lower()
                in {None: ("null", "", "~"), True: ("true",), False: ("false",)}[found]
            )
        try:
            wanted = float(wanted)
        except ValueError:
            return False
    if isinstance(found, bool) or isinstance(wanted, bool) or not isinstance(found, (int, float)):
        return type(found) is type(wanted) and found == wanted
    return math.isclose(found, wanted, rel_tol=1e-12)


def try_all(cases: Iterator[Case], work_dir: Path) -> dict[str, int]:
    """Counts of outcomes; fails with all the cases that went wrong."""
    counts = {"refused": 0, "accepted": 0, "wrong": 0}
    faults = []
    for number, case in enumerate(cases):
        outcome, why = attempt(case, work_dir / str(number))
        counts[outcome] += 1
        if why:
            faults.append(f"{case.name} [{case.file.name}]: {why[:600]}")
    assert not faults, f"{len(faults)} of {sum(counts.values())}:\n" + "\n".join(faults)
    return counts


@pytest.mark.parametrize("part", breadth(range(6), [0]))
def test_settings(part: int, place: Any, tmp_path: Path) -> None:
    writer, shipped, _ = place
    cases = setting_cases(writer, shipped, SEED + part, COUNTS["settings"] // 6)
    counts = try_all(cases, tmp_path)
    assert sum(counts.values()) == COUNTS["settings"] // 6
    assert min(counts["refused"], counts["accepted"]) > 5, counts


def test_unknown_keys(place: Any, tmp_path: Path) -> None:
    writer, shipped, _ = place
    counts = try_all(unknown_cases(writer, shipped, SEED, COUNTS["unknown"]), tmp_path)
    assert counts["refused"] > 50
    assert counts["accepted"] == 0


@pytest.mark.parametrize("part", breadth(range(2), [0]))
def test_texts(part: int, place: Any, tmp_path: Path) -> None:
    writer, shipped, folder = place
    marker = folder / "ran"
    cases = text_cases(writer, shipped, SEED + part, COUNTS["texts"] // 2, marker)
    counts = try_all(cases, tmp_path)
    assert min(counts["refused"], counts["accepted"]) > 5, counts
    assert not marker.exists()


def test_files(place: Any, tmp_path: Path) -> None:
    writer, shipped, folder = place
    counts = try_all(file_cases(writer, shipped[0], folder / "files"), tmp_path)
    assert counts["refused"] > 40
    assert counts["accepted"] <= 1


# What random mistakes found, or looking for more of their kind; each was a traceback or a hang.
FOUND = [
    ("model.timm_args={in_chans: 1}", "which data.channels says: set the number of channels there"),
    ("model.timm_args={features_only: true}", "expected logits [1, 4] from the network, found li"),
    ("model.timm_args={global_pool: ''}", "the network refuses images [1, 3, 32, 32]"),
    ("model.timm_args={channels: []}", "timm cannot build it"),
    ("model.timm_args={channels: [-8, 8, 8, 8]}", "timm cannot build it"),
    ("model.timm_args={act_layer: relu7}", "timm cannot build it"),
    ("model.timm_args={pretrained_cfg: 3}", "timm cannot build it"),
    ("model.timm_args={checkpoint_path: none.pth}", "timm cannot build it"),
    ("model.peer={method: dyconv, layers: '('}", "model.peer"),
    ("seed=4294967296", "seed = 4294967296: expected an integer >= 0 and <= 2147483647"),
    ("data.random_erasing={count: 1000000000}", "count = 1000000000: expected an integer >= 1 an"),
    ("data.test_crop_ratio=1e-9", "test_crop_ratio = 1e-09: expected a number >= 0.1 and <= 1"),
    ("data.workers=1000000", "data.workers = 1000000: expected an integer >= 0 and <= 512"),
    ("data.std=[1e-300, 1, 1]", "data.std = [1e-300, 1, 1]: expected a list of numbers, each >="),
    ("optimizer.lr=1e39", "optimizer.lr = 1e+39: expected a number > 0 and <= 1e+06"),
    ("batch_size=32", "batch_size = 32"),
    ("total_batch_size=8192", "the training set has 64 images, too few for one update"),
]


@pytest.mark.parametrize(("option", "expected"), FOUND, ids=[option for option, _ in FOUND])
def test_what_was_found(option: str, expected: str, place: Any, tmp_path: Path) -> None:
    writer, _, folder = place
    demo = folder / "configs/demo/resnet18.yaml"

    def build() -> None:
        config = load_config(str(demo), [*writer.options(), option])
        training_run.build_trainer(config, tmp_path, Process(0, 1, META))

    with time_limit(SECONDS), pytest.raises(UserError) as error:
        build()
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ("contraction.backend=native", "the network is static"),
        ("contraction.planner=off", "the network is static"),
        ("optimizer={name: sgd, weight_decay: 0, exempt_from_decay: norm}", "weight_decay is 0"),
        ("data.random_erasing={probability: 0, count: 3}", "random_erasing.probability is 0"),
    ],
)
def test_settings_that_were_ignored(option: str, why: str, place: Any) -> None:
    writer, _, folder = place
    with pytest.warns(UserWarning, match=rf"has no effect: .*{why}"):
        load_config(folder / "configs/demo/resnet18.yaml", [*writer.options(), option])


def test_there_are_enough_of_them() -> None:
    assert sum(COUNTS.values()) >= 470  # and those of files, data and detectors


def test_every_number_is_bounded() -> None:
    """On both sides, so that no absurd size gets as far as an allocation."""
    from kw.config.describe import key_hints

    for key, (hint, field) in key_hints(Config).items():
        if hint in (int, float, int | None, float | None) and key != "optimizer.clip_grad":
            assert [sign[0] for sign, _ in field.metadata["bounds"]] == [">", "<"], key
    assert dataclasses.is_dataclass(Config)
