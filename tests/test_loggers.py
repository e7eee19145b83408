"""Loggers: what services are told, by stand-ins that record the calls made to their packages."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_engine import changed, run

from kw.config import ConfigError, config_from_mapping
from kw.registry import HOOKS, LOGGERS
from kw.training import load_checkpoint
from kw.training.hooks import Hook, LoggerHook
from kw.training.loggers import LoggedRun, Logger, TensorBoard

CALLS: list[tuple[Any, ...]] = []


def module(name: str, **entries: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(entries)
    return made


def note(name: str, result: Any = None) -> Any:
    """A function that records its calls."""

    def call(*args: Any, **kwargs: Any) -> Any:
        CALLS.append((name, *args, kwargs))
        return result

    return call


def calls(name: str) -> list[tuple[Any, ...]]:
    return [call[1:] for call in CALLS if call[0] == name]


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    wandb_run = SimpleNamespace(
        id="w1", define_metric=note("define"), log=note("wandb.log"), finish=note("wandb.finish")
    )
    parts = {
        "wandb": {"init": note("wandb.init", wandb_run), "Image": lambda pixels: ("image", pixels)},
        "mlflow": {
            "start_run": note("start_run", SimpleNamespace(info=SimpleNamespace(run_id="m1"))),
            **{
                each: note(f"mlflow.{each}")
                for each in [
                    "set_tracking_uri",
                    "set_experiment",
                    "log_params",
                    "log_text",
                    "log_metrics",
                    "log_image",
                    "end_run",
                ]
            },
        },
        "trackio": {
            "init": note("trackio.init", SimpleNamespace(name="t1")),
            "log": note("trackio.log"),
            "finish": note("trackio.finish"),
            "Image": lambda pixels: ("image", pixels),
        },
    }
    for name, entries in parts.items():
        monkeypatch.setitem(sys.modules, name, module(name, **entries))


@pytest.fixture
def logged(settings: dict[str, Any]) -> dict[str, Any]:
    loggers = {
        "tensorboard": {},
        "wandb": {"project": "p", "tags": ["a"]},
        "mlflow": {"experiment": "e", "tracking_uri": "here"},
        "trackio": {"project": "t", "name": "taken"},
    }
    # Of one epoch or of two: the first is the same.
    schedule = {"name": "step", "milestones": [0.5]}
    return {**settings, "loggers": loggers, "schedule": schedule, "temperature_epochs": 0}


def written(work_dir: Path) -> list[tuple[int, dict[str, float]]]:
    """Updates and figures of the log, under the names that loggers are given."""
    lines = [json.loads(line) for line in (work_dir / "log.jsonl").read_text().splitlines()]
    return [
        (
            line["iter"],
            {
                f"{line['mode']}/{k}": v
                for k, v in line.items()
                if k not in ("mode", "epoch", "iter")
            },
        )
        for line in lines
    ]


def test_services_are_told_and_a_resumed_run_is_the_same(
    services: None, logged: dict[str, Any], tmp_path: Path
) -> None:
    work_dir = tmp_path / "mine"
    run({**logged, "epochs": 1}, work_dir)
    [(first,)] = calls("wandb.init")
    assert (first["project"], first["tags"], first["name"]) == ("p", ["a"], "mine")
    assert first["config"]["optimizer"]["lr"] == 0.002
    assert "id" not in first
    assert calls("start_run") == [({"run_name": "mine"},)]
    assert calls("mlflow.set_tracking_uri") == [("here", {})]
    [(parameters, _)] = calls("mlflow.log_params")
    assert parameters["optimizer.lr"] == 0.002
    [(text, name, _)] = calls("mlflow.log_text")
    assert (text, name) == ((work_dir / "config.yaml").read_text(), "config.yaml")
    [(begun,)] = calls("trackio.init")
    assert begun.keys() == {"project", "name", "config"}

    run({**logged, "epochs": 2}, work_dir, resume=True)
    second = calls("wandb.init")[1][0]
    assert (second["id"], second["resume"]) == ("w1", "allow")
    assert calls("start_run")[1] == ({"run_id": "m1"},)
    assert len(calls("mlflow.log_params")) == 1
    again = calls("trackio.init")[1][0]
    assert (begun["name"], again["name"], again["resume"]) == ("taken", "t1", "allow")

    expected = written(work_dir)
    assert [update for update, _ in expected] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    told = [({k: v for k, v in given.items() if k != "update"}, given["update"])
            for given, _ in calls("wandb.log")]  # fmt: skip
    assert [(update, values) for values, update in told] == expected
    for service in ("mlflow.log_metrics", "trackio.log"):
        assert [(more["step"], values) for values, more in calls(service)] == expected
    ends = [calls(name) for name in ("wandb.finish", "mlflow.end_run", "trackio.finish")]
    assert ends == [[({"exit_code": 0},)] * 2, [("FINISHED", {})] * 2, [({},)] * 2]


def test_another_number_of_processes_goes_on_in_the_same_run(
    services: None, logged: dict[str, Any], tmp_path: Path
) -> None:
    run({**logged, "epochs": 1}, tmp_path / "one")
    checkpoint = load_checkpoint(tmp_path / "one/last.pth")
    checkpoint["ranks"] *= 2
    torch.save(checkpoint, tmp_path / "two.pth")
    CALLS.clear()
    run({**logged, "epochs": 2}, tmp_path / "one", resume=tmp_path / "two.pth")
    assert calls("wandb.init")[0][0]["id"] == "w1"


class Ends(Hook):
    def after_epoch(self, trainer: Any, metrics: Any) -> None:
        raise RuntimeError("broken")


def test_what_ended_early_is_no_success(
    services: None, logged: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HOOKS, "entries", {**HOOKS.entries, "ends": Ends})
    with pytest.raises(RuntimeError, match="broken"):
        run({**logged, "hooks": {"ends": {}}}, tmp_path)
    assert calls("wandb.finish") == [({"exit_code": 1},)]
    assert calls("mlflow.end_run") == [("FAILED", {})]


def test_a_missing_package_is_refused_before_the_run(
    logged: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("wandb", "mlflow", "trackio"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        loggers = {name: logged["loggers"][name]}
        with pytest.raises(ConfigError, match=f"loggers.{name}: .*: pip install {name}"):
            run({**logged, "loggers": loggers}, tmp_path / "new")
    assert not list(tmp_path.glob("new/*.pth"))


class Own(Logger):
    def __init__(self, fails: str = "") -> None:
        self.fails = fails

    def _may_fail(self, name: str) -> None:
        CALLS.append((name,))
        if name == self.fails:
            raise OSError(f"no {name}")

    def start(self, run: Any) -> None:
        self._may_fail("start")

    def scalars(self, values: Any, update: int) -> None:
        self._may_fail("scalars")

    def image(self, name: str, pixels: np.ndarray, update: int) -> None:
        assert pixels.dtype == np.uint8
        assert pixels.shape[2] == 3
        self._may_fail("image")

    def close(self, finished: bool) -> None:
        self._may_fail("close")


@pytest.fixture
def own(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    CALLS.clear()
    list(LOGGERS)
    monkeypatch.setattr(LOGGERS, "entries", {**LOGGERS.entries, "own": Own})
    return {**changed(settings, epochs=1), "loggers": {"own": {}}, "pictures": {"images": 4}}


def test_a_logger_of_ones_own(own: dict[str, Any], tmp_path: Path) -> None:
    """And no other: no events are written; the log is."""
    run(own, tmp_path)
    names = [name for name, *_ in CALLS]
    assert (names[0], names[-1]) == ("start", "close")
    assert (names.count("scalars"), names.count("image")) == (4 + 1 + 1, 3)
    assert not (tmp_path / "tensorboard").exists()
    assert len(written(tmp_path)) == 5


def test_a_service_that_fails_does_not_end_the_run(
    own: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run({**own, "loggers": {"own": {"fails": "scalars"}, "tensorboard": {}}}, tmp_path / "a")
    assert [name for name, *_ in CALLS] == ["start", "scalars"]
    assert "loggers.own: OSError: no scalars; the run goes on without it" in caplog.text
    events = EventAccumulator(str(tmp_path / "a/tensorboard")).Reload()
    assert len(events.Scalars("train/loss")) == 4
    assert len(events.Images("pictures/cells")) == 1
    with pytest.raises(ConfigError, match=r"loggers.own does not start: OSError: no start"):
        run({**own, "loggers": {"own": {"fails": "start"}}}, tmp_path / "b")


def test_a_run_that_begins_anew_hides_the_events_of_the_first_attempt(tmp_path: Path) -> None:
    """One that was killed before its first checkpoint; its log begins anew as well."""
    for values in ((1.0, 2.0, 3.0), (4.0,)):
        board = TensorBoard()
        board.start(LoggedRun(tmp_path, {}, "config.yaml", "", 0))
        for update, value in enumerate(values, 1):
            board.scalars({"train/loss": value}, update)
        board.close(False)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [(1, 4.0)]


def test_one_process_logs(own: dict[str, Any]) -> None:
    trainer: Any = SimpleNamespace(process=SimpleNamespace(is_main=False), board=None)
    hook = LoggerHook({"own": {}})
    hook.before_training(trainer)
    hook.close(trainer)
    assert not CALLS


@pytest.mark.parametrize(
    ("loggers", "expected"),
    [
        ({"tensorbord": {}}, "did you mean 'tensorboard'"),
        ({"wandb": {}}, "its argument 'project', which has no default"),
        ({"mlflow": {"experiment": 1}}, "'experiment' to be str, found 1"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], loggers: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        config_from_mapping({**settings, "loggers": loggers})
