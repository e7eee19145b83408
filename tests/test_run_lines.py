"""What a run says of itself: rates after a resume, nothing of what is zero; what it lists once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_engine import CPU, changed, log_of, run
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from kw.config import config_from_mapping
from kw.data import listing
from kw.registry import DATASETS
from kw.training import build_trainer, trainer
from kw.training.hooks import Hook, progress
from kw.training.trainer import Updater


def test_the_rate_after_a_resume_counts_the_updates_since(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = changed(settings, epochs=1, log_interval=4, checkpoint__updates=3)
    run(settings, tmp_path)
    run(settings, tmp_path, resume=tmp_path / "epoch_0_update_3.pth")
    rates, seconds = (log_of(tmp_path, "train", key) for key in ("images_per_second", "seconds"))
    assert len(rates) == 1
    assert rates[0] * seconds[0] == pytest.approx(16)  # one update of four


def test_lines_hold_what_is_not_zero(settings: dict[str, Any], tmp_path: Path) -> None:
    run(changed(settings, log_interval=4), tmp_path)
    (text,) = tmp_path.glob("*/*.log")
    first, second = (line for line in text.read_text().splitlines() if "images_per_second" in line)
    assert " temperature " in first
    assert " temperature " not in second
    assert "skipped" not in first + second
    assert log_of(tmp_path, "train", "skipped") == log_of(tmp_path, "train", "temperature")[1:] * 2


class Broken(Hook):
    def after_update(self, trainer: Any, losses: Any) -> None:
        raise RuntimeError("broken")


def test_an_error_closes_the_bar_and_the_board(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress.sys, "stderr", SimpleNamespace(isatty=lambda: True))
    calls: Counter[str] = Counter()
    bar = SimpleNamespace(
        update=lambda: None,
        set_postfix_str=lambda text: None,
        close=lambda: calls.update(["bar"]),
    )
    monkeypatch.setattr(progress, "tqdm", lambda **options: bar)
    broken = build_trainer(config_from_mapping(settings), tmp_path, CPU)
    broken.hooks.append(Broken())
    monkeypatch.setattr(SummaryWriter, "close", lambda _: calls.update(["board"]))
    with pytest.raises(RuntimeError, match="broken"):
        broken.run()
    assert calls == {"bar": 1, "board": 1}


def test_a_model_is_searched_once_for_its_sharded_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[nn.Module] = []
    monkeypatch.setattr(trainer, "sharded_modules", lambda model: searched.append(model) or [])
    model = nn.Linear(2, 1)
    updater = Updater(torch.optim.SGD(model.parameters(), 0.1), accumulation=2)
    for _ in range(3):
        for _ in range(2):
            with updater.forward(model):
                loss = model(torch.ones(1, 2)).sum()
            updater.backward(loss)
        updater.step()
    assert searched == [model]


@pytest.mark.parametrize("kind", ["folder", "mine"])
def test_each_split_is_listed_once(
    kind: str,
    settings: dict[str, Any],
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listed = []

    def counting(root: Path, split: str) -> listing.Listing:
        listed.append(split)
        return listing.list_folders(root, split)

    monkeypatch.setitem(DATASETS.entries, kind, counting)
    built = build_trainer(config_from_mapping(changed(settings, data__dataset=kind)), tmp_path, CPU)
    assert listed == ["train", "val"]
    assert built.task.classes == ["bird", "cat", "dog", "fish"]
    assert built.train_loader.dataset.path(0) == Path(
        settings["data"]["root"], "train", "bird", "0.png"
    )


WRITES = """
import sys
from pathlib import Path
from types import SimpleNamespace as Some
import torch
from kw.training.distributed import Process
from kw.training.logs import logger, open_log
from kw.training.trainer import Trainer

process, folder = Process(0, 1, torch.device("cpu")), Path(sys.argv[1])
task = Some(config_name="config.yaml", config_text="name: \\u0142ania\\n")
run = Some(task=task, process=process, work_dir=folder, is_finished=False, resume_from=None)
Trainer.load(run)
open_log(folder, process)
logger.info("class \\u0142ania")
"""


@pytest.mark.slow  # an interpreter of its own, whose locale is another
def test_files_are_utf8_wherever_they_are_written(tmp_path: Path) -> None:
    """They are read as UTF-8, on this machine or another one."""
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [sys.executable, "-c", WRITES, str(tmp_path)]
    done = subprocess.run(words, env={**os.environ, **locale}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "config.yaml").read_text("utf-8") == "name: łania\n"
    (log,) = tmp_path.glob("*/*.log")
    assert "class łania\n" in log.read_text("utf-8")
