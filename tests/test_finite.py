"""Loss or gradient that is not finite: nothing changes, it is counted, and told where it began."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import free_port
from processes import Forked
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils._python_dispatch import TorchDispatchMode

from kw.config import ConfigError, config_from_mapping
from kw.config.run_schema import OptimizerConfig
from kw.training import NonFiniteError, build_trainer, load_checkpoint
from kw.training.diagnosis import find_origin
from kw.training.distributed import Process
from kw.training.optim import build_optimizer
from kw.training.trainer import Trainer, Updater

CPU = Process(0, 1, torch.device("cpu"))
NAN = float("nan")
ROOT = Path(__file__).parents[1]
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "adamw": lambda p: AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    "not fused": lambda p: SGD(p, lr=0.1, momentum=0.9),
}


class Updates:
    """Updates of a small network with BatchNorm, of two micro-batches each."""

    def __init__(self, optimizer: str = "adamw", clip: float | None = None, fp: str = "fp32"):
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        made = OPTIMIZERS[optimizer](self.network.parameters())
        self.updater = Updater(made, accumulation=2, clip_grad=clip, precision=fp)

    def run(self, seed: int, spoil: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        """``spoil`` makes another loss of the first micro-batch's images and loss."""
        generator = torch.Generator().manual_seed(seed)
        for micro in range(2):
            images = torch.randn(8, 4, generator=generator)
            if spoil is not None and micro == 0:
                images[0, 0] = NAN if spoil is images_of_nan else images[0, 0]
            with self.updater.forward(self.network):
                loss = self.network(images).float().square().mean()
            if spoil is not None and micro == 0:
                loss = spoil(images, loss)
            self.updater.backward(loss)
        self.updater.step()
        self.updater.optimizer.zero_grad()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        state = self.updater.optimizer.state_dict()["state"]
        return copy.deepcopy((self.network.state_dict(), state))


def images_of_nan(images: Tensor, loss: Tensor) -> Tensor:
    return loss


def infinite_loss_of_finite_gradient(images: Tensor, loss: Tensor) -> Tensor:
    return loss + math.inf


class _NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * NAN


def finite_loss_of_nan_gradient(images: Tensor, loss: Tensor) -> Tensor:
    return _NanGradient.apply(loss)


