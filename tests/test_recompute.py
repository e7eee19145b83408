"""Blocks that are computed again, and training images that grow with the epochs."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from breadth import breadth
from PIL import Image
from processes import in_processes
from test_engine import CPU, assert_same_state, changed, run
from test_parallel import build, loss_of
from test_recipes import STATIC
from torch import nn

from kw.config import ConfigError, config_from_mapping
from kw.config.data_schema import DataConfig, ProgressiveConfig
from kw.config.schema import KernelWarehouseConfig, ModelConfig
from kw.data.preprocess import training_size
from kw.models import start_network
from kw.models.recompute import recompute_blocks, synchronised
from kw.torch_private import BatchNorm
from kw.training import build_trainer, load_checkpoint
from kw.training.distributed import Process
from kw.training.parallel import gathered, shard, wrap_ddp
from kw.training.precision import autocast
from kw.training.run import build_preprocessor

# --- gradient checkpointing -------------------------------------------------------------------

NARROW: dict[str, dict[str, Any]] = {
    "resnet18": {"channels": [64, 32, 32, 32]},  # its stem has 64 channels as well
    "mobilenetv2_100": {},
    "convnext_tiny": {"dims": [8, 16, 32, 64], "depths": [1, 1, 2, 1]},
    "deit_tiny_patch16_224": {"embed_dim": 24, "img_size": 64},
}


def bytes_kept(network: nn.Module, images: torch.Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, which is run, beside parameters."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = network(images).square().mean()
    loss.backward()
    return sum(size for place, size in kept.items() if place not in own)


@pytest.mark.parametrize(
    ("name", "plan", "precision"),
    breadth(
        product(NARROW, (True, False), ("fp32", "bf16")),
        [*((name, True, "bf16") for name in NARROW), ("resnet18", False, "fp32")],
    ),
)
def test_blocks_computed_again_change_memory_alone(name: str, plan: bool, precision: str) -> None:
    """The same gradients to the bit, drop path drawn again; statistics are taken once."""
    dynamic = {"plan": STATIC[name], "start": "paper"} if plan else None
    settings = {"num_classes": 3, "drop_path_rate": 0.2, "timm_args": NARROW[name]}
    networks = []
    for again in (False, True):
        torch.manual_seed(0)
        config = ModelConfig(name, **settings, gradient_checkpointing=again)
        if dynamic is not None:
            config.kernel_warehouse = KernelWarehouseConfig(**dynamic)
        networks.append(start_network(config).train())
    images = torch.randn(4, 3, 64, 64)
    kept = []
    for network in networks:
        with autocast(precision, "cpu"):
            kept.append([bytes_kept(network, images) for _ in range(2)])
    assert max(kept[1]) < 0.7 * min(kept[0])
    plain, again = networks
    gradients = [{n: p.grad for n, p in network.named_parameters()} for network in networks]
    assert_same_state(*gradients)
    assert_same_state(plain.state_dict(), again.state_dict())
    norms = [v for n, v in again.state_dict().items() if n.endswith("num_batches_tracked")]
    assert all(int(count) == 2 for count in norms)
    assert bool(norms) == any(isinstance(m, BatchNorm) for m in plain.modules())


def check_processes(process: Process, strategy: str) -> None:
    plain, again = build(), build()
    recompute_blocks(again)
    for seed in range(2):
        plain.zero_grad()
        loss_of(plain, 2 * seed + process.rank).backward()
        for parameter in plain.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= process.world_size
        if seed == 0:
            if strategy == "fsdp":
                shard(again, process)
            model = again if strategy == "fsdp" else wrap_ddp(again, 1)
        model.zero_grad()
        loss_of(model, 2 * seed + process.rank).backward()
        for expected, parameter in zip(plain.parameters(), again.parameters(), strict=True):
            assert parameter.grad is not None
            found = gathered(parameter.grad, keep=True)
            torch.testing.assert_close(found, expected.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_blocks_are_computed_again_in_several_processes(strategy: str) -> None:
    in_processes(check_processes, 2, strategy)


def test_what_cannot_be_computed_again(settings: dict[str, Any], tmp_path: Path) -> None:
    settings = changed(settings, model__gradient_checkpointing=True)
    with pytest.raises(ConfigError, match=r"compile: true with model.gradient_checkpointing"):
        build_trainer(config_from_mapping({**settings, "compile": True}), tmp_path, CPU)
    network = ModelConfig("test_vit", gradient_checkpointing=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(timm.models.VisionTransformer, "set_grad_checkpointing")
        with pytest.raises(ConfigError, match=r"gradient_checkpointing: VisionT.*set false"):
            start_network(network)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100"])
def test_synchronised_networks_are_the_same(name: str) -> None:
    """Activations stay, and blocks that are computed again are counted once. Without a process
    group SyncBatchNorm is BatchNorm."""
    networks = []
    for change in (lambda network: network, synchronised):
        torch.manual_seed(0)
        config = ModelConfig(name, 3, timm_args=NARROW[name], gradient_checkpointing=True)
        config.kernel_warehouse = KernelWarehouseConfig(plan=STATIC[name], start="paper")
        networks.append(change(start_network(config)).train())
    plain, changed = networks
    kinds = {type(m) for m in changed.modules() if isinstance(m, BatchNorm)}
    assert all(issubclass(kind, nn.SyncBatchNorm) for kind in kinds)
    images = torch.randn(4, 3, 64, 64)
    for network in networks:
        network(images).square().mean().backward()
    assert_same_state(plain.state_dict(), changed.state_dict())
    gradients = [{n: p.grad for n, p in network.named_parameters()} for network in networks]
    assert_same_state(*gradients)


# --- progressive resolution -------------------------------------------------------------------


def test_sides_grow_to_the_full_one() -> None:
    data = DataConfig(root="", input_size=224)
    assert training_size(data, 0) == 224
    data.progressive = ProgressiveConfig(start=120, epochs=8, multiple=32)
    sides = [training_size(data, epoch) for epoch in range(10)]
    assert sides == [120, 128, 128, 128, 160, 160, 192, 192, 224, 224]


def test_smaller_images_are_pillows(settings: dict[str, Any]) -> None:
    """Averages over the pixels that a smaller one covers, not samples of them."""
    data = {**settings["data"], "progressive": {"start": 12, "epochs": 1, "multiple": 1}}
    config = config_from_mapping({**settings, "data": data, "epochs": 2})
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    batch = {"images": pixels, "labels": torch.zeros(2, dtype=torch.long), "key": (0, 0)}
    preprocess = build_preprocessor(config, torch.device("cpu"))
    images = preprocess(batch, True)[0] * preprocess.std + preprocess.mean
    expected = [
        np.asarray(Image.fromarray(p.permute(1, 2, 0).numpy()).resize((12, 12), Image.BILINEAR))
        for p in pixels
    ]
    found = images.permute(0, 2, 3, 1).numpy()
    assert np.abs(found - np.stack(expected).astype(np.float64)).max() < 1.01  # of 256 levels
    assert preprocess({**batch, "key": (1, 0)}, True)[0].shape[-1] == 32
    assert preprocess(batch, False)[0].shape[-1] == 32


def test_a_run_grows_its_images(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network sees small images in the first epochs and full ones in evaluations; a resumed run
    goes on in the middle of an epoch."""
    growth = {"start": 16, "epochs": 2, "multiple": 8}
    data = {**settings["data"], "progressive": growth, "random_erasing": {"probability": 0.5}}
    settings = {**settings, "data": data, "epochs": 3, "eval_interval": 3}
    settings["checkpoint"] = {"updates": 2, "keep": 9}
    seen: list[int] = []
    forward = timm.models.ResNet.forward
    monkeypatch.setattr(
        timm.models.ResNet, "forward", lambda s, x: (seen.append(x.shape[-1]), forward(s, x))[1]
    )
    run(settings, tmp_path / "whole")
    assert seen[-14:] == [16] * 4 + [24] * 4 + [32] * 4 + [32] * 2
    middle = next((tmp_path / "whole").glob("epoch_1_*.pth"))
    seen.clear()
    run(settings, tmp_path / "parts", resume=middle)
    assert seen[-8:] == [24] * 2 + [32] * 6
    ends = [load_checkpoint(tmp_path / p / "last.pth") for p in ("whole", "parts")]
    assert_same_state(ends[0]["state_dict"], ends[1]["state_dict"])


