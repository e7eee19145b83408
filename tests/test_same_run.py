"""A run meets its folder, its settings and its data again: what differs is refused or said."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from breadth import breadth
from test_engine import CPU, changed, run

from kw.config import ConfigError, config_from_mapping
from kw.data import DataError
from kw.runs import train as train_by_name
from kw.training import (
    CheckpointError,
    build_trainer,
    evaluate_checkpoint,
    load_checkpoint,
    train,
)
from kw.training.folder import held
from kw.training.layout import settings_changed
from kw.training.network_pictures import picture_classes
from kw.training.saving import link

# --- one run in a folder ----------------------------------------------------------------------


def hold(folder: Path, pipe: Connection) -> None:
    with held(folder, CPU):
        pipe.send("held")
        pipe.recv()


@pytest.mark.parametrize("end", ["asked", "killed"])
def test_a_folder_is_one_runs(
    settings: dict[str, Any], tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    other = context.Process(target=hold, args=(tmp_path, there))
    other.start()
    try:
        assert here.poll(60)
        assert here.recv() == "held"
        message = rf"in use by a run \(process {other.pid} on .+\); wait for it"
        for resume in (False, True):
            with pytest.raises(ConfigError, match=message):
                run(settings, tmp_path, resume=resume)
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # as torchrun sets it
        with pytest.raises(ConfigError, match=f"{message}.+ train together with --launcher pytor"):
            run(settings, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
    finally:
        if end == "killed":
            other.kill()
        else:
            here.send("end")
        other.join(60)
    assert other.exitcode == (-signal.SIGKILL if end == "killed" else 0)
    with held(tmp_path, CPU):
        assert (tmp_path / "run.lock").exists()
    assert not list(tmp_path.iterdir())


def test_the_users_folder(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No shell has replaced ``~`` where Python is given the name; data.root has it too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    train(config_from_mapping(changed(settings, epochs=1, temperature_epochs=0)), "~/run")
    assert (tmp_path / "run" / "last.pth").is_file()
    assert not (tmp_path / "~").exists()
    # A run's own configuration is that run's, not one called "config".
    train_by_name("run/config.yaml", resume=True, epochs=2)
    assert load_checkpoint(tmp_path / "run" / "last.pth")["meta"]["epoch"] == 2
    assert not (tmp_path / "work_dirs").exists()


def test_an_error_lets_go_of_the_folder(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="num_classes"):
        run(changed(settings, model__num_classes=9), tmp_path)
    with held(tmp_path, CPU):
        pass


def test_links_to_the_same_file_leave_nothing_behind(tmp_path: Path) -> None:
    newest, best = tmp_path / "epoch_1.pth", tmp_path / "best.pth"
    newest.write_text("1")
    for _ in range(2):
        link(newest, best)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pth", "epoch_1.pth"]
    newest.unlink()
    newest.write_text("2")
    link(newest, best)
    assert best.read_text() == "2"
    assert len(list(tmp_path.iterdir())) == 2


# --- settings on resume -----------------------------------------------------------------------


def log_text(work_dir: Path) -> str:
    newest = max(work_dir.glob("*/*.log"), key=lambda path: path.stat().st_mtime_ns)
    return newest.read_text()


SGD = {"name": "sgd", "lr": 0.1, "weight_decay": 1e-4, "momentum": 0.9}
ADAM = {"name": "adamw", "lr": 0.01, "weight_decay": 0.05, "betas": [0.9, 0.999]}


@pytest.mark.parametrize(
    ("optimizer", "key", "value"),
    breadth(
        [
            (SGD, "weight_decay", 0.01),
            (SGD, "momentum", 0.5),
            (ADAM, "betas", [0.5, 0.9]),
            (ADAM, "eps", 1e-4),
        ],
        [(SGD, "weight_decay", 0.01), (ADAM, "betas", [0.5, 0.9])],
    ),
)
def test_an_optimizers_settings_are_those_of_the_configuration(
    settings: dict[str, Any], tmp_path: Path, optimizer: dict[str, Any], key: str, value: Any
) -> None:
    """As in a run that has them from the start; its state is that of the checkpoint."""
    settings = changed(settings, optimizer=optimizer, epochs=1)
    run(settings, tmp_path)
    settings = changed(settings, epochs=2, **{f"optimizer__{key}": value})
    fresh = build_trainer(config_from_mapping(settings), tmp_path / "fresh", CPU)
    trainer = build_trainer(config_from_mapping(settings), tmp_path, CPU, resume=True)
    trainer.load()
    groups = [each.optimizer.param_groups for each in (trainer, fresh)]
    for own, expected in zip(*groups, strict=True):
        strip = {"params", "lr"}
        assert {k: v for k, v in own.items() if k not in strip} == {
            k: v for k, v in expected.items() if k not in strip
        }
    assert trainer.optimizer.state
    shown = yaml.safe_load(str(value))
    assert f"optimizer.{key}: " in log_text(tmp_path)
    assert f"-> {shown}" in log_text(tmp_path)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["optimizer"][key] == value


def test_other_groups_of_parameters_are_refused(settings: dict[str, Any], begun: Path) -> None:
    with pytest.raises(CheckpointError, match=r"other groups of parameters \(.*attention_lr"):
        run(changed(settings, epochs=2, optimizer__attention_lr=3), begun, resume=True)


def test_what_differs_between_settings() -> None:
    before = "epochs: 3\ndata:\n  root: a\n  mean: [1, 2]\nema: null\n"
    now = "epochs: 4\ndata:\n  root: a\n  mean: [1, 3]\nema:\n  decay: 0.5\nseed: 1\n"
    assert settings_changed(before, before) == settings_changed(None, now) == []
    assert settings_changed(before, now) == [
        "epochs: 3 -> 4",
        "data.mean: [1, 2] -> [1, 3]",
        "ema.decay: not set -> 0.5",
        "seed: not set -> 1",
    ]
    detectors = [f"model = dict(a=1)\nepochs = {epochs}\n" for epochs in (3, 4)]
    assert settings_changed(*detectors) == ["- epochs = 3", "+ epochs = 4"]


def test_a_finished_run_keeps_its_configuration(settings: dict[str, Any], begun: Path) -> None:
    files = {name: (begun / name).read_bytes() for name in ("config.yaml", "last.pth")}
    run(changed(settings, epochs=1, seed=5), begun, resume=True)
    assert {name: (begun / name).read_bytes() for name in files} == files
    assert "1 epochs are done" in log_text(begun)
    assert "nothing is trained" in log_text(begun)
    metrics = run(changed(settings, seed=5, epochs=2), begun, resume=True)
    assert "seed: 0 -> 5" in log_text(begun)
    assert "seed: 5" in (begun / "config.yaml").read_text()
    assert metrics["images"] == 19


@pytest.mark.parametrize(("before", "after"), [(16, 32), (32, 16)])
def test_an_epoch_of_other_updates_is_refused(
    settings: dict[str, Any], tmp_path: Path, before: int, after: int
) -> None:
    """Two epochs of two updates are as many as one of four: nothing would be trained."""
    batch = {"total_batch_size": before, "batch_size": 16}
    run(changed(settings, epochs=1, **batch), tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.glob("*.*") if path.is_file()}
    batch = {"total_batch_size": after, "batch_size": 16}
    message = rf"{64 // before} an epoch, where this run makes {64 // after} an epoch"
    with pytest.raises(CheckpointError, match=message):
        run(changed(settings, epochs=2, **batch), tmp_path, resume=True)
    assert {path: path.read_bytes() for path in files} == files


# --- classes ----------------------------------------------------------------------------------


@pytest.fixture
def trained(settings: dict[str, Any], begun: Path) -> tuple[dict[str, Any], Path]:
    """A run, and settings for its pictures with the first class's folder renamed."""
    root = begun / "renamed"
    shutil.copytree(settings["data"]["root"], root)
    for split in ("train", "val"):
        first = min((root / split).iterdir())
        first.rename(first.with_name("zebra"))
    return changed(settings, data__root=str(root)), begun / "last.pth"


