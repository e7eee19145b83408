"""One network on several processes: when gradients are reduced, what is sharded, and that neither
changes what is trained."""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from breadth import breadth
from kills import compare, differences, free_port, kill, log_of, start
from kills import settings as killed_settings
from networks import images, small
from processes import in_processes
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

import kw
from kw.config import ConfigError, config_from_mapping
from kw.data import DataError
from kw.models import ImageClassifier
from kw.training import load_checkpoint, train
from kw.training.average import local
from kw.training.distributed import Process, from_all, process_group
from kw.training.parallel import (
    backward_order,
    release,
    shard,
    sharded_modules,
    wrap_ddp,
)
from kw.training.trainer import Updater

MIB = 2**20
MODELS = [
    ("kw_resnet18_4x", 64),
    ("kw_resnet50_1x", 64),
    ("kw_mobilenetv2_050_1x", 64),
    ("kw_convnext_tiny_1x", 64),
    ("kw_deit_tiny_1x", 224),
    ("resnet18", 64),
]


def buckets(order: list[nn.Parameter], mib: int) -> list[list[nn.Parameter]]:
    """DDP's rule: a bucket is closed once it holds so much, the first one at 1 MiB."""
    found: list[list[nn.Parameter]] = [[]]
    size, limit = 0, MIB
    for parameter in order:
        found[-1].append(parameter)
        size += parameter.nbytes
        if size >= limit:
            found.append([])
            size, limit = 0, mib * MIB
    return [bucket for bucket in found if bucket]


@pytest.mark.parametrize(("name", "size"), breadth(MODELS, MODELS[:1]))
def test_buckets_are_ready_as_early_as_can_be(name: str, size: int) -> None:
    """As early as if they were filled in the order in which gradients really come."""
    model = timm.create_model(name, num_classes=10)
    came: list[nn.Parameter] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(came.append)
    model(torch.randn(2, 3, size, size)).sum().backward()
    ours = backward_order(model)
    assert len(ours) == len(came)
    assert set(ours) == set(came)
    ready = {parameter: place for place, parameter in enumerate(came)}

    def times(order: list[nn.Parameter], mib: int) -> list[int]:
        return [max(ready[p] for p in bucket) for bucket in buckets(order, mib)]

    for mib in (1, 25):
        assert times(ours, mib) == times(came, mib)


def build(name: str = "resnet18", **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    narrow = {"channels": (16, 16, 32, 32), "norm_layer": "groupnorm1"}
    model = timm.create_model(name, num_classes=4, **narrow)
    kw.convert(model, "resnet18", norm="layer", start="paper", **settings)
    return model


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return model(images).square().mean()


def check_layout(process: Process) -> None:
    network = build()
    model = ImageClassifier(network, Unchanged())
    expected = [sum(p.nbytes for p in b) for b in buckets(backward_order(model), 1)]
    ddp = wrap_ddp(model, 1)
    assert all(parameter.grad is None for parameter in model.parameters())
    found = []
    for update in range(3):
        images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(update))
        ddp((images, torch.zeros(2, dtype=torch.long)))["loss"].backward()
        # Gradients are views into the buckets.
        gradients = [p.grad for p in backward_order(model)]
        storages = [g.untyped_storage() for g in gradients if g is not None]
        found.append({storage.data_ptr(): storage.nbytes() for storage in storages})
    assert list(found[0].values()) == expected
    assert found[0] == found[1] == found[2]


def test_buckets_are_laid_out_before_the_first_update() -> None:
    in_processes(check_layout, 2)


def check_group(process: Process) -> None:
    for error in (None, ConfigError("no such run")):
        with suppress(ConfigError), process_group("pytorch", 2.0) as again:
            assert [other.rank for other in from_all(again)] == list(range(process.world_size))
            if error is not None:
                raise error
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total == process.world_size
        assert from_all(process.rank) == list(range(process.world_size))


