"""Recipes of training: what each setting does to an update."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from breadth import breadth
from networks import narrow_resnet
from test_engine import CPU, assert_same_state, changed, run
from test_parallel import run as run_in_processes
from timm.optim import param_groups_layer_decay
from timm.optim.muon import Muon as TimmMuon
from torch import nn

import kw
import kw.peers
from kw.config import ConfigError, config_from_mapping, load_config, to_dict
from kw.config.schema import ClassifierOptimizerConfig
from kw.models.depth import frozen_parameters, layer_rates
from kw.registry import OPTIMIZERS
from kw.training import CheckpointError, build_trainer, load_checkpoint
from kw.training.average import MovingAverage
from kw.training.optim import build_optimizer
from kw.warehouse import KWLayer

STATIC = {  # networks and their plans
    "resnet18": "resnet18",
    "mobilenetv2_100": "mobilenetv2_1x",
    "convnext_tiny": "convnext_tiny",
    "deit_tiny_patch16_224": "deit",
}


def layers_by_cells(network: nn.Module) -> dict[str, list[str]]:
    """The layers that use each warehouse's cells, by the cells' name."""
    names = {id(p): name for name, p in network.named_parameters()}
    found: dict[str, list[str]] = {}
    for name, layer in network.named_modules():
        if isinstance(layer, KWLayer):
            found.setdefault(names[id(layer.warehouse.cells)], []).append(name)
    return found


def same_end(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A run that goes on after an epoch ends where one that does not stop ends; its last
    checkpoint."""
    run(settings, tmp_path / "whole")
    (tmp_path / "parts").mkdir()
    shutil.copy(tmp_path / "whole/epoch_1.pth", tmp_path / "parts")
    run(settings, tmp_path / "parts", resume=True)
    whole, parts = (load_checkpoint(tmp_path / p / "last.pth") for p in ("whole", "parts"))
    for key in ("state_dict", "ema_state_dict"):
        assert (key in whole) == (key in parts)
        assert_same_state(whole.get(key, {}), parts.get(key, {}))
    return whole


# --- layer-wise decay -------------------------------------------------------------------------


@pytest.mark.parametrize("name", STATIC)
def test_static_networks_have_timms_rates(name: str) -> None:
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=3)
    groups = param_groups_layer_decay(network, layer_decay=0.7)
    expected = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    rates = layer_rates(network, 0.7)
    assert {id(p): rates[n] for n, p in network.named_parameters()} == expected


@pytest.mark.parametrize("name", STATIC)
def test_cells_have_the_rate_of_their_deepest_user(name: str) -> None:
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=3)
        static = layer_rates(network, 0.7)
        kw.convert(network, STATIC[name], start="paper")
    rates = layer_rates(network, 0.7)
    users = layers_by_cells(network)
    assert any(len({static[f"{u}.weight"] for u in layers}) > 1 for layers in users.values())
    for cells, layers in users.items():
        own = [static[f"{layer}.weight"] for layer in layers]
        assert rates.pop(cells) == max(own)
        for layer, rate in zip(layers, own, strict=True):
            branch = {n: r for n, r in rates.items() if n.startswith(f"{layer}.attention.")}
            assert branch
            assert set(branch.values()) == {rate}
    assert {n: r for n, r in rates.items() if ".attention." not in n}.items() <= static.items()


def test_a_run_has_the_rates(settings: dict[str, Any], tmp_path: Path) -> None:
    """They multiply the other factors, and the schedule multiplies by them."""
    settings = changed(settings, optimizer__layer_decay=0.5, optimizer__attention_lr=3.0)
    trainer = build_trainer(config_from_mapping(settings), tmp_path, CPU)
    trainer._set_rates(trainer.update)
    names = {id(p): name for name, p in trainer.task.network.named_parameters()}
    groups = trainer.optimizer.param_groups
    rates = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    now = trainer.schedule.lr(0)
    assert rates["fc.weight"] == now
    assert rates["layer4.0.bn2.weight"] == now / 2
    assert rates["layer3.0.conv2.attention.fc1.weight"] == now * 3 / 4
    assert rates["conv1.weight"] == now / 2**5


