"""The engine: a run from configuration to results, and what must not change it."""

from __future__ import annotations

import copy
import json
import math
import shutil
from contextlib import nullcontext
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from breadth import breadth
from conftest import settings_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import kw
from kw.config import ConfigError, config_from_mapping
from kw.data import DataError
from kw.peers import DyConv2d
from kw.training import CheckpointError, build_trainer, evaluate_checkpoint, load_checkpoint, train
from kw.training.distributed import Process, find_process
from kw.training.optim import build_optimizer
from kw.training.schedule import Schedule
from kw.training.trainer import Trainer, Updater

CPU = Process(0, 1, torch.device("cpu"))
# Two dynamic layers, where each takes a compiler a second.
FIRST = {"match": r"layer1\..*conv\d", "warehouse": "first"}
FEW = {"plan": {"rules": [FIRST]}, "norm": "layer", "start": "paper"}


def changed(settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy of the settings with dotted keys replaced (``data__mixup=0.8``)."""
    settings = copy.deepcopy(settings)
    for key, value in changes.items():
        *path, last = key.split("__")
        table = settings
        for name in path:
            table = table.setdefault(name, {})
        table[last] = value
    return settings


def log_of(work_dir: Path, mode: str, key: str) -> list[float]:
    lines = [json.loads(line) for line in (work_dir / "log.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if line["mode"] == mode]


def run(settings: dict[str, Any], work_dir: Path, **kwargs: Any) -> dict[str, float]:
    return train(config_from_mapping(settings), work_dir, **kwargs)


def assert_same_state(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different


@pytest.fixture(scope="module")
def trained(
    images: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, float]]:
    """The work directory of a run with an average, and its metrics; tests only read it."""
    work_dir = tmp_path_factory.mktemp("trained")
    return work_dir, run(changed(settings_of(images), ema={"decay": 0.5}), work_dir)


def test_a_run_leaves_what_is_promised(trained: Any) -> None:
    tmp_path, metrics = trained
    assert metrics["images"] == metrics["ema_images"] == 19
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.yaml", "log.jsonl", "tensorboard", "best.pth", "results.json"} <= names
    assert {"epoch_1.pth", "epoch_2.pth", "last.pth"} <= names
    assert not [name for name in names if name.endswith(".partial")]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = {"train/" + k for k in ("loss", "lr", "temperature", "images_per_second", "data_time")}
    tags |= {"val/" + k for k in ("top1", "top5", "loss", "ema_top1")}
    assert tags <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 9))

    assert len(log_of(tmp_path, "train", "loss")) == 8
    assert log_of(tmp_path, "train", "temperature") == [1, 0.75, 0.5, 0.25, 0, 0, 0, 0]
    assert log_of(tmp_path, "val", "top1")[-1] == metrics["top1"]

    results = json.loads((tmp_path / "results.json").read_text())
    assert results["weights"] == "ema"
    assert results["top1"] == max(log_of(tmp_path, "val", "ema_top1"))
    model = kw.build_model(tmp_path / "config.yaml")
    assert results["params"] == sum(p.numel() for p in model.parameters())
    checkpoint = torch.load(tmp_path / "epoch_2.pth", weights_only=True)
    model.load_state_dict(checkpoint["state_dict"])
    assert checkpoint["meta"]["classes"] == ["bird", "cat", "dog", "fish"]


def test_evaluating_the_checkpoint_repeats_the_run(settings: dict[str, Any], trained: Any) -> None:
    work_dir, metrics = trained
    config = config_from_mapping(changed(settings, eval_batch_size=7))
    results = evaluate_checkpoint(config, work_dir / "epoch_2.pth")
    assert results["images"] == 19
    assert results["epoch"] == 2
    assert results["top1"] == metrics["ema_top1"]
    assert results["model_top1"] == metrics["top1"]
    assert results["model_loss"] == pytest.approx(metrics["loss"], rel=1e-5)


def test_it_learns(settings: dict[str, Any], tmp_path: Path) -> None:
    # With BatchNorm: normalising each image by itself would remove the grey that tells the class.
    batch_norm = {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]}
    settings = changed(settings, epochs=16, optimizer__lr=0.01, model__timm_args=batch_norm)
    settings["eval_interval"] = 16
    metrics = run(settings, tmp_path)
    assert metrics["top1"] > 90


@pytest.mark.parametrize("batch_size", breadth([8, 4], [4]))
def test_accumulation_does_not_change_the_recipe(
    settings: dict[str, Any], tmp_path: Path, trained: Any, batch_size: int
) -> None:
    """The same images an update in smaller micro-batches: equal up to summation order."""
    folders = trained[0], tmp_path
    run(changed(settings, batch_size=batch_size), tmp_path)
    for key in ("loss", "lr", "temperature"):
        whole, parts = (log_of(folder, "train", key) for folder in folders)
        assert len(whole) == 8
        assert parts == pytest.approx(whole, rel=1e-3)
    whole, parts = (log_of(folder, "val", "loss") for folder in folders)
    assert parts == pytest.approx(whole, rel=1e-3)


def test_resuming_is_exact(settings: dict[str, Any], tmp_path: Path) -> None:
    """Drop path, mixing, erasing and an average: from the second epoch on as without a stop."""
    settings = changed(
        settings,
        epochs=4,
        ema={"decay": 0.9},
        model__drop_path_rate=0.2,
        data__mixup=0.8,
        data__cutmix=1.0,
        data__random_erasing={"probability": 0.5},
        data__workers=2,
        checkpoint={"keep": 4},
    )
    run(settings, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for epoch in (3, 4):
        (tmp_path / "parts" / f"epoch_{epoch}.pth").unlink()
    run(settings, tmp_path / "parts", resume=True)
    whole, parts = (load_checkpoint(tmp_path / d / "epoch_4.pth") for d in ("whole", "parts"))
    assert_same_state(whole["state_dict"], parts["state_dict"])
    assert_same_state(whole["ema_state_dict"], parts["ema_state_dict"])
    for key in ("loss", "lr", "temperature"):
        assert log_of(tmp_path / "whole", "train", key) == log_of(tmp_path / "parts", "train", key)


def test_going_back_to_an_earlier_epoch_keeps_later_checkpoints(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = changed(settings, epochs=3, total_batch_size=32, checkpoint={"keep": 2})
    kept = ["epoch_2.pth", "epoch_3.pth"]
    run(settings, tmp_path)
    assert sorted(p.name for p in tmp_path.glob("epoch_*")) == kept
    run(settings, tmp_path, resume=tmp_path / "epoch_2.pth")
    assert sorted(p.name for p in tmp_path.glob("epoch_*")) == kept


def test_resuming_with_other_updates_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    # Without a checkpoint a run that is to be resumed starts.
    assert run(changed(settings, epochs=1), tmp_path, resume=True)["images"] == 19
    with pytest.raises(ConfigError, match=r"holds a run already \(epoch_1.pth\).*--resume"):
        run(settings, tmp_path)
    with pytest.raises(CheckpointError, match=r"4 updates in 1 epochs.*makes 8 an epoch"):
        run(changed(settings, total_batch_size=8, batch_size=8), tmp_path, resume=True)
    # Half as many updates: its first epoch would end where the second of this run does.
    with pytest.raises(CheckpointError, match=r"4 updates in 1 epochs, 4 an epoch.*makes 2 an"):
        run(changed(settings, total_batch_size=32, batch_size=32), tmp_path, resume=True)


def test_gradients_are_reduced_once_an_update(tmp_path: Path) -> None:
    """Three micro-batches give the gradient of the whole batch, reduced in the last of them."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    try:
        network = nn.Linear(4, 1)
        model = DistributedDataParallel(network)
        reductions = []

        def count(state: None, bucket: Any) -> Any:
            reductions.append(micro)
            future: Any = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        count.__annotations__.clear()  # torch compares them with types, not with their names
        model.register_comm_hook(None, count)
        updater = Updater(torch.optim.SGD(network.parameters(), lr=0.1), accumulation=3)
        images = torch.randn(12, 4)
        before = network.weight.detach().clone()
        for micro in range(3):
            with updater.forward(model):
                loss = model(images[4 * micro : 4 * micro + 4]).mean()
            updater.backward(loss)
        updater.step()
        assert reductions == [2]
        assert torch.allclose(network.weight, before - 0.1 * images.mean(0), atol=1e-6)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"channels_last": True},
        {"compile": True, "ema": {"decay": 0.9}, "epochs": 2, "model__kernel_warehouse": FEW},
        {"optimizer": {"name": "sgd", "lr": 0.01, "nesterov": True, "clip_grad": 1.0}},
        {"model__kernel_warehouse": None, "temperature_epochs": 0, "label_smoothing": 0.1},
        {"model__timm_args": {"channels": [8, 8, 16, 16]}, "ema": {"decay": 0.9}},
        {
            "schedule": {"name": "step", "milestones": [0.5]},
            "data__random_erasing": {},
            "data__mixup": 0.8,
            "data__auto_augment": "rand-m9-mstd0.5-inc1",
        },
    ],
    ids=lambda changes: "-".join(changes),
)
def test_every_option_trains(
    settings: dict[str, Any],
    tmp_path: Path,
    changes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What the engine does around torch.compile is tested here, not minutes of code generation.
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(compiled, backend="eager"))
    metrics = run(changed(settings, **{"epochs": 1, **changes}), tmp_path)
    assert metrics["images"] == 19
    assert all(math.isfinite(loss) for loss in log_of(tmp_path, "train", "loss"))
    if "optimizer" in changes:
        assert all(norm > 0 for norm in log_of(tmp_path, "train", "grad_norm"))


