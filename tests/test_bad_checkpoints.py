"""Checkpoints that are not what they should be: one message, and nothing in them runs."""

from __future__ import annotations

import ast
import contextlib
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kw.config import ConfigError, config_from_mapping
from kw.models import build_network
from kw.models.authors_checkpoints import AuthorsFileError, read_authors_file
from kw.training import CheckpointError, load_checkpoint
from kw.training.distributed import Process
from kw.training.run import build_trainer
from kw.training.state import run_state

ROOT = Path(__file__).parents[1]
CPU = Process(0, 1, torch.device("cpu"))


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def evils(marker: Path) -> list[Any]:
    touch = f"open({str(marker)!r}, 'w').close()"
    return [
        Evil(os.system, f"touch {marker}"),
        Evil(eval, touch),
        Evil(exec, touch),
        Evil(open, str(marker), "w"),
        Evil(os.mkdir, str(marker)),
        Evil(shutil.copy, str(ROOT / "LICENSE"), str(marker)),
    ]


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """Settings of a tiny run, and the checkpoint that it left before its first update."""
    settings = {
        "model": {
            "name": "resnet18",
            "num_classes": 4,
            "timm_args": {"channels": [8, 8, 16, 16]},
            "kernel_warehouse": {"plan": "resnet18", "start": "paper"},
        },
        "data": {"root": str(images), "input_size": 32, "workers": 0},
        "optimizer": {"name": "adamw", "lr": 0.002},
        "epochs": 2,
        "total_batch_size": 16,
        "batch_size": 16,
    }
    folder = tmp_path_factory.mktemp("trained")
    trainer = build_trainer(config_from_mapping(settings, check_model_name=False), folder, CPU)
    path = folder / "epoch_0.pth"
    torch.save(run_state(trainer), path)
    return settings, path


def resume(settings: dict[str, Any], path: Path, work_dir: Path) -> Any:
    config = config_from_mapping(settings, check_model_name=False)
    trainer = build_trainer(config, work_dir, CPU, resume=path)
    trainer.load()
    return trainer


def test_the_checkpoint_itself_resumes(trained: Any, tmp_path: Path) -> None:
    settings, path = trained
    assert resume(settings, path, tmp_path).epoch == 0


@pytest.mark.parametrize("number", range(6))
def test_code_does_not_run(number: int, trained: Any, tmp_path: Path) -> None:
    """By no way in: resuming, testing, converting, timm's own two ways to name a file."""
    marker = tmp_path / "ran"
    settings, good = trained
    evil = evils(marker)[number]
    whole = torch.load(good, weights_only=True)
    contents: list[Any] = [evil, {"state_dict": evil}, {**whole, "meta": {"config": evil}}]
    contents += [{"model": {"a": torch.zeros(1), "b": evil}}]
    for i, content in enumerate(contents):
        for zipped in (True, False):
            path = tmp_path / f"{i}_{zipped}.pth"
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
            with pytest.raises(CheckpointError, match=path.name):
                load_checkpoint(path)
            with pytest.raises(
                AuthorsFileError, match="which is neither a tensor nor a plain type"
            ):
                read_authors_file(path)
    for arguments in (
        {"checkpoint_path": str(path)},
        {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}},
    ):
        model = config_from_mapping(
            {**settings, "model": {"name": "resnet18", "timm_args": arguments}},
            check_model_name=False,
        ).model
        with pytest.raises(ConfigError, match=r"timm_args.*UnpicklingError|weights_only"):
            build_network(model)
    assert not marker.exists()


def test_the_evil_ones_are_evil(tmp_path: Path) -> None:
    """Else the test above would prove nothing."""
    path, marker = tmp_path / "evil.pth", tmp_path / "ran"
    torch.save({"state_dict": evils(marker)[0]}, path)
    torch.load(path, weights_only=False)
    assert marker.exists()


def test_cut_off_and_damaged(trained: Any, tmp_path: Path) -> None:
    """Anywhere: what remains is refused; a bit that nobody reads may be lost."""
    whole = trained[1].read_bytes()
    rng = random.Random(3)
    path = tmp_path / "cut.pth"
    cuts = [0, 1, 3, 4, 100, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(40))]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=r"cut\.pth: cannot be read"):
            load_checkpoint(path)
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 50)):
            damaged[rng.randrange(len(whole))] = rng.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            load_checkpoint(path)