def test_networks_of_unknown_depth_are_refused(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timm.models.resnet.ResNet, "group_matcher", None)
    config = config_from_mapping(changed(settings, optimizer__layer_decay=0.5))
    with pytest.raises(ConfigError, match=r"layer_decay = 0.5: ResNet has no group_matcher.*set 1"):
        build_trainer(config, tmp_path, CPU)


@pytest.mark.parametrize("name", ["hrnet_w18_small", "inception_v3", "coat_tiny"])
def test_stages_that_timm_does_not_give_are_refused(name: str) -> None:
    with torch.device("meta"):
        network = timm.create_model(name)
    with pytest.raises(ValueError, match="has no stem and blocks: its stages are not known"):
        frozen_parameters(network, 1)


# --- the moving average's warm-up -------------------------------------------------------------


def test_the_average_warms_up() -> None:
    """Against the recurrence in float64, to the end of the warm-up and past it."""
    network, average = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
    expected = average.weight.detach().clone()
    averaging = MovingAverage(average, 0.6, warmup=True)
    kept = []
    for t in range(20):
        nn.init.normal_(network.weight)
        averaging.update(network, updates_before=t)
        kept.append(min(0.6, (1 + t) / (10 + t)))
        expected = kept[-1] * expected + (1 - kept[-1]) * network.weight.detach()
        torch.testing.assert_close(average.weight.detach(), expected, rtol=1e-12, atol=1e-12)
    assert kept[:2] == [0.1, 2 / 11]
    assert kept[12] < 0.6 == kept[13]


def test_a_resumed_warm_up_goes_on(settings: dict[str, Any], tmp_path: Path) -> None:
    warm = same_end(changed(settings, ema={"decay": 0.99, "warmup": True}), tmp_path / "warm")
    cold = same_end(changed(settings, ema={"decay": 0.99}), tmp_path / "cold")
    assert_same_state(warm["state_dict"], cold["state_dict"])
    distance = [
        sum(float((e["ema_state_dict"][k] - v).norm()) for k, v in e["state_dict"].items())
        for e in (warm, cold)
    ]
    assert distance[0] < distance[1]  # the average is nearer to the weights


# --- Muon -------------------------------------------------------------------------------------


def muon(network: nn.Module, **settings: Any) -> Any:
    config = ClassifierOptimizerConfig(name="muon", lr=0.5, **settings)
    return build_optimizer(network, config, torch.device("cpu"))