@pytest.mark.parametrize("world", [1, 2])
def test_a_group_of_the_callers_is_left(world: int) -> None:
    """A run within a program that has joined its processes itself."""
    in_processes(check_group, world)


def check_micro_steps(process: Process) -> None:
    model = ImageClassifier(build(), Unchanged())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    updater = Updater(optimizer, accumulation=3)
    ddp = wrap_ddp(model, 1)
    reduced: list[int] = []

    def note(micro_steps, bucket):  # type: ignore[no-untyped-def]  # torch compares annotations
        reduced.append(len(micro_steps))
        return default_hooks.allreduce_hook(None, bucket)

    micro_steps: list[int] = []
    ddp.register_comm_hook(micro_steps, note)
    for step in range(6):
        micro_steps.append(step)
        images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        with updater.forward(ddp):
            losses = ddp((images, torch.zeros(2, dtype=torch.long)))
        updater.backward(losses["loss"])
        if step % 3 == 2:
            updater.step()
            optimizer.zero_grad()
    assert sorted(set(reduced)) == [3, 6]
    assert reduced.count(3) == reduced.count(6) == len(buckets(backward_order(model), 1))


class Unchanged(nn.Module):
    def forward(self, batch: Any, training: bool) -> Any:
        return batch


def test_gradients_are_reduced_once_an_update() -> None:
    in_processes(check_micro_steps, 2)


