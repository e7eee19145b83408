"""Parts of a user's own: what docs/extending.md builds, in a run; what is refused."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from breadth import breadth
from doc_pages import ROOT, read_blocks
from PIL import Image
from processes import call

from kw import registry
from kw.config import ConfigError, config_from_mapping, load_config
from kw.config.data_schema import DataConfig
from kw.data import DataError
from kw.data.listing import Listing, list_split
from kw.errors import UserError
from kw.models.losses import bce
from kw.registry import DATASETS, HOOKS, METRICS, OPTIMIZERS, Registry, argument_fault
from kw.training import CheckpointError, build_trainer, load_checkpoint, train
from kw.training.checkpoint import save_checkpoint
from kw.training.distributed import Process
from kw.training.hooks import Hook
from kw.training.parallel import gathered
from kw.training.saving import copied
from kw.training.task import Metrics
from kw.training.trainer import Trainer

ALL = {name: value for name, value in vars(registry).items() if isinstance(value, Registry)}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's files, its data set, and its run in the page's own words."""
    folder = tmp_path_factory.mktemp("own")
    for block in read_blocks(ROOT / "docs/extending.md"):
        if block.mark == "file":
            (folder / block.what).write_text(block.code)
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "data/table").mkdir(parents=True)
    rows = []
    for i in range(48):
        label, file = ("dark", "bright")[i % 2], f"{i}.png"
        Image.new("RGB", (32, 32), (60 + 120 * (i % 2), 2 * i, 90)).save(
            folder / "data/table" / file
        )
        rows.append({"file": file, "label": label, "split": "val" if i >= 32 else "train"})
    with open(folder / "data/table/labels.csv", "w") as file_:
        writer = csv.DictWriter(file_, ["file", "label", "split"])
        writer.writeheader()
        writer.writerows(rows)
    return folder


SMALL = ["data.workers=0", "total_batch_size=8", "batch_size=8", "data.input_size=32"]
SMALL += ["schedule.warmup_epochs=0", "model.timm_args.layers=[1,1,1,1]"]
SMALL.append("model.timm_args.channels=[8,8,16,16]")


def tool(folder: Path, name: str, *words: str, allow: str | None = None) -> Any:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("KW_CUSTOM_IMPORTS", None)
    if allow is not None:
        environment["KW_CUSTOM_IMPORTS"] = allow
    return call(f"tools/{name}", *words, cwd=folder, environment=environment, status=None)


MODULES = "my_method,my_data,my_training"


def test_one_of_each_kind(own: Path) -> None:
    """Train, test and export with parts from outside, and what each of them leaves behind."""
    done = tool(own, "train.py", "mine.yaml", "--cfg-options", *SMALL, allow=MODULES)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("largest weight ") == 2
    run = own / "work_dirs/mine"
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    tested = [line for line in lines if line["mode"] == "val"]
    assert len(tested) == 2
    assert {"top1", "top1_class0", "top1_class1"} <= set(tested[-1])
    mean = (tested[-1]["top1_class0"] + tested[-1]["top1_class1"]) / 2
    assert tested[-1]["top1"] == pytest.approx(mean)  # classes of equal size
    rates = [line["lr"] for line in lines if line["mode"] == "train"]
    assert rates[-1] == pytest.approx(0.001 * (1 - 7 / 8) ** 2)
    checkpoint = load_checkpoint(run / "last.pth")
    assert checkpoint["meta"]["classes"] == ["bright", "dark"]
    assert checkpoint["ranks"][0]["hooks"]["EarlyStopping"]["without"] <= 1
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["custom_imports"] == MODULES.split(",")
    imports = [word for name in MODULES.split(",") for word in ("--import", name)]
    tested_again = tool(
        own, "test.py", "work_dirs/mine/config.yaml", "work_dirs/mine/last.pth", *imports
    )
    assert tested_again.returncode == 0, tested_again.stderr
    assert f"top1         {tested[-1]['top1']:.4f}" in tested_again.stdout
    predicted = tool(own, "predict.py", "work_dirs/mine/last.pth", "data/table/1.png", *imports)
    assert "| data/table/1.png |" in predicted.stdout, predicted.stderr
    exported = tool(
        own, "export.py", "work_dirs/mine/config.yaml", "work_dirs/mine/last.pth", "mine.exported",
        "--import", "my_format", "--batch", "2", "--fixed-size", allow="1",
    )  # fmt: skip
    assert exported.returncode == 0, exported.stderr
    assert "largest difference" in exported.stdout
    assert (own / "mine.exported").is_file()