def random_gradients(network: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def uses_muon(optimizer: Any, network: nn.Module) -> dict[str, bool]:
    names = {id(p): name for name, p in network.named_parameters()}
    groups = optimizer.param_groups
    return {names[id(p)]: group["use_muon"] for group in groups for p in group["params"]}


@pytest.mark.parametrize("dynamic", [False, True])
def test_matrices_are_muons(dynamic: bool) -> None:
    """MobileNetV2 has every kind: depthwise and pointwise, and cells of both."""
    with torch.device("meta"):
        network = timm.create_model("mobilenetv2_100", num_classes=3)
        if dynamic:
            kw.convert(network, "mobilenetv2_1x", start="paper")
    found = uses_muon(muon(network), network)
    assert set(found) == {name for name, _ in network.named_parameters()}
    depthwise = {f"{name}." for name, m in network.named_modules() if getattr(m, "groups", 1) > 1}
    depthwise |= {
        cells for cells, layers in layers_by_cells(network).items() if "conv_dw" in layers[0]
    }
    assert depthwise
    for name, parameter in network.named_parameters():
        apart = name.startswith(("classifier.", *depthwise)) or ".attention." in name
        assert found[name] == (parameter.ndim > 1 and not apart), name
    assert any(found[cells] for cells in layers_by_cells(network)) == dynamic


def test_a_muon_update_is_timms_of_each_matrix() -> None:
    """Each cell's update is orthogonal and that of timm for the cell alone; the rest is AdamW."""
    network = kw.convert(narrow_resnet(), "resnet18", start="paper")
    optimizer = muon(network, weight_decay=0.1, exempt_from_decay="none")
    found = uses_muon(optimizer, network)
    shapes = {
        id(layer.warehouse.cells): layer.warehouse.partition.cell_shape
        for layer in network.modules()
        if isinstance(layer, KWLayer)
    }
    apart: dict[str, list[nn.Parameter]] = {}
    for name, p in network.named_parameters():
        if not found[name]:
            apart[name] = [nn.Parameter(p.detach().clone())]
        elif id(p) in shapes:
            rows = p.detach().clone().view(-1, shapes[id(p)][0], p[0].numel() // shapes[id(p)][0])
            apart[name] = [nn.Parameter(row) for row in rows]
        else:
            apart[name] = [nn.Parameter(p.detach().clone().flatten(1))]
    alone = [p for name in apart if found[name] for p in apart[name]]
    rest = [p for name in apart if not found[name] for p in apart[name]]
    references = [
        TimmMuon([{"params": alone, "use_muon": True}], lr=0.5, weight_decay=0.1),
        torch.optim.AdamW(rest, lr=0.5, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-7),
    ]
    assert sum(len(apart[name]) > 1 for name in apart) == len(set(shapes)) > 2
    for seed in range(2):
        random_gradients(network, seed)
        for name, p in network.named_parameters():
            if found[name]:  # no singular value near zero, which five iterations leave small
                shape = apart[name][0].shape
                eyes = torch.eye(*shape).expand(len(apart[name]), *shape)
                p.grad += 3 * max(shape) ** 0.5 * eyes.reshape(p.shape)
            for own, grad in zip(apart[name], p.grad.view(len(apart[name]), -1), strict=True):
                own.grad = grad.view(own.shape).clone()
        gradients = {p: p.grad for p in network.parameters()}
        before = {name: p.detach().clone() for name, p in network.named_parameters()}
        optimizer.step()
        for reference in references:
            reference.step()
        for name, p in network.named_parameters():
            assert p.grad is gradients[p]
            expected = torch.stack([own.detach() for own in apart[name]]).view(p.shape)
            if not found[name]:
                # Steps of 0.5, of which a version of torch may round the last bit otherwise.
                torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=2**-22)
                continue
            # timm computes in bf16, and products of stacked matrices sum in another order.
            step = 0.5 * 0.2 * max(apart[name][0].shape) ** 0.5
            update = before[name] * (1 - 0.5 * 0.1) - p.detach()
            assert (p.detach() - expected).norm() < 2**-8 * update.norm(), name
            for own in update.view(-1, *apart[name][0].shape).double():
                values = torch.linalg.svdvals(own) / step
                assert 0.7 < values.min() <= values.max() < 1.2, name


def test_a_converted_classifier_is_adamws() -> None:
    network = kw.peers.convert(narrow_resnet(), "condconv", start="paper")
    assert any(isinstance(m, KWLayer) for n, m in network.named_modules() if n == "fc")
    found = uses_muon(muon(network), network)
    names = {id(p): name for name, p in network.named_parameters()}
    assert not found[names[id(network.fc.warehouse.cells)]]
    assert found[names[id(network.layer4[1].conv2.warehouse.cells)]]


def test_arguments_of_muon_hold() -> None:
    """Static kernels by position, as timm has them; cells stay matrices of their own."""
    network = kw.convert(narrow_resnet(), "resnet18", start="paper")
    optimizer = muon(network, args={"conv_mode": "batched"})
    (kernel,) = [nn.Parameter(network.conv1.weight.detach().clone())]
    reference = TimmMuon(
        [{"params": [kernel], "use_muon": True}], lr=0.5, weight_decay=0.0, conv_mode="batched"
    )
    random_gradients(network)
    assert network.conv1.weight.grad is not None
    kernel.grad = network.conv1.weight.grad.clone()
    optimizer.step()
    reference.step()
    assert torch.equal(network.conv1.weight, kernel)


def test_another_form_of_muon(settings: dict[str, Any], tmp_path: Path) -> None:
    """A resumed run has the form that its configuration names, or is refused."""
    settings = {**settings, "schedule": {"name": "step", "milestones": [0.5]}, "epochs": 1}
    settings["temperature_epochs"] = 0
    run({**settings, "optimizer": {"name": "muon", "lr": 0.005}}, tmp_path)

    def resumed(name: str) -> Any:
        config = {**settings, "optimizer": {"name": name, "lr": 0.005}, "epochs": 2}
        trainer = build_trainer(config_from_mapping(config), tmp_path, CPU, resume=True)
        trainer.load()
        return {group["nesterov"] for group in trainer.optimizer.param_groups}

    assert resumed("muon") == {False}
    assert resumed("nmuon") == {True}
    with pytest.raises(CheckpointError, match=r"optimizer is another one \(optimizer.name\)"):
        resumed("adamuon")


@pytest.mark.parametrize("name", breadth(["muon", "nadamuon"], ["muon"]))
def test_a_run_with_muon_goes_on(settings: dict[str, Any], tmp_path: Path, name: str) -> None:
    optimizer = {"name": name, "lr": 0.005, "weight_decay": 0.01}
    end = same_end({**settings, "optimizer": optimizer, "precision": "bf16"}, tmp_path)
    groups = end["optimizer"]["optimizer"]["param_groups"]
    assert {group.get("cell_shape") is None for group in groups} == {True, False}


def test_an_older_timm_is_refused(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm.optim.muon", None)
    monkeypatch.setattr(OPTIMIZERS, "entries", {})
    for module in ("muon", "more_optimizers"):
        monkeypatch.delitem(sys.modules, f"kw.training.{module}", raising=False)
        monkeypatch.delattr(kw.training, module, raising=False)
    monkeypatch.setattr(OPTIMIZERS, "_modules", ["kw.training.more_optimizers"])
    with pytest.raises(ConfigError, match=r"optimizer.name 'muon': .*pip install 'timm>=1.0.22'"):
        muon(nn.Linear(2, 2))


# --- the end of a run, and configurations that are shipped ------------------------------------


def test_patience_is_the_same_after_a_resume(settings: dict[str, Any], tmp_path: Path) -> None:
    """In two processes, which end together: nothing is learnt at a rate of almost zero."""
    config = {
        **settings, "epochs": 9, "temperature_epochs": 0, "total_batch_size": 32, "batch_size": 16,
        "optimizer": {"name": "sgd", "lr": 1e-12}, "schedule": {"final_lr": 1e-13},
        "hooks": {"early_stopping": {"patience": 3, "min_delta": 90.0}},
        "checkpoint": {"keep": 9},
    }  # fmt: skip
    whole = run_in_processes(config, tmp_path / "whole", 2)
    assert whole["meta"]["epoch"] == 4
    for rank in whole["ranks"]:
        assert rank["hooks"]["EarlyStopping"]["without"] == 3
    (tmp_path / "parts").mkdir()
    shutil.copy(tmp_path / "whole/epoch_2.pth", tmp_path / "parts")
    parts = run_in_processes(config, tmp_path / "parts", 2)
    assert parts["meta"]["epoch"] == 4
    assert_same_state(whole["state_dict"], parts["state_dict"])


@pytest.mark.parametrize(
    ("name", "used"),
    [
        ("finetune_by_layers", ["optimizer.layer_decay", "ema.warmup", "hooks.early_stopping"]),
        ("finetune_frozen", ["model.freeze"]),
        ("muon", ["optimizer.name"]),
        ("growing_images", ["data.progressive", "model.gradient_checkpointing", "loggers.wandb"]),
    ],
)
def test_shipped_recipes(name: str, used: list[str], recwarn: pytest.WarningsRecorder) -> None:
    """They load without a warning, and set what they are there for."""
    path = Path(__file__).parents[1] / f"configs/recipes/{name}.yaml"
    config, text = load_config(path, check_model_name=False), path.read_text()
    assert not recwarn.list
    assert f"tools/train.py configs/recipes/{name}.yaml" in text.split("\n\n")[0]
    own, inherited = yaml.safe_load(text), load_config(path.parent / yaml.safe_load(text)["_base_"])
    for key in used:
        value: Any = own
        before: Any = to_dict(inherited)
        resolved: Any = to_dict(config)
        for part in key.split("."):
            value, resolved = value[part], resolved[part]
            before = (before or {}).get(part)
        assert resolved != before
        assert value == resolved or isinstance(value, dict)