def check_sharding(process: Process) -> None:
    plain, network = build(cell_num_ratio=4), build(cell_num_ratio=4)
    total = sum(p.numel() for p in plain.parameters())
    shard(network, process)
    own = sum(local(p).numel() for p in network.parameters())
    # Rows are dealt out: what has fewer than the others stays with the first processes.
    assert own < total / process.world_size + 0.05 * total
    cells = {name: p for name, p in network.named_parameters() if name.endswith("warehouse.weight")}
    assert cells
    for name, parameter in cells.items():
        rows = -(-len(parameter) // process.world_size)
        assert len(local(parameter)) <= rows, name

    def gradients() -> dict[str, torch.Tensor]:
        found = {}
        for name, parameter in network.named_parameters():
            assert local(parameter.grad).shape == local(parameter).shape, name
            found[name] = parameter.grad.full_tensor()
        return found

    def mean(seeds: list[int]) -> dict[str, torch.Tensor]:
        plain.zero_grad()
        sum(loss_of(plain, seed) for seed in seeds).backward()
        return {n: p.grad / process.world_size for n, p in plain.named_parameters()}

    def check(seeds: list[int]) -> None:
        expected, found = mean(seeds), gradients()
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            error = (found[name] - value).abs().max() / value.abs().max().clamp_min(1e-6)
            assert error < 1e-4, (name, error)

    rank, world = process.rank, process.world_size
    loss_of(network, rank).backward()
    check(list(range(world)))
    with torch.no_grad():  # an evaluation between gathers cells, and leaves them
        loss_of(network, 0)
        release(network)
    network.zero_grad()
    sharded_modules(network)[0].set_requires_gradient_sync(False)
    kept = loss_of(network, rank)  # its graph stays, as a loss that is logged keeps it
    kept.backward()
    sharded_modules(network)[0].set_requires_gradient_sync(True)
    loss_of(network, world + rank).backward()
    check(list(range(2 * world)))
    network.zero_grad()
    two = loss_of(network, rank), loss_of(network, world + rank)
    for loss in two:
        loss.backward()
    check(list(range(2 * world)))


@pytest.mark.parametrize("world", breadth([2, 3], [2]))
def test_sharded_gradients_are_those_of_the_whole(world: int) -> None:
    in_processes(check_sharding, world)


def run(settings: dict[str, Any], work_dir: Path, world: int) -> dict[str, Any]:
    for process in (processes := start(settings, work_dir, world, free_port())):
        process.join()
    assert [process.exitcode for process in processes] == [0] * world
    return load_checkpoint(work_dir / "last.pth")


def largest_difference(one: Any, other: Any) -> float:
    """Between two states of the same layout, relative to a tensor's largest value."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        return max((largest_difference(one[k], other[k]) for k in one), default=0.0)
    if isinstance(one, list):
        assert len(one) == len(other)
        return max((largest_difference(a, b) for a, b in zip(one, other, strict=True)), default=0.0)
    if isinstance(one, torch.Tensor):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        if not one.is_floating_point() or not one.numel():
            return 0.0
        return float((one - other).abs().max() / one.abs().max().clamp_min(1e-3))
    assert one == other
    return 0.0


def test_sharded_training_is_training(settings: dict[str, Any], tmp_path: Path) -> None:
    """Accumulation, clipping and EMA; checkpoints of one layout, which either can go on from."""
    settings.update(
        optimizer={"name": "sgd", "lr": 0.01, "weight_decay": 1e-4, "clip_grad": 0.5},
        ema={"decay": 0.5},
        total_batch_size=32,
        batch_size=8,
        epochs=1,
    )
    states, logs = {}, {}
    for strategy in ("ddp", "fsdp"):
        settings["distributed"] = {"strategy": strategy}
        states[strategy] = run(settings, tmp_path / strategy, 2)
        logs[strategy] = [x for x in log_of(tmp_path / strategy) if x["mode"] == "train"]
    for key in ("state_dict", "ema_state_dict"):
        assert largest_difference(states["ddp"][key], states["fsdp"][key]) < 1e-4, key
    momenta = [state["optimizer"]["optimizer"]["state"] for state in states.values()]
    assert len(momenta[0]) > 100
    assert largest_difference(*momenta) < 1e-4
    norms = [[line["grad_norm"] for line in log] for log in logs.values()]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    settings["epochs"] = 2
    further = {}
    for strategy, other in (("ddp", "fsdp"), ("fsdp", "ddp")):
        settings["distributed"] = {"strategy": other}
        further[other] = run(settings, tmp_path / strategy, 2)
    assert further["ddp"]["meta"]["iter"] == 4
    weights = [state["state_dict"] for state in further.values()]
    assert largest_difference(*weights) < 1e-4


def test_a_process_without_images_to_evaluate(
    images: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Sharded, its weights are gathered all the same: others' passes need its part of them."""
    for path in (images / "val").glob("[cd]*/0.png"):
        shutil.copytree(images / "train" / path.parent.name, tmp_path / "train" / path.parent.name)
        (tmp_path / "val" / path.parent.name).mkdir(parents=True)
        shutil.copy(path, tmp_path / "val" / path.parent.name)
    settings["model"]["num_classes"] = 2
    settings["data"]["root"] = str(tmp_path)
    settings.update(epochs=1, total_batch_size=12, batch_size=4, ema={"decay": 0.5})
    found = {}
    for strategy in ("ddp", "fsdp"):
        settings["distributed"] = {"strategy": strategy, "timeout_minutes": 0.2}
        run(settings, tmp_path / strategy, 3)
        found[strategy] = load_checkpoint(tmp_path / strategy / "last.pth")["meta"]["metrics"]
    assert found["fsdp"]["images"] == found["fsdp"]["ema_images"] == 2
    assert found["fsdp"] == pytest.approx(found["ddp"], rel=1e-4)


@pytest.mark.parametrize(
    ("world", "strategy"), breadth([(2, "ddp"), (3, "ddp"), (2, "fsdp")], [(2, "ddp")])
)
def test_killed_and_resumed_is_never_interrupted(
    images: Path, tmp_path: Path, world: int, strategy: str
) -> None:
    """With three processes the sum depends on its order, which resuming must not change."""
    config = killed_settings(images)
    total = {2: 16, 3: 12}[world]  # four and five updates an epoch
    config.update(epochs=2, total_batch_size=total, distributed={"strategy": strategy})
    config["checkpoint"]["updates"] = 6
    run(config, tmp_path / "whole", world)
    killed = tmp_path / "killed"
    processes = start(config, killed, world, free_port())
    while not (killed / "epoch_1_update_6.pth").exists():
        assert all(process.is_alive() for process in processes)
        time.sleep(0.01)
    kill(processes)
    run(config, killed, world)
    assert compare(tmp_path / "whole", killed) == []
    state = load_checkpoint(killed / "last.pth")
    first, *others = state["ranks"]
    for own in others:  # other drop paths, and from an epoch's end on the same statistics
        assert differences(own["rng"]["torch"], first["rng"]["torch"])
        assert not differences(own["norms"], first["norms"])
    statistics = [name for name in state["state_dict"] if "running_" in name]
    averages = {name: state["ema_state_dict"][name] for name in statistics}
    assert statistics
    assert not differences(averages, {name: state["state_dict"][name] for name in statistics})


def check_materialised(process: Process) -> None:
    """As torchtitan begins: on the meta device, sharded, given memory, and then its values."""
    for begins in ("keep", "paper"):
        whole = small(start=begins)
        with torch.device("meta"):
            network = small(start=begins)
        shard(network, process)
        network.to_empty(device="cpu")
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.detach().fill_(7)  # what memory may hold
        for module in (*whole.modules(), *network.modules()):
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        values = {name: value.full_tensor() for name, value in network.named_parameters()}
        for name, value in whole.named_parameters():
            assert not (values[name] == 7).any(), name
            if "attention" in name and not name.endswith("weight"):
                # Biases do not depend on chance: those of the kept start choose the own cells.
                torch.testing.assert_close(values[name], value)
            elif name.endswith("warehouse.weight"):
                assert values[name].std().item() == pytest.approx(value.std().item(), rel=0.3)
        whole.load_state_dict(values, strict=False)
        kw.set_temperature(whole, 0)
        torch.testing.assert_close(network.eval()(images()), whole.eval()(images()))
        release(network)


def test_a_sharded_network_gets_its_values() -> None:
    in_processes(check_materialised, 2)


def test_one_process_shards_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["epochs"] = 1
    for strategy in ("ddp", "fsdp"):
        settings["distributed"] = {"strategy": strategy}
        train(config_from_mapping(settings), tmp_path / strategy)
    states = [load_checkpoint(tmp_path / s / "last.pth")["state_dict"] for s in ("ddp", "fsdp")]
    assert largest_difference(*states) == 0
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("key", "value"), [("precision", "fp16"), ("compile", True), ("pictures", {})]
)
def test_what_cannot_be_sharded(
    settings: dict[str, Any], tmp_path: Path, key: str, value: Any
) -> None:
    settings.update({key: value, "distributed": {"strategy": "fsdp"}})
    with pytest.raises(ConfigError, match=f"{key}.*(bf16|choose one|null)"):
        train(config_from_mapping(settings), tmp_path)


def test_processes_with_other_images_do_not_begin(
    images: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    """A copy that lacks an image, which moves all that follow it, or has one in another class."""
    for name in ("less", "moved"):
        shutil.copytree(images, tmp_path / name)
    (tmp_path / "less/train/bird/0.png").unlink()
    moved = tmp_path / "moved/val/cat/2.png"
    moved.rename(moved.parents[1] / "dog/99.png")
    roots = [(images, "less", "1 lists 63 images of train, process 0 lists 64, or other")]
    roots += [(images, "moved", "1 lists 19 images of val, process 0 lists 19, or other labels")]

    def begin(process: Process, *roots: Path, expected: str = "") -> None:
        settings["data"]["root"] = str(roots[process.rank])
        with pytest.raises(DataError, match=expected):
            train(config_from_mapping(settings), tmp_path / "run", launcher="pytorch")

    for first, other, expected in roots:
        in_processes(partial(begin, expected=expected), 2, first, tmp_path / other)