def test_a_teacher_sees_the_images_that_grow(
    settings: dict[str, Any], begun: Path, tmp_path: Path
) -> None:
    """Those that its student sees, of each size, augmented alike."""
    data = {**settings["data"], "progressive": {"start": 16, "epochs": 1}}
    taught = {**settings, "data": data, "distillation": {"teacher": str(begun)}}
    trainer = build_trainer(config_from_mapping(taught), tmp_path / "taught", CPU)
    assert trainer.task.model.teacher is not None
    seen: dict[str, list[torch.Tensor]] = {"teacher": [], "student": []}
    networks = {"teacher": trainer.task.model.teacher.network, "student": trainer.task.network}
    for name, network in networks.items():
        network.register_forward_pre_hook(
            lambda module, args, own=seen[name]: (
                own.append(args[0].clone()) if networks["student"].training else None
            )
        )
    trainer.run()
    assert [images.shape[-1] for images in seen["teacher"]] == [16] * 4 + [32] * 4
    assert all(map(torch.equal, seen["teacher"], seen["student"]))


def test_networks_of_one_size_do_not_grow(settings: dict[str, Any], tmp_path: Path) -> None:
    data = {**settings["data"], "progressive": {"start": 16, "epochs": 1}}
    args: dict[str, Any] = {"img_size": 32, "depth": 1, "embed_dim": 24}
    model = {"name": "deit_tiny_patch16_224", "num_classes": 4, "timm_args": args}
    config = {**settings, "data": data, "model": model, "temperature_epochs": 0}
    with pytest.raises(ConfigError, match=r"data.progressive: .*dynamic_img_size: true"):
        build_trainer(config_from_mapping(config), tmp_path, CPU)
    args["dynamic_img_size"] = True
    build_trainer(config_from_mapping(config), tmp_path, CPU)
    data["progressive"] = {"start": 64, "epochs": 2}
    with pytest.raises(ConfigError, match=r"(?s)start = 64.*at most.*epochs = 2.*less than epochs"):
        config_from_mapping(config)
    data["progressive"] = {"start": 16, "epochs": 1}
    run({**config, "data": settings["data"], "epochs": 1}, tmp_path / "teacher")
    taught = {**settings, "data": data, "distillation": {"teacher": str(tmp_path / "teacher")}}
    build_trainer(config_from_mapping(taught), tmp_path, CPU)
    del args["dynamic_img_size"]
    run({**config, "data": settings["data"], "epochs": 1}, tmp_path / "fixed")
    taught["distillation"] = {"teacher": str(tmp_path / "fixed")}
    with pytest.raises(ConfigError, match=r"distillation.teacher .*fixed: data.progressive: "):
        build_trainer(config_from_mapping(taught), tmp_path, CPU)


def test_sizes_are_checked_without_compiling(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def compile_(network: nn.Module, **_: Any) -> None:
        network._compiled_call_impl = lambda *args: calls.append(args)

    monkeypatch.setattr(nn.Module, "compile", compile_)
    data = {**settings["data"], "progressive": {"start": 16, "epochs": 1, "multiple": 16}}
    config = config_from_mapping({**settings, "data": data, "compile": True})
    trainer = build_trainer(config, tmp_path, CPU)
    assert trainer.task.network._compiled_call_impl is not None
    assert not calls