def test_a_file_alone_runs_nothing(own: Path) -> None:
    (own / "trap.py").write_text("from pathlib import Path\nPath('sprung').touch()\n")
    (own / "trap.yaml").write_text("_base_: configs/demo/resnet18.yaml\ncustom_imports: [trap]\n")
    for allow in (None, "my_data", "trap2"):
        done = tool(own, "train.py", "trap.yaml", allow=allow)
        assert done.returncode == 2
        assert "trap.yaml:2: custom_imports: trap would run code" in done.stderr
        assert "add --import trap, or set KW_CUSTOM_IMPORTS=trap" in done.stderr
    assert not (own / "sprung").exists()
    for words, allow in (([], "trap"), (["--import", "trap"], None)):
        options = ["--cfg-options", "epochs=0", "data.root=nowhere"]
        done = tool(own, "train.py", "trap.yaml", *words, *options, allow=allow)
        assert "would run code" not in done.stderr
        assert (own / "sprung").exists()
        (own / "sprung").unlink()


def test_modules_that_are_not_there(own: Path) -> None:
    for module, expected in (("nowhere.at_all", "PYTHONPATH"), ("trap", "no such attribute")):
        (own / "trap.py").write_text("raise AttributeError('no such attribute')\n")
        done = tool(own, "train.py", "mine.yaml", "--import", module)
        assert done.returncode == 2
        assert expected in done.stderr
        assert "Traceback" not in done.stderr


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"hooks": {"early_stoping": {}}}, "did you mean 'early_stopping'"),
    ({"hooks": {"early_stopping": {"patiens": 1}}}, "no 'patiens' .*did you mean 'patience'"),
    ({"hooks": {"early_stopping": {"patience": "two"}}}, "'patience' to be int, found 'two'"),
    ({"hooks": {"early_stopping": {}}}, "its argument 'patience', which has no default"),
    ({"hooks": {"early_stopping": None}}, "hooks.early_stopping = null: expected a mapping"),
    ({"loss": {"name": "bse"}}, "did you mean 'bce'"),
    ({"loss": {"args": {"gamma": 1}}}, "loss.args = .*for cross_entropy: no 'gamma'"),
    ({"optimizer": {"name": "lam", "lr": 1}}, "optimizer.name = 'lam': .*did you mean 'lamb'"),
    ({"optimizer": {"name": "adahessian", "lr": 1}}, "optimizer 'adahessian' is unknown"),
    ({"optimizer": {"name": "lamb", "lr": 1, "args": {"lr": 1}}}, "no lr among them"),
    ({"optimizer": {"name": "adamw", "lr": 1, "args": {"eps": 1}}}, "no eps among them"),
    ({"optimizer": {"name": "adam", "lr": 1, "args": {"beta": 1}}}, "did you mean 'betas'"),
    ({"optimizer": {"name": "rprop", "lr": 1, "weight_decay": 0.1}}, "0, because rprop has no"),
    ({"schedule": {"name": "cosine", "args": {"power": 1}}}, "for cosine: no 'power'"),
    ({"metrics": {"auc": {}}}, "metric 'auc' is unknown"),
    ({"data": {"transforms": {"blur": {}}}}, "transform 'blur' is unknown"),
    ({"data": {"dataset": "table"}}, "data.dataset = 'table': expected one of 'folder'"),
    ({"custom_imports": "mine"}, "expected a list of names of modules"),
]


@pytest.mark.parametrize(("change", "expected"), WRONG, ids=lambda each: str(each)[:40])
def test_what_is_refused(settings: dict[str, Any], change: dict[str, Any], expected: str) -> None:
    data = {**settings["data"], **change.pop("data", {})}
    with pytest.raises(ConfigError, match=expected):
        config_from_mapping({**settings, "data": data, **change})


