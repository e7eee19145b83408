"""A run loses no more than the updates since its last checkpoint, whatever happens to it."""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from breadth import breadth
from conftest import settings_of
from kills import compare, differences, log_of, run_with_kills
from kills import settings as killed_settings
from processes import Forked, in_processes
from test_parts import as_earlier

from kw.config import ConfigError, config_from_mapping
from kw.config.run_schema import BadImagesConfig
from kw.data.faults import BadImage, FaultLog
from kw.errors import EXIT_INTERRUPTED, Interrupted
from kw.models import build_network
from kw.training import CheckpointError, load_checkpoint, train, trainer
from kw.training.checkpoint import find_damage, save_checkpoint
from kw.training.distributed import Process
from kw.training.folder import find_checkpoint
from kw.training.hooks import BadImageHook, Hook, LogHook
from kw.training.hooks.log import write_line
from kw.training.interruption import Signals
from kw.training.optim import build_optimizer
from kw.training.run import build_trainer as trainer_of
from kw.training.saving import Checkpoints, checkpoint_name, checkpoints, newest_whole, write_json
from kw.training.trained import trained_file
from kw.warehouse.warehouse import earlier_order

ROOT = Path(__file__).parents[1]


@pytest.mark.slow  # test_parallel.py has one kill, at a known update
@pytest.mark.parametrize(("processes", "kills"), [(1, 10), (2, 3)])
def test_killed_and_resumed_is_never_interrupted(
    images: Path, tmp_path: Path, processes: int, kills: int
) -> None:
    """Weights, averages, optimizer, best epoch and log, to the bit, after ``kill -9``."""
    config = killed_settings(images)
    run_with_kills(config, tmp_path / "whole", 0, processes, 0, 0.0)
    hits = run_with_kills(config, tmp_path / "killed", kills, processes, 1, 1.5)
    assert hits >= kills - 2
    assert compare(tmp_path / "whole", tmp_path / "killed") == []


def changed(settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**settings, **changes}


def test_other_processes_follow_the_recipe(images: Path, tmp_path: Path) -> None:
    """One process goes on where two stopped: the same total batch, and it says what differs."""
    config = killed_settings(images)
    run_with_kills({**config, "epochs": 1}, tmp_path, 0, 2, 0, 0.0)
    train(config_from_mapping({**config, "epochs": 2}), tmp_path, resume=True)
    log = "".join(path.read_text() for path in tmp_path.glob("*/*.log"))
    assert "was written by 2 process(es)" in log
    assert "not to the bit" in log
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [x["iter"] for x in lines if x["mode"] == "train"] == [3, 4, 7, 8]


def test_names_sort_by_progress(tmp_path: Path) -> None:
    names = [(1, None), (1, 5), (1, 12), (2, None), (10, None)]
    for epoch, update in reversed(names):
        (tmp_path / checkpoint_name(epoch, update)).touch()
    (tmp_path / "epoch_x.pth").touch()
    assert [p.name for p in checkpoints(tmp_path)] == [checkpoint_name(*name) for name in names]