def assert_equal(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    "spoil", [images_of_nan, infinite_loss_of_finite_gradient, finite_loss_of_nan_gradient]
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_skipped_update_changes_nothing(
    spoil: Callable[..., Tensor], optimizer: str, clip: float | None
) -> None:
    """Parameters, momenta, steps and BatchNorm, bit by bit; and what follows is as without it."""
    without, with_it = Updates(optimizer, clip), Updates(optimizer, clip)
    with_it.run(-1, spoil)  # before there are momenta
    for seed in (1, 2):
        without.run(seed)
        with_it.run(seed)
    before = with_it.state()
    with_it.run(-2, spoil)
    assert_equal(with_it.state(), before)
    without.run(3)
    with_it.run(3)
    assert_equal(with_it.state(), without.state())
    assert all(value.isfinite().all() for value in with_it.state()[0].values())
    assert with_it.updater.guard.read() == (2, 0, 2)


def test_momenta_that_are_dampened_begin_with_the_first_gradient() -> None:
    """Also where the first update is skipped: torch's fused SGD would keep what memory held."""
    config = OptimizerConfig(name="sgd", lr=0.1, args={"dampening": 0.5})
    without, with_it, torchs = Updates(), Updates(), Updates()
    for each in (without, with_it):
        each.updater.optimizer = build_optimizer(each.network, config, CPU.device)
    torchs.updater.optimizer = SGD(
        torchs.network.parameters(), lr=0.1, momentum=config.momentum, dampening=0.5
    )
    with_it.run(-1, images_of_nan)
    for seed in (1, 2):
        for each in (without, with_it, torchs):
            each.run(seed)
    assert_equal(with_it.state(), without.state())
    torch.testing.assert_close(without.network.state_dict(), torchs.network.state_dict())
    config.args["fused"] = True
    with pytest.raises(ConfigError, match=r"fused SGD with dampening .* leave out fused"):
        build_optimizer(without.network, config, CPU.device)


def test_updates_are_as_without_the_guard() -> None:
    guarded = Updates("adamw")
    network = copy.deepcopy(guarded.network)
    optimizer = OPTIMIZERS["adamw"](network.parameters())
    for seed in range(3):
        guarded.run(seed)
        generator = torch.Generator().manual_seed(seed)
        optimizer.zero_grad()
        for _ in range(2):
            (network(torch.randn(8, 4, generator=generator)).square().mean() / 2).backward()
        optimizer.step()
    assert_equal(guarded.network.state_dict(), network.state_dict())


def test_loss_scaling_is_no_fault() -> None:
    updates = Updates(fp="fp16")
    guard, scaler = updates.updater.guard, updates.updater.scaler
    updates.run(0)
    before = updates.state()
    scaler._scale.fill_(2.0**100)  # type: ignore[union-attr]
    updates.run(1, lambda _, loss: loss * 2.0**60)  # the loss is finite, scaled it is not
    assert guard.read().total == 0
    assert scaler.get_scale() == 2.0**99
    after = updates.state()
    assert_equal([after[0]["0.weight"], after[1]], [before[0]["0.weight"], before[1]])
    scaler._scale.fill_(256)  # type: ignore[union-attr]
    before = updates.state()
    updates.run(2, infinite_loss_of_finite_gradient)
    assert guard.read().total == 1
    assert_equal(updates.state(), before)
    scaler._scale.fill_(0.5)  # type: ignore[union-attr]
    updates.run(3, finite_loss_of_nan_gradient)
    assert guard.read().total == 2
    assert_equal(updates.state(), before)


class NoReadback(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func), "the host reads a tensor"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fp", ["fp32", "fp16"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_the_guard_never_waits_for_the_device(
    fp: str, clip: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = Updates(clip=clip, fp=fp)
    # On CPU the optimizer reads its step count; on CUDA it does not.
    monkeypatch.setattr(updates.updater.optimizer, "step", lambda: None)
    updates.run(0)
    with NoReadback():
        updates.run(1)
        updates.run(2, infinite_loss_of_finite_gradient)
    assert updates.updater.guard.read().total == 1


def test_counts_go_into_the_checkpoint() -> None:
    updates, others = Updates(), Updates()
    for seed in range(3):
        updates.run(seed, images_of_nan)
    state = updates.updater.state_dict()
    assert state["skipped"] == {"total": 3, "in_a_row": 3, "in_epoch": 3}
    others.updater.load_state_dict(state)
    others.run(9, images_of_nan)
    assert others.updater.guard.read() == (4, 4, 4)
    others.run(10)
    others.updater.guard.begin_epoch()
    assert others.updater.guard.read() == (4, 0, 0)
    del state["skipped"]  # a checkpoint of an earlier version
    Updates().updater.load_state_dict(state)


# --- a run -----------------------------------------------------------------------------------


def spoiled(
    trainer: Trainer, updates: Callable[[int], bool], layer: str, backward: bool
) -> Trainer:
    """Make a layer's output, or its input's gradient, NaN in some updates."""

    def forward(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if not (module.training and updates(trainer.update)):
            return None
        return _NanGradient.apply(output) if backward else output * NAN

    trainer.task.network.get_submodule(layer).register_forward_hook(forward, prepend=True)
    return trainer


def make(settings: dict[str, Any], work_dir: Path, **changes: Any) -> Trainer:
    settings = {**settings, "ema": {"decay": 0.5}, **changes}
    settings["model"] = {
        "name": "resnet18", "num_classes": 4, "timm_args": {"channels": [8, 8, 16, 16]},
    }  # fmt: skip
    settings["temperature_epochs"] = 0
    return build_trainer(config_from_mapping(settings), work_dir, CPU)


def lines_of(work_dir: Path, mode: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (work_dir / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["mode"] == mode]


@pytest.mark.parametrize("backward", [False, True])
def test_a_run_goes_on(
    settings: dict[str, Any], tmp_path: Path, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(settings, tmp_path, batch_size=8)
    spoiled(trainer, lambda update: update in (2, 5), "layer3.0.conv1", backward)
    states: list[dict[str, Tensor]] = []
    update = Trainer.run_update

    def noting(self: Any, index: int, batches: Any) -> Any:
        losses = update(self, index, batches)
        states.append(copy.deepcopy(trainer.task.network.state_dict()))
        return losses

    monkeypatch.setattr(Trainer, "run_update", noting)
    trainer.run()
    assert_equal(states[2], states[1])
    assert not torch.equal(states[3]["conv1.weight"], states[2]["conv1.weight"])
    lines = lines_of(tmp_path, "train")
    assert [line["skipped"] for line in lines] == [0, 0, 1, 0, 0, 1, 0, 0]
    if not backward:
        assert [line["iter"] for line in lines if line["loss"] is None] == [3, 6]
    checkpoint = load_checkpoint(tmp_path / "last.pth")
    assert checkpoint["optimizer"]["skipped"]["total"] == 2
    for key in ("state_dict", "ema_state_dict"):
        assert all(value.isfinite().all() for value in checkpoint[key].values())


def test_lines_mean_over_what_is_finite(settings: dict[str, Any], tmp_path: Path) -> None:
    trainer = make(settings, tmp_path, log_interval=4, epochs=1)
    spoiled(trainer, lambda update: update == 2, "conv1", False).run()
    (line,) = lines_of(tmp_path, "train")
    assert line["skipped"] == 1
    assert 0 < line["loss"] < 10


@pytest.mark.parametrize(
    ("layer", "backward", "origin"),
    [
        ("layer3.0.conv1", False, "layer3.0.conv1 (Conv2d): its output is not finite"),
        ("bn1", False, "bn1 (BatchNorm2d): its output is not finite, of inputs up to"),
        ("layer2.1.conv2", True, "the backward pass of layer2.1.conv2 (Conv2d): the gradient of"),
    ],
)  # fmt: skip
def test_a_run_stops_and_names_the_layer(
    settings: dict[str, Any], tmp_path: Path, layer: str, backward: bool, origin: str
) -> None:
    trainer = make(settings, tmp_path, non_finite={"patience": 3})
    spoiled(trainer, lambda update: update >= 4, layer, backward)
    with pytest.raises(NonFiniteError) as error:
        trainer.run()
    message = str(error.value)
    assert "stopped in epoch 2 at update 7, after 3 skipped updates in a row" in message
    assert f"it began in {origin}" in message, message
    assert f"the last good checkpoint is {tmp_path / 'epoch_1.pth'}" in message
    (line,) = lines_of(tmp_path, "non_finite")
    assert line["iter"] == 7
    assert line["origin"].startswith(origin)
    # What is in memory is what the last good update left.
    kept = load_checkpoint(tmp_path / "epoch_1.pth")["state_dict"]
    assert_equal(dict(trainer.task.network.state_dict()), kept)


def test_a_run_stops_where_every_other_update_fails(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """Never two in a row: the bound on an epoch, and the next bad update's images."""
    trainer = make(
        settings, tmp_path, batch_size=4, total_batch_size=4, log_interval=4,
        non_finite={"patience": 3, "max_fraction": 0.25},
    )  # fmt: skip
    spoiled(trainer, lambda update: update % 2 == 0, "conv1", False)
    with pytest.raises(NonFiniteError, match=r"update 13, after 1 skipped .* and 7 in this epoch"):
        trainer.run()


class Branches(nn.Module):
    """Layers, and what is computed between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 1)
        self.norm = nn.BatchNorm1d(2)
        self.fault = ""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        if self.fault == "between":
            x = x.mul(-1e30).square().sqrt()  # overflows
        return self.second(x)


def with_losses(network: Branches) -> Callable[[Tensor], dict[str, Tensor]]:
    def losses(batch: Tensor) -> dict[str, Tensor]:
        out = network(batch).sum()
        parts = {"loss_a": out * 0, "loss_b": out.log() if network.fault == "loss" else out}
        return {**parts, "loss": parts["loss_a"] + parts["loss_b"]}

    return losses


def test_where_it_began() -> None:
    torch.manual_seed(0)
    network = Branches()
    buffers = copy.deepcopy(network.state_dict())
    good = torch.randn(4, 2)

    def origin(*batches: Tensor) -> str | None:
        return find_origin(with_losses(network), network, batches, nullcontext)

    assert origin(good) is None
    assert origin(good, good * NAN) == "the images: they are not finite after preprocessing"
    network.fault = "between"
    found = origin(good)
    assert found is not None
    assert "between norm (BatchNorm1d) and second (Linear): the input of second" in found
    network.fault = "loss"
    with torch.no_grad():
        network.second.bias.fill_(-100)
    assert origin(good) == "loss_b: every layer's output is finite"
    with torch.no_grad():
        network.second.bias.copy_(buffers["second.bias"])
    assert_equal(network.state_dict(), buffers)
    assert all(p.grad is None for p in network.parameters())
    with torch.no_grad():
        network.first.weight[0, 0] = NAN
    assert origin(good) == "the weights: first.weight is not finite"


# --- several processes -----------------------------------------------------------------------

TWO = """
import atexit, json, os, sys
from pathlib import Path

def threads():  # the last function at exit, registered before any other
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").glob("*")]
    Path(sys.argv[1], f"{os.environ['RANK']}.threads").write_text("".join(names))

atexit.register(threads)
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from kw.config import config_from_mapping
from kw.training import NonFiniteError, build_trainer
from kw.training.distributed import process_group
from kw.training.trainer import Updater

def skip(rank):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    model = DistributedDataParallel(network, broadcast_buffers=False)
    for precision in ("fp32", "fp16"):
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, fused=True)
        updater = Updater(optimizer, accumulation=2, precision=precision)
        for update in range(4):
            before = {k: v.clone() for k, v in network.state_dict().items()}
            for micro in range(2):
                images = torch.randn(8, 4)
                if (update, micro, rank) in ((1, 0, 1), (2, 1, 0)):
                    images[0] = float("nan")
                with updater.forward(model):
                    loss = model(images).float().square().mean()
                updater.backward(loss)
            updater.step()
            optimizer.zero_grad()
            same = all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
            assert same == (update in (1, 2)), (precision, update)
        assert updater.guard.read() == (2, 0, 2), (precision, updater.guard.read())
        weights = [torch.empty(3, 4) for _ in range(2)]
        dist.all_gather(weights, network[0].weight.detach())
        assert torch.equal(*weights)

def stop(process, folder):
    config = config_from_mapping(json.loads((folder / "settings.json").read_text()))
    trainer = build_trainer(config, folder / "run", process)

    def spoil(module, inputs, output):
        spoils = process.rank == 1 and module.training and trainer.update >= 4
        return output * float("nan") if spoils else None

    trainer.task.network.layer2[0].conv2.register_forward_hook(spoil)
    try:
        trainer.run()
    except NonFiniteError as error:
        assert "it began (on process 1) in layer2.0.conv2 (" in str(error), error
        assert "at update 7, after 3 skipped" in str(error), error
    else:
        raise AssertionError("the run went on")

with process_group("pytorch", 2.0) as process:
    skip(process.rank)
    stop(process, Path(sys.argv[1]))
"""


def test_two_processes(settings: dict[str, Any], images: Path, tmp_path: Path) -> None:
    """NaN on one of them skips on both and stops both; both know every bad file.

    They leave no thread of gloo behind, which might abort the interpreter when it shuts down.
    """
    root = shutil.copytree(images, tmp_path / "broken")
    names = ("bird/1.png", "cat/2.png", "dog/3.png", "fish/4.png")
    for name in names:
        (root / "train" / name).write_bytes(b"")
    settings["data"].update(root=str(root), bad_images={"max_fraction": 0.1})
    settings.update(batch_size=8, non_finite={"patience": 3})
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    ranks = [
        Forked(
            [sys.executable, "-c", TWO, str(tmp_path)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    for rank in range(2):
        threads = (tmp_path / f"{rank}.threads").read_text()
        assert bool(threads) == Path("/proc/self/task").exists()
        assert "gloo" not in threads
    told = [line["path"] for line in lines_of(tmp_path / "run", "bad_image")]
    assert sorted(told) == [str(root / "train" / name) for name in names]