@pytest.mark.parametrize("name", ALL)
def test_registries(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = ALL[name]
    list(entries)  # or its modules would register into the copy
    monkeypatch.setattr(entries, "entries", dict(entries.entries))
    assert bool(entries) == (name != "TRANSFORMS")  # of which there is none here
    assert all(each in entries for each in entries)

    @entries.register("mine")
    def mine() -> None:
        pass

    assert entries.find("mine") is mine
    with pytest.raises(ValueError, match="'mine' exists already"):
        entries["mine"] = lambda: None
    with pytest.raises(UserError, match=r"'mina' is unknown; did you mean 'mine'"):
        entries.find("mina")


def test_arguments_are_checked() -> None:
    def entry(given: Any, a: int, b: float = 1.0, *, c: list[int] | None = None) -> None: ...

    good: list[dict[str, Any]] = [
        {"a": 1},
        {"a": 1, "b": 2},
        {"a": 1, "c": [1]},
        {"a": 1, "c": None},
    ]
    assert [argument_fault(entry, args, 1) for args in good] == [None] * len(good)
    bad: list[dict[str, Any]] = [
        {},
        {"a": 1.5},
        {"a": True},
        {"a": 1, "c": ["x"]},
        {"a": 1, "given": 1},
    ]
    assert all(argument_fault(entry, args, 1) for args in bad)


def test_bce_is_one_against_all() -> None:
    logits = torch.randn(4, 3)
    labels = torch.tensor([0, 2, 1, 1])
    expected = F.binary_cross_entropy(logits.sigmoid(), F.one_hot(labels, 3).float())
    torch.testing.assert_close(bce(logits, labels), expected)
    mixed = torch.tensor([[0.7, 0.3, 0.0]] * 4)
    both = F.binary_cross_entropy(logits.sigmoid(), torch.tensor([[1.0, 1.0, 0.0]] * 4))
    torch.testing.assert_close(bce(logits, mixed, threshold=0.2), both)
    torch.testing.assert_close(bce(logits, labels, sum_classes=True), 3 * expected)


@pytest.mark.parametrize(
    "name",
    breadth(["adam", "lamb", "lion", "rmsprop", "adafactor", "nadamw"], ["adafactor"]),
)
def test_other_optimizers(settings: dict[str, Any], tmp_path: Path, name: str) -> None:
    """They train, and a run that goes on ends where one that never stopped does."""
    optimizer = {"name": name, "lr": 0.001, "weight_decay": 0.01}
    config = {**settings, "optimizer": optimizer, "loss": {"name": "bce"}}
    whole = train(config_from_mapping(config), tmp_path / "whole")
    (tmp_path / "parts").mkdir()
    shutil.copy(tmp_path / "whole/epoch_1.pth", tmp_path / "parts")
    parts = train(config_from_mapping(config), tmp_path / "parts", resume=True)
    assert parts == whole


def test_early_stopping(settings: dict[str, Any], tmp_path: Path) -> None:
    """Nothing is learnt at a rate of almost zero: two evaluations after the first."""
    config = {
        **settings, "epochs": 9, "temperature_epochs": 0, "eval_interval": 1,
        "optimizer": {"name": "sgd", "lr": 1e-12}, "schedule": {"final_lr": 1e-13},
        "hooks": {"early_stopping": {"patience": 2, "min_delta": 90.0}},
    }  # fmt: skip
    train(config_from_mapping(config), tmp_path)
    assert load_checkpoint(tmp_path / "last.pth")["meta"]["epoch"] == 3
    train(config_from_mapping(config), tmp_path, resume=True)
    assert load_checkpoint(tmp_path / "last.pth")["meta"]["epoch"] == 3


class Counting(Hook):
    """Counts evaluations; its state is this process's own."""

    def __init__(self) -> None:
        self.count = 0

    def after_evaluation(self, trainer: Trainer, metrics: Metrics) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Figures:
    """Numbers as scikit-learn and torchmetrics give them."""

    def __init__(self, device: Any) -> None: ...

    def update(self, logits: Any, labels: Any) -> None: ...

    def compute(self) -> Any:
        return {"double": np.float64(0.5), "single": np.float32(0.25), "tensor": torch.tensor(2)}


def test_figures_that_are_not_python_s(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a checkpoint runs no code, not even NumPy's (pytorch/pytorch issue 138985)."""
    monkeypatch.setitem(METRICS, "figures", Figures)
    monkeypatch.setitem(HOOKS, "counting", Counting)
    monkeypatch.setattr(Counting, "state_dict", lambda hook: {"count": np.int64(hook.count)})
    settings |= {"metrics": {"figures": {}}, "hooks": {"counting": {}}, "epochs": 1}
    train(config_from_mapping({**settings, "temperature_epochs": 0}), tmp_path)
    checkpoint = load_checkpoint(tmp_path / "last.pth")
    found = {name: checkpoint["meta"]["metrics"][name] for name in ("double", "single", "tensor")}
    assert found == {"double": 0.5, "single": 0.25, "tensor": 2}
    assert checkpoint["ranks"][0]["hooks"]["Counting"] == {"count": 1}
    monkeypatch.setattr(Counting, "state_dict", lambda hook: {"each": [np.zeros(3)]})
    settings = {**settings, "temperature_epochs": 0, "epochs": 2}
    with pytest.raises(CheckpointError, match=r"Counting\['each'\]\[0\] is of type ndarray"):
        train(config_from_mapping(settings), tmp_path, resume=True)


def test_random_numbers_of_an_optimizer_go_on(tmp_path: Path) -> None:
    """timm's Kron keeps the state of Python's generator, which takes tuples alone
    (Lightning-AI/pytorch-lightning issue 9400)."""
    first, second = (OPTIMIZERS.find("kron")([torch.ones(2, 2)]) for _ in range(2))
    first.rng.random()
    torch.save(copied(gathered(first.state_dict(), keep=True)), tmp_path / "state.pth")
    second.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    assert second.rng.random() == first.rng.random()


class Stopping(Hook):
    def after_epoch(self, trainer: Any, metrics: Any) -> None:
        trainer.stops = trainer.epoch == 2


def test_a_run_that_is_stopped_after_an_epoch(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last epoch is tested and kept, though neither was due."""
    monkeypatch.setitem(HOOKS, "stopping", Stopping)
    settings |= {"epochs": 5, "eval_interval": 5, "hooks": {"stopping": {}}}
    settings["checkpoint"] = {"interval": 5}
    figures = train(config_from_mapping(settings), tmp_path)
    kept = load_checkpoint(tmp_path / "epoch_2.pth")["meta"]
    assert (kept["epoch"], kept["metrics"]) == (2, figures)
    assert json.loads((tmp_path / "results.json").read_text())["top1"] == figures["top1"]


def test_hooks_of_another_number_of_processes(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What all processes share goes on; what is lost is named."""
    monkeypatch.setitem(HOOKS, "counting", Counting)
    hooks = {"counting": {}, "early_stopping": {"patience": 9}}
    config = {**settings, "hooks": hooks, "eval_interval": 1, "temperature_epochs": 0}
    train(config_from_mapping({**config, "epochs": 1}), tmp_path)
    checkpoint = load_checkpoint(tmp_path / "epoch_1.pth")
    best = checkpoint["ranks"][0]["hooks"]["EarlyStopping"]["best"]
    checkpoint["ranks"] *= 2
    save_checkpoint(checkpoint, tmp_path / "epoch_1.pth")
    process = Process(0, 1, torch.device("cpu"))
    again = config_from_mapping({**config, "epochs": 2})
    trainer = build_trainer(again, tmp_path, process, resume=True)
    trainer.load()
    states = {type(hook).__name__: hook.state_dict() for hook in trainer.hooks}
    assert states["EarlyStopping"]["best"] == best > 0
    assert states["Counting"]["count"] == 0
    (log,) = [path for path in tmp_path.glob("*/*.log") if "resumed" in path.read_text()]
    assert "; without the state of Counting\n" in log.read_text()


def test_two_hooks_of_one_name(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(HOOKS, "mine", type("LogHook", (Hook,), {}))
    config = config_from_mapping({**settings, "hooks": {"mine": {}}})
    with pytest.raises(ConfigError, match="two classes are called LogHook"):
        train(config, tmp_path)


@pytest.mark.parametrize("figure", ["loss", "ema_recall"])
def test_figures_of_one_name(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: str
) -> None:
    class Twice:
        def __init__(self, device: Any) -> None: ...

        def update(self, logits: Any, labels: Any) -> None: ...

        def compute(self) -> dict[str, float]:
            return {figure: 0.0}

    monkeypatch.setitem(METRICS, "twice", Twice)
    config = config_from_mapping({**settings, "epochs": 1, "temperature_epochs": 0,
                                  "metrics": {"twice": {}}})  # fmt: skip
    with pytest.raises(ConfigError, match=f"another name than '{figure}'"):
        train(config, tmp_path)


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        ([0, 2], ["a", "b"], "label 2: expected a place among 2 classes"),
        ([0, 0.5], ["a", "b"], "label 0.5"),
        ([0], ["a", "b"], "2 files and 1 labels"),
        ([0, 1], ["a", "a"], "its name twice"),
    ],
)
def test_listings_that_do_not_fit(
    labels: Any, classes: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [Path("0.png"), Path("1.png")]
    monkeypatch.setitem(DATASETS, "odd", lambda root, split: Listing(files, labels, classes))
    with pytest.raises(DataError, match=expected):
        list_split(DataConfig("nowhere", dataset="odd"), "train")


def test_the_pages_configurations_are_whole(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own)
    with pytest.raises(ConfigError, match="would run code"):
        load_config("mine.yaml")