def test_other_classes_are_refused(trained: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    settings, checkpoint = trained
    config = config_from_mapping(settings)
    names = load_checkpoint(checkpoint)["meta"]["classes"]
    message = rf"class 0 is '{names[0]}' there and '{names[1]}' here \(4 and 4 classes"
    with pytest.raises(CheckpointError, match=message):
        evaluate_checkpoint(config, checkpoint)
    with pytest.raises(CheckpointError, match=message):
        run(changed(settings, epochs=2), checkpoint.parent, resume=True)
    arguments = {"layers": None, "images": 4, "classes": 2}
    with pytest.raises(CheckpointError, match=message):
        picture_classes(config, checkpoint, tmp_path / "classes.png", **arguments)


def test_a_checkpoint_without_names_is_evaluated(
    trained: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    settings, checkpoint = trained
    state = load_checkpoint(checkpoint)
    del state["meta"]["classes"]
    torch.save(state, tmp_path / "nameless.pth")
    found = evaluate_checkpoint(config_from_mapping(settings), tmp_path / "nameless.pth")
    assert found["top1"] >= 0
    # Nor does the set need training images.
    shutil.copytree(Path(settings["data"]["root"]) / "val", tmp_path / "alone" / "val")
    alone = config_from_mapping(changed(settings, data__root=str(tmp_path / "alone")))
    assert evaluate_checkpoint(alone, tmp_path / "nameless.pth") == found