class NoReadback(TorchDispatchMode):
    """Fails on what makes the host wait for the device, or copies a host constant to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        assert "_local_scalar_dense" not in name, f"{name}: the host reads a tensor"
        assert "nonzero" not in name, f"{name}: its shape is known to the device only"
        return func(*args, **(kwargs or {}))


def test_an_update_never_waits_for_the_device(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = changed(
        settings,
        epochs=1,
        log_interval=100,
        ema={"decay": 0.9},
        data__mixup=0.8,
        data__random_erasing={"probability": 1.0},
        optimizer__clip_grad=1.0,
        precision="bf16",
        data__workers=1,  # loading reads tensors, in a process of its own
    )
    trainer = build_trainer(config_from_mapping(settings), tmp_path, CPU)
    update = Trainer.run_update
    updates = []
    # On CPU the optimizer keeps its step count in a tensor that it reads; on CUDA it is fused.
    monkeypatch.setattr(trainer.optimizer, "step", lambda: None)

    def watched(self: Any, index: int, batches: Any) -> Any:
        updates.append(index)
        with NoReadback():
            return update(self, index, batches)

    def unread(after_update: Any) -> Any:
        def call(self: Any, losses: Any) -> None:
            # The line of an epoch's end reads the loss.
            with nullcontext() if self.update == self.updates_per_epoch else NoReadback():
                after_update(self, losses)

        return call

    monkeypatch.setattr(Trainer, "run_update", watched)
    for hook in trainer.hooks:
        monkeypatch.setattr(hook, "after_update", unread(hook.after_update))
    trainer.train()
    assert updates == [0, 1, 2, 3]


def test_schedule(settings: dict[str, Any]) -> None:
    changes = {"epochs": 10, "temperature_epochs": 4}
    cosine = changed(settings, schedule={"warmup_epochs": 2, "final_lr": 1e-6}, **changes)
    schedule = Schedule(config_from_mapping(cosine), updates_per_epoch=5)
    assert schedule.lr(0) == pytest.approx(0.002 / 10)
    assert schedule.lr(9) == schedule.lr(10) == pytest.approx(0.002)
    assert schedule.lr(30) == pytest.approx(1e-6 + (0.002 - 1e-6) / 2)
    assert schedule.lr(50) == pytest.approx(1e-6)
    assert [schedule.temperature(u) for u in (0, 5, 10, 20, 49)] == [1, 0.75, 0.5, 0, 0]
    steps = changed(settings, schedule={"name": "step", "milestones": [3, 6, 9]}, **changes)
    schedule = Schedule(config_from_mapping(steps), updates_per_epoch=5)
    rates = [schedule.lr(u) for u in (0, 14, 15, 30, 45)]
    assert rates == pytest.approx([2e-3, 2e-3, 2e-4, 2e-5, 2e-6])
    # A number of updates, of a small set's run at most a tenth; epochs where they say more.
    for epochs, per_epoch, expected in (
        (0.0, 7329, 500),
        (0.0, 20, 20),
        (3.0, 20, 60),
        (4.35, 100, 435),
    ):
        warm = {"warmup_epochs": epochs, "warmup_updates": 500}
        config = config_from_mapping(changed(settings, schedule=warm, **changes))
        schedule = Schedule(config, updates_per_epoch=per_epoch)
        assert schedule.warmup_updates == expected
        assert schedule.lr(expected - 1) == schedule.lr(expected) == pytest.approx(2e-3)
        assert schedule.lr(0) == pytest.approx(2e-3 / expected)


def test_decay_spares_vectors_and_biases(settings: dict[str, Any]) -> None:
    config = config_from_mapping(settings)
    network = kw.build_model(settings)
    decayed, exempt = build_optimizer(network, config.optimizer, CPU.device).param_groups
    names = {id(p): name for name, p in network.named_parameters()}
    assert decayed["weight_decay"] == 0.05
    assert exempt["weight_decay"] == 0
    assert len(decayed["params"]) + len(exempt["params"]) == len(names)
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert {"layer1.0.conv1.warehouse.weight", "fc.weight"} <= {
        names[id(p)] for p in decayed["params"]
    }
    assert {"fc.bias", "bn1.weight"} <= {names[id(p)] for p in exempt["params"]}
    norms = replace(config.optimizer, exempt_from_decay="norm")
    decayed, exempt = build_optimizer(network, norms, CPU.device).param_groups
    assert {"bn1.weight", "bn1.bias"} <= {names[id(p)] for p in exempt["params"]}
    assert "fc.bias" in {names[id(p)] for p in decayed["params"]}
    layer = DyConv2d(4, 8, 3)  # with a bias for each kernel
    assert layer.bias is not None
    *_, exempt = build_optimizer(nn.Sequential(layer), config.optimizer, CPU.device).param_groups
    assert layer.bias.ndim == 2
    assert id(layer.bias) in map(id, exempt["params"])


def test_mistakes_are_told(settings: dict[str, Any], tmp_path: Path) -> None:
    three, config = Process(0, 3, CPU.device), config_from_mapping(changed(settings, batch_size=8))
    with pytest.raises(ConfigError, match="total_batch_size 16"):
        build_trainer(config, tmp_path, three)
    with pytest.raises(DataError, match="train"):
        run(changed(settings, data__root=str(tmp_path / "nowhere")), tmp_path)
    with pytest.raises(DataError, match="num_classes"):
        run(changed(settings, model__num_classes=10), tmp_path)
    with pytest.raises(ConfigError, match=r"kernel_warehouse.*resnet18"):
        kw.build_model(changed(settings, model__kernel_warehouse={"plan": "resnet19"}))
    with pytest.raises(ConfigError, match="torchrun"):
        find_process("pytorch")
    with pytest.raises(CheckpointError, match="no such file"):
        run(settings, tmp_path, resume=tmp_path / "none.pth")


def test_a_checkpoint_of_another_model_never_loads_partly(
    settings: dict[str, Any], tmp_path: Path, trained: Any
) -> None:
    best = trained[0] / "best.pth"
    other = changed(settings, model__kernel_warehouse__cell_num_ratio=2)
    with pytest.raises(CheckpointError, match=r"fc2\.weight is \[7200, 16\]"):
        evaluate_checkpoint(config_from_mapping(other), best)
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(best.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        evaluate_checkpoint(config_from_mapping(settings), damaged)


def test_a_checkpoint_cannot_run_code(settings: dict[str, Any], tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"state_dict": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()


def test_a_run_says_what_it_trains_and_where_it_is(
    settings: dict[str, Any], one_epoch: tuple[Path, Any]
) -> None:
    folder, _ = one_epoch
    (log,) = folder.glob("*/*.log")
    text = log.read_text()
    images = len(list((Path(settings["data"]["root"]) / "train").glob("*/*.png")))
    parameters = sum(p.numel() for p in kw.build_model(settings).parameters())
    assert f"data: {images:,} images to train on" in text
    assert f"network: {parameters:,} parameters; fp32 on cpu" in text
    assert f"writes into {folder}" in text
    best = json.loads((folder / "results.json").read_text())["top1"]
    assert f"done, best top1 {best:.3f}; in {folder}: best.pth, last.pth" in text