@pytest.mark.parametrize(
    "content", [b"", b"seed: 1\n", b"\x89PNG\r\n\x1a\n" + b"x" * 64, b"PK\x03\x04", b"\x80\x02}."]
)
def test_other_files(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    path.write_bytes(content)
    for read, kind in (
        (load_checkpoint, CheckpointError),
        (read_authors_file, AuthorsFileError),
    ):
        with pytest.raises(kind, match=r"other\.pth"):
            read(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(CheckpointError, match=r"other\.pth"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="no such file"):
        load_checkpoint(tmp_path)


def _set(key: str, value: Any) -> Callable[[dict], None]:
    def change(checkpoint: dict) -> None:
        *groups, last = key.split(".")
        for group in groups:
            checkpoint = checkpoint[group]
        checkpoint[last] = value

    return change


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("state_dict", 3, "state_dict is int: expected tensors by name"),
        ("state_dict", {}, "state_dict is an empty mapping"),
        ("state_dict", [1], "state_dict is list"),
        ("state_dict", {"a": 1}, "state_dict: 'a' is int"),
        ("state_dict", {3: torch.zeros(1)}, "state_dict: 3 is Tensor"),
        ("state_dict", {"a": torch.zeros(1)}, "is of another model"),
        ("ema_state_dict", None, "ema_state_dict is NoneType"),
        ("meta", None, "meta is NoneType: expected a mapping"),
        ("meta", {}, "it lacks meta.epoch, meta.iter, meta.best"),
        ("meta.epoch", "3", "meta.epoch is '3': expected a count"),
        ("meta.epoch", -1, "meta.epoch is -1"),
        ("meta.iter", 2.5, "meta.iter is 2.5"),
        ("meta.iter", 10**9, "updates in 0 epochs"),
        ("meta.best", "best", "meta.best is 'best': expected a number"),
        ("meta.best", float("nan"), "meta.best is nan"),
        ("meta.classes", "abc", "meta.classes: expected a list of names"),
        ("meta.classes", ["a", "b", "c", "d"], "class 0 is 'a' there"),
        ("optimizer", 3, "its optimizer is not laid out"),
        ("optimizer", {}, "its optimizer is not laid out"),
        ("optimizer.optimizer", {}, "no param_groups and state"),
        ("optimizer.optimizer.param_groups", [], "other groups of parameters"),
        ("optimizer.optimizer.param_groups", [3, 3], "param_groups are no mappings"),
        ("optimizer.optimizer.state", [], "no param_groups and state"),
        ("optimizer.optimizer.state", {0: 3}, "state of parameter 0 is int"),
        ("optimizer.optimizer.state", {0: {"exp_avg": torch.zeros(7)}}, "exp_avg of parameter 0"),
    ],
)
def test_wrong_types_inside(
    key: str, value: Any, expected: str, trained: Any, tmp_path: Path
) -> None:
    settings, good = trained
    checkpoint = torch.load(good, weights_only=True)
    _set(key, value)(checkpoint)
    path = tmp_path / "wrong.pth"
    torch.save(checkpoint, path)
    with pytest.raises(CheckpointError) as error:
        resume(settings, path, tmp_path / "run")
    assert "wrong.pth" in str(error.value)
    assert expected in str(error.value)


def test_missing_parts(trained: Any, tmp_path: Path) -> None:
    """Whichever part is left out, at any depth of two: refused, or nothing that is needed."""
    settings, good = trained
    whole = torch.load(good, weights_only=True)
    keys = [*whole, *(f"meta.{key}" for key in whole["meta"])]
    path = tmp_path / "part.pth"
    for i, key in enumerate(keys):
        part = {**whole, "meta": dict(whole["meta"])}
        outer, _, inner = key.partition(".")
        del (part["meta"] if inner else part)[inner or outer]
        torch.save(part, path)
        with contextlib.suppress(CheckpointError):
            resume(settings, path, tmp_path / str(i))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model.timm_args": {"channels": [8, 8, 16, 24]}}, "is of another model"),
        ({"model.kernel_warehouse": None}, "is of another model"),
        ({"model.kernel_warehouse.cell_num_ratio": 2}, "is of another model"),
        ({"optimizer.name": "sgd"}, "its optimizer is another one"),
        ({"optimizer.exempt_from_decay": "none"}, "other groups of parameters"),
    ],
)
def test_of_another_run(
    change: dict[str, Any], expected: str, trained: Any, tmp_path: Path
) -> None:
    settings, path = trained
    other = yaml.safe_load(yaml.safe_dump(settings))
    for key, value in change.items():
        _set(key, value)(other)
    other["optimizer"]["weight_decay"] = 0.05
    with pytest.raises(CheckpointError, match=expected):
        resume(other, path, tmp_path)


# What the sources may not call, by the end of the dotted name.
FORBIDDEN = {
    *("eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "marshal.loads"),
    *("pickle.Unpickler", "dill.load", "joblib.load", "shelve.open", "yaml.load", "yaml.load_all"),
    *("yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen", "np.load", "numpy.load"),
    *("load_state_dict_from_url", "urlopen", "urlretrieve", "requests.get"),
}


def test_sources_run_nothing_that_users_give() -> None:
    """torch.load with weights_only=True; no pickle, unsafe YAML, eval, shell or network."""
    seen = 0
    for path in [*ROOT.glob("kw/**/*.py"), *ROOT.glob("tools/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            where = f"{path.relative_to(ROOT)}:{node.lineno}"
            name = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name in ("torch.load", "load_torch"):
                seen += 1
                assert given.get("weights_only") == "True", where
            assert given.get("weights_only", "True") == "True", where
            assert given.get("allow_pickle", "False") == "False", where
            assert given.get("shell", "False") == "False", where
            if name == "np.load":
                assert given.get("allow_pickle") == "False", where
            else:
                assert name not in FORBIDDEN, f"{where}: {name}"
            is_yaml = name.endswith("Loader") and "yaml" in name
            assert not is_yaml or "Safe" in name, where
    assert seen == 5