@pytest.fixture(scope="module")
def saved(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs; tests only read it."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    settings = changed(settings_of(images), checkpoint={"updates": 2, "keep": 9})
    train(config_from_mapping(settings), folder)
    assert len(checkpoints(folder)) == 4  # updates 2, 4 (epoch 1), 6 and 8 (epoch 2)
    return folder


@pytest.fixture
def run_dir(settings: dict[str, Any], saved: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    settings["checkpoint"] = {"updates": 2, "keep": 9}
    return Path(shutil.copytree(saved, tmp_path, dirs_exist_ok=True))


@pytest.mark.parametrize("damage", breadth(["cut", "empty", "bit", "start"], ["cut", "bit"]))
def test_resume_takes_the_newest_whole_file(
    settings: dict[str, Any], run_dir: Path, damage: str
) -> None:
    newest = checkpoints(run_dir)[-1]
    content = bytearray(newest.read_bytes())
    newest.unlink()  # best.pth may be the same file
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "empty":
        content = bytearray()
    elif damage == "start":
        content[:4096] = bytes(4096)  # a block that never reached the disk
    else:
        content[len(content) // 2] ^= 16
    newest.write_bytes(content)
    said: list[str] = []
    chosen = newest_whole(run_dir, said.append)
    assert chosen == checkpoints(run_dir)[-2]
    assert len(said) == 1
    assert str(newest) in said[0]
    train(config_from_mapping(settings), run_dir, resume=True)
    assert find_damage(newest) is None


def test_later_checkpoints_are_told_of(
    settings: dict[str, Any], run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that goes back to one in between and is killed goes on from the last of them."""
    process = Process(0, 1, torch.device("cpu"))
    *_, earlier, last = checkpoints(run_dir)
    for path in (last, run_dir / "last.pth", earlier):
        assert find_checkpoint(str(path), run_dir, process) == path
        said = f"{last.name} stays in {run_dir}" in caplog.text
        assert said == (path == earlier)
    assert find_checkpoint(True, run_dir, process) == last


@pytest.mark.parametrize("left", [["best.pth", "last.pth"], ["last.pth"], ["best.pth"]])
def test_a_run_whose_epochs_were_deleted_is_a_run(
    settings: dict[str, Any], one_epoch: tuple[Path, Any], begun: Path, left: list[str]
) -> None:
    """It is neither written over nor begun anew."""
    config = config_from_mapping(changed(settings, epochs=1, checkpoint={"keep": 1}))
    for path in begun.glob("*.pth"):
        if path.name not in left:
            path.unlink()
    with pytest.raises(ConfigError, match=rf"holds a run already \({left[-1]}\)"):
        train(config, begun)
    assert trained_file(begun).name == left[0]
    longer = config_from_mapping(changed(settings, checkpoint={"keep": 1}))
    train(longer, begun, resume=True)
    lines = [json.loads(line) for line in (begun / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["mode"] == "val"] == [1, 2]
    assert lines[4]["top1"] == one_epoch[1]["top1"]
    assert {path.name for path in begun.glob("*.pth")} == {"best.pth", "last.pth", "epoch_2.pth"}


def test_no_whole_file_is_an_error(settings: dict[str, Any], run_dir: Path) -> None:
    """And no reason to begin anew."""
    for path in checkpoints(run_dir):
        path.unlink()
        path.write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match=r"no checkpoint of[\s\S]*epoch_2\.pth"):
        train(config_from_mapping(settings), run_dir, resume=True)


def test_a_full_disk_costs_nothing_that_was_there(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: the run says so and goes on. At the end: it is an error."""
    written: list[int] = []
    save = torch.save

    def full(state: dict[str, Any], file: Any) -> None:
        written.append(state["meta"]["epoch"])
        if len(written) in failing:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", full)
    settings["epochs"], failing = 3, {3}  # the first epoch is written twice
    train(config_from_mapping(settings), tmp_path / "once")
    assert [path.name for path in checkpoints(tmp_path / "once")] == ["epoch_1.pth", "epoch_3.pth"]
    assert "could not be written" in next((tmp_path / "once").glob("*/*.log")).read_text()
    written.clear()
    failing = {4}
    with pytest.raises(CheckpointError, match="No space left"):
        train(config_from_mapping(settings), tmp_path / "end")
    left = checkpoints(tmp_path / "end")
    assert [path.name for path in left] == ["epoch_1.pth", "epoch_2.pth"]
    assert all(find_damage(path) is None for path in left)
    assert not list((tmp_path / "end").glob("*.partial"))


@pytest.mark.parametrize("values", [10, 100_000])
def test_the_disk_itself_is_full(values: int, tmp_path: Path) -> None:
    """The system refuses to write on: torch then raises an error of its own."""
    written = Checkpoints(tmp_path, keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        written.write({"state_dict": {"a": torch.zeros(values)}}, tmp_path / "epoch_1.pth")
        with pytest.raises(CheckpointError, match="File too large"):
            written.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_no_half_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What it has no room for comes later, in its order; the list of bad images with the log."""
    faults = FaultLog(100, BadImagesConfig())
    faults.record([BadImage(7, "a" * 200 + "\udcfe.png", "empty")])
    faults.merge(faults.take())
    loader, process = SimpleNamespace(faults=faults), Process(0, 1, torch.device("cpu"))
    trainer: Any = SimpleNamespace(
        process=process, work_dir=tmp_path, train_loader=loader, val_loader=loader
    )
    log, (soft, hard) = tmp_path / "log.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    write_line(tmp_path, "train", 1, 1, {"loss": 0.5})
    before = log.read_bytes()
    try:
        for room in (10, 0):  # half a line, none
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + room, hard))
            write_line(tmp_path, "train", 1, 3 if room == 0 else 2, {"loss": 0.5})
            assert log.read_bytes() == before
        BadImageHook().before_training(trainer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    write_line(tmp_path, "val", 1, 4, {"top1": 1.0})
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["iter"] for line in lines] == [1, 2, 3, 4]
    assert caplog.text.count("cannot be written now: ") == 6  # of all that wait
    listed = (tmp_path / "bad_images.txt").read_bytes().splitlines()
    assert listed == [
        split + b"\t" + b"a" * 200 + b"\xfe.png\tempty" for split in (b"train", b"val")
    ]


def test_a_disk_that_is_out_of_reach_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for update, number in enumerate((errno.ENOTCONN, errno.ESTALE), 1):
        refused = OSError(number, os.strerror(number))
        with monkeypatch.context() as patch:
            patch.setattr("builtins.open", Mock(side_effect=refused))
            write_line(tmp_path, "train", 1, update, {"loss": 0.5})
    with pytest.raises(FileNotFoundError):  # of a folder that is gone
        write_line(tmp_path / "gone", "train", 1, 4, {"loss": 0.5})
    ending: Any = SimpleNamespace(work_dir=tmp_path)
    LogHook().close(ending)  # no line comes later
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["iter"] for line in lines] == [1, 2]
    assert "cannot be written now: Transport endpoint is not connected" in caplog.text


def test_best_is_named_after_a_kill_in_between(settings: dict[str, Any], begun: Path) -> None:
    """Killed after a best epoch was written, and before it was named."""
    for name in ("best.pth", "last.pth", "results.json"):
        (begun / name).unlink()
    train(config_from_mapping(changed(settings, epochs=1)), begun, resume=True)
    best = load_checkpoint(begun / "best.pth")
    assert best["meta"]["epoch"] == json.loads((begun / "results.json").read_text())["epoch"] == 1


def test_minutes(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["checkpoint"] = {"minutes": 1e-9, "keep": 99}
    train(config_from_mapping(settings), tmp_path)
    names = {path.name for path in checkpoints(tmp_path)}
    assert {f"epoch_0_update_{i}.pth" for i in (1, 2, 3)} <= names


def test_a_score_that_never_rises(settings: dict[str, Any], tmp_path: Path) -> None:
    """Zero is one, the first of equal ones is the best, the last epoch is evaluated. The average
    begins after two updates, here an epoch each."""
    settings |= {"epochs": 3, "eval_interval": 2, "total_batch_size": 64, "batch_size": 64}
    settings["ema"] = {"decay": 0.5}
    process = Process(0, 1, torch.device("cpu"))
    built = trainer_of(config_from_mapping(settings), tmp_path, process)
    built.task = replace(built.task, evaluate=lambda _: {"top1": 0.0})
    built.run()
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["top1"], results["epoch"]) == (0, 2)
    lines = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert [line["epoch"] for line in lines if line["mode"] == "val"] == [2, 3]
    states = [load_checkpoint(tmp_path / f"epoch_{epoch}.pth") for epoch in (2, 3)]
    apart = [bool(differences(each["ema_state_dict"], each["state_dict"])) for each in states]
    assert apart == [False, True]


@pytest.mark.parametrize("epochs", [1, 2])
def test_an_evaluation_that_fails_loses_no_epoch(
    settings: dict[str, Any], tmp_path: Path, epochs: int
) -> None:
    """A metric's mistake shows after the first epoch: it is evaluated when the run goes on."""
    config = config_from_mapping(settings | {"epochs": epochs})
    train(config, tmp_path / "whole")
    built = trainer_of(config, tmp_path / "failed", Process(0, 1, torch.device("cpu")))

    def fail(network: torch.nn.Module) -> dict[str, float | None]:
        raise ZeroDivisionError("of a metric")

    built.task = replace(built.task, evaluate=fail)
    with pytest.raises(ZeroDivisionError):
        built.run()
    assert [path.name for path in checkpoints(tmp_path / "failed")] == ["epoch_1.pth"]
    found = train(config, tmp_path / "failed", resume=True)
    assert compare(tmp_path / "whole", tmp_path / "failed") == []
    assert found == load_checkpoint(tmp_path / "whole/last.pth")["meta"]["metrics"]
    logs = [log_of(tmp_path / name) for name in ("whole", "failed")]
    lines = [[(line["mode"], line["epoch"], line["iter"]) for line in log] for log in logs]
    assert lines[0] == lines[1]
    # Killed after the evaluation's line, before the checkpoint that has its figures.
    state = load_checkpoint(tmp_path / "failed/last.pth")
    state["meta"]["metrics"] = None
    save_checkpoint(state, tmp_path / f"failed/epoch_{epochs}.pth")
    bad = {"split": "val", "path": "a.png", "reason": "empty"}  # which it would find again
    write_line(tmp_path / "failed", "bad_image", epochs, lines[0][-1][2], bad)
    train(config, tmp_path / "failed", resume=True)
    again = [(line["mode"], line["epoch"], line["iter"]) for line in log_of(tmp_path / "failed")]
    assert again == lines[0]


class Asked(Hook):
    def after_update(self, trainer: trainer.Trainer, losses: Any) -> None:
        if trainer.update == 2:
            trainer.signals.name = "SIGTERM"


def test_asked_to_end_in_the_last_update_of_an_epoch(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """The epoch's evaluation is made when the run goes on."""
    settings |= {"epochs": 1, "total_batch_size": 32, "batch_size": 32}
    settings["schedule"] = {"name": "cosine"}
    config, asked = config_from_mapping(settings), tmp_path / "asked"
    built = trainer_of(config, asked, Process(0, 1, torch.device("cpu")))
    built.hooks.append(Asked())
    with pytest.raises(Interrupted, match=r"epoch_0_update_2\.pth"):
        built.run()
    for work_dir in (asked, tmp_path / "whole"):
        train(config, work_dir, resume=True)
    assert compare(tmp_path / "whole", asked) == []


def test_figures_that_are_not_finite_are_json(tmp_path: Path) -> None:
    figures = {"top1": 25.0, "loss": float("nan"), "all": [float("-inf"), {"a": float("inf")}]}
    write_json(figures, tmp_path / "results.json")
    written = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert written == {"top1": 25.0, "loss": None, "all": [None, {"a": None}]}


def on_a_clock(process: Process, settings: dict[str, Any], work_dir: Path) -> None:
    """A run whose clock goes on by a minute whenever it is looked at."""
    minutes = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: 60 * next(minutes), perf_counter=time.perf_counter)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer, "time", clock)
        trainer_of(config_from_mapping(settings), work_dir, process).run()


@pytest.mark.parametrize("processes", [1, 2])
def test_minutes_count_anew_after_a_checkpoint(
    settings: dict[str, Any], tmp_path: Path, processes: int
) -> None:
    """Several processes agree on one, an update later, and write it once."""
    settings |= {"total_batch_size": 4, "batch_size": 2, "epochs": 1}
    settings["checkpoint"] = {"minutes": 3.5, "keep": 99}
    in_processes(on_a_clock, processes, settings, tmp_path)
    found = [int(path.stem.split("_")[-1]) for path in checkpoints(tmp_path)[:-1]]
    assert found == ([4, 8, 12] if processes == 1 else [5, 10, 15])


def test_training_does_not_wait_for_the_disk(
    settings: dict[str, Any], saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is the state at its update, though training has gone on since."""
    threads: set[str] = set()
    save = save_checkpoint

    def slow(state: Any, path: Path) -> None:
        threads.add(threading.current_thread().name)
        time.sleep(0.3)
        save(state, path)

    monkeypatch.setattr("kw.training.saving.save_checkpoint", slow)
    settings["checkpoint"] = {"updates": 2, "keep": 99}
    train(config_from_mapping(settings), tmp_path)
    assert threads == {"checkpoint"}
    for path in checkpoints(saved):
        one, other = load_checkpoint(path), load_checkpoint(tmp_path / path.name)
        for key, value in one["state_dict"].items():
            assert torch.equal(value, other["state_dict"][key]), (path.name, key)


def test_handlers_that_are_not_pythons(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where Python runs inside of another program: they cannot be put back."""
    put, before = signal.signal, signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(signal, "signal", lambda number, handler: put(number, handler) and None)
    try:
        with Signals().watched():
            pass
    finally:
        put(signal.SIGTERM, before)
        put(signal.SIGINT, signal.default_int_handler)
        put(signal.SIGHUP, signal.SIG_DFL)


def test_nohup_keeps_a_run_when_its_terminal_is_closed() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signals = Signals()
        with signals.watched():
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
        assert signals.name == "SIGTERM"
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", breadth([signal.SIGTERM, signal.SIGINT], [signal.SIGTERM]))
def test_asked_to_end(settings: dict[str, Any], tmp_path: Path, number: signal.Signals) -> None:
    """The update under way is finished and saved; resumed, nothing is lost or done twice."""
    settings["epochs"] = 500
    before = signal.getsignal(number)

    def send() -> None:
        while not (tmp_path / "parts/log.jsonl").exists():  # it is trained by then
            time.sleep(0.01)
        time.sleep(0.1)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(Interrupted, match=number.name) as caught:
        train(config_from_mapping(settings), tmp_path / "parts", resume=True)
    assert signal.getsignal(number) is before
    meta = load_checkpoint(caught.value.checkpoint)["meta"]
    assert meta["iter"] > 0
    settings["epochs"] = meta["epoch"] + 2
    train(config_from_mapping(settings), tmp_path / "parts", resume=True)
    lines = [json.loads(x) for x in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    updates = [line["iter"] for line in lines if line["mode"] == "train"]
    assert updates == list(range(1, 4 * settings["epochs"] + 1))


@pytest.mark.parametrize(
    "number",
    breadth([signal.SIGTERM, signal.SIGINT, signal.SIGHUP], [signal.SIGINT, signal.SIGHUP]),
)
def test_the_exit_status_says_so(
    settings: dict[str, Any], tmp_path: Path, number: signal.Signals
) -> None:
    """As Ctrl-C and a closed terminal do, and torchrun when it is told to end: all processes get
    the signal."""
    settings["epochs"] = 500
    settings["data"]["workers"] = 1
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "tools/train.py", str(tmp_path / "config.yaml")]
    run = Forked(
        [*command, "--work-dir", str(tmp_path / "run")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    log = tmp_path / "run" / "log.jsonl"
    while not log.exists() or not log.read_text():
        assert run.poll() is None
        time.sleep(0.1)
    os.killpg(run.pid, number)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == EXIT_INTERRUPTED
    assert f"{number.name}: saved" in errors
    assert "Traceback" not in errors


def test_a_run_of_an_earlier_version_goes_on(settings: dict[str, Any], tmp_path: Path) -> None:
    """Which kept warehouses apart from layers: other names, and another order of parameters."""
    settings["epochs"] = 3
    settings["ema"] = {"decay": 0.5}
    settings["optimizer"] = {"name": "adamw", "lr": 0.002}
    whole, earlier = tmp_path / "whole", tmp_path / "earlier"
    train(config_from_mapping({**settings, "epochs": 2}), whole)
    network = build_network(config_from_mapping(settings).model)
    groups = build_optimizer(
        network, config_from_mapping(settings).optimizer, torch.device("cpu")
    ).param_groups
    place = {id(p): i for i, p in enumerate(earlier_order(network))}
    earlier.mkdir()
    checkpoint = load_checkpoint(newest_whole(whole, print))
    for key in ("state_dict", "ema_state_dict"):
        checkpoint[key] = as_earlier(network, checkpoint[key])
    state, numbers = checkpoint["optimizer"]["optimizer"], iter(range(10**6))
    values = dict(state["state"])
    for own, saved in zip(groups, state["param_groups"], strict=True):
        pairs = sorted(
            zip(own["params"], saved["params"], strict=True), key=lambda pair: place[id(pair[0])]
        )
        saved["params"] = [next(numbers) for _ in pairs]
        state["state"] |= {
            n: values[old] for n, (_, old) in zip(saved["params"], pairs, strict=True)
        }
    save_checkpoint(checkpoint, earlier / "epoch_2.pth")
    train(config_from_mapping(settings), whole, resume=True)
    train(config_from_mapping(settings), earlier, resume=earlier / "epoch_2.pth")
    last = [load_checkpoint(folder / "last.pth") for folder in (whole, earlier)]
    for key in ("state_dict", "ema_state_dict", "optimizer"):
        assert differences(last[0][key], last[1][key], key) == []
