"""Whatever takes modules, parts, parameters or groups of a converted network gets its cells."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections.abc import Callable

import pytest
import timm
import torch
from breadth import breadth
from networks import chain, disturb, plan_of, small
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import kw
from kw.warehouse import KWLayer, Warehouse

Network = Callable[[], nn.Module]


def resnet() -> nn.Module:
    return timm.create_model("resnet18", channels=[8, 16, 16, 32], num_classes=5)


def mobilenet() -> nn.Module:
    return timm.create_model("mobilenetv2_035", num_classes=5)


def convnext() -> nn.Module:
    return timm.create_model(
        "convnext_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=5
    )


def deit() -> nn.Module:
    return timm.create_model(
        "deit_tiny_patch16_224", img_size=64, embed_dim=32, num_heads=2, depth=3, num_classes=5
    )


def converted(build: Network, seed: int = 0) -> nn.Module:
    """With attention at random, which depends on the input, and disturbed statistics."""
    torch.manual_seed(seed)
    return disturb(kw.convert(build(), "auto", torch.randn(2, 3, 64, 64), start="paper")).eval()


BUILDERS = {"resnet": resnet, "mobilenet": mobilenet, "convnext": convnext, "deit": deit}
each_network = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


class Encoder(nn.Module):
    """A module of a user's own around parts of a ResNet."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(network.conv1, network.bn1, network.act1, network.maxpool)
        self.layer1, self.layer2 = network.layer1, network.layer2
        self.layer3, self.layer4 = network.layer3, network.layer4

    def forward(self, x: Tensor) -> Tensor:
        return self.layer4(self.layer3(self.layer2(self.layer1(self.stem(x)))))


PARTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "all but the classifier": lambda m: nn.Sequential(*list(m.children())[:-1]),
    "an encoder": Encoder,
    "late stages": lambda m: nn.Sequential(m.layer3, m.layer4),
    "a stage": lambda m: m.layer2,
    "a layer": lambda m: m.layer2[1].conv2,
}
each_part = pytest.mark.parametrize("take", PARTS.values(), ids=PARTS)
INPUTS = {"late stages": (2, 16, 8, 8), "a stage": (2, 8, 8, 8), "a layer": (2, 16, 8, 8)}


def input_of(take: Callable[[nn.Module], nn.Module]) -> Tensor:
    name = next(name for name, part in PARTS.items() if part is take)
    return torch.randn(INPUTS.get(name, IMAGES.shape), generator=torch.Generator().manual_seed(2))


def used_cells(part: nn.Module) -> list[nn.Parameter]:
    layers = [module for module in part.modules() if isinstance(module, KWLayer)]
    return list(dict.fromkeys(layer.warehouse.weight for layer in layers))


# --- parameters, states and copies of parts ---------------------------------------------------


@each_part
def test_a_part_has_the_cells_of_its_layers_once(take) -> None:
    part = take(converted(resnet))
    ids = [id(parameter) for parameter in part.parameters()]
    assert len(ids) == len(set(ids))
    assert {id(cells) for cells in used_cells(part)} <= set(ids)
    assert [name for name, _ in part.named_parameters(remove_duplicate=False)] == [
        name for name, _ in part.named_parameters()
    ]
    values = part.state_dict()
    assert set(values) == {n for n, _ in (*part.named_parameters(), *part.named_buffers())} - {
        n for n, _ in part.named_buffers() if n not in values
    }
    pointers = [value.data_ptr() for value in values.values()]
    assert len(pointers) == len(set(pointers))


@each_part
@torch.no_grad()
def test_a_part_goes_through_a_file_strictly(take) -> None:
    part, other = take(converted(resnet)), take(converted(resnet, seed=7))
    x = input_of(take)
    expected = part(x)
    assert not torch.allclose(other(x), expected, rtol=1e-3)
    file = io.BytesIO()
    torch.save(part.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), expected)


@each_part
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@torch.no_grad()
def test_a_copy_of_a_part_stands_alone(take, copied) -> None:
    part = take(converted(resnet))
    x = input_of(take)
    expected = part(x)
    twin = copied(part)
    assert torch.equal(twin(x), expected)
    for parameter in twin.parameters():
        parameter.zero_()
    assert torch.equal(part(x), expected)
    assert not torch.equal(twin(x), expected)
    assert torch.equal(part.double()(x.double()).float(), part(x.double()).float())  # cells moved


@pytest.mark.parametrize("name", breadth(PARTS, ["late stages"]))
def test_a_part_is_exported(name) -> None:
    take = PARTS[name]
    part, x = take(converted(resnet)), input_of(take)
    program = torch.export.export(part, (x,))
    torch.testing.assert_close(program.module()(x), part(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", breadth(PARTS, ["a stage"]))
def test_a_part_trains_compiled(name) -> None:
    take = PARTS[name]
    part, x = take(converted(resnet)).train(), input_of(take)
    torch.compile(part, backend="aot_eager", fullgraph=True)(x).square().mean().backward()
    assert all(p.grad is not None for p in part.parameters())


class Doubled(nn.Module):
    def forward(self, cells: Tensor) -> Tensor:
        return 2 * cells


def test_cells_that_are_parametrized_are_trained_and_saved() -> None:
    """Cells that another module computes have their parameter there, below the warehouse."""
    network, x = converted(resnet), IMAGES
    warehouse = network.layer1[0].conv1.warehouse
    cells = warehouse.weight.detach().clone()
    nn.utils.parametrize.register_parametrization(warehouse, "weight", Doubled())
    (own,) = warehouse.parameters()
    torch.testing.assert_close(warehouse.cells, 2 * cells)
    assert sum(parameter is own for parameter in network.parameters()) == 1
    names = dict(network.named_parameters(remove_duplicate=False))
    assert sum(parameter is own for parameter in names.values()) == 1
    network(x).square().sum().backward()
    assert own.grad is not None
    assert own.grad.any()

    other = converted(resnet, seed=7)
    nn.utils.parametrize.register_parametrization(
        other.layer1[0].conv1.warehouse, "weight", Doubled()
    )
    other.load_state_dict(network.state_dict())
    torch.testing.assert_close(other(x), network(x))


@each_network
@torch.no_grad()
def test_states_hold_each_tensor_once_and_go_back(build) -> None:
    network, other = converted(build), converted(build, seed=7)
    state = network.state_dict()
    assert sum(key.endswith("warehouse.weight") for key in state) == len(network.warehouses)
    assert not torch.equal(used_cells(other)[-1], used_cells(network)[-1])
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    assert torch.equal(other(IMAGES), network(IMAGES))
    assert list(network.state_dict()) == list(state)  # asked again, it is the same


@torch.no_grad()
def test_safetensors_take_a_network_without_tied_tensors(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    network, other = converted(resnet), converted(resnet, seed=7)
    save_file(network.state_dict(), tmp_path / "network.safetensors")
    other.load_state_dict(load_file(tmp_path / "network.safetensors"))
    assert torch.equal(other(IMAGES), network(IMAGES))


def test_missing_and_unexpected_cells_are_reported_once() -> None:
    model = small()
    state = model.state_dict()
    cells = state.pop("0.warehouse.weight")
    found = model.load_state_dict(state, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (["0.warehouse.weight"], [])
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0.warehouse.weight"'):
        model.load_state_dict(state)
    # Of the second layer that uses them: a state of a network whose layers came in another order.
    state["2.warehouse.weight"] = cells
    state["2.warehouse.temperature"] = state.pop("0.warehouse.temperature")
    model.load_state_dict(state)
    state["1.warehouse.weight"] = cells
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) .*"1.warehouse.weight"'):
        model.load_state_dict(state)


def test_a_state_into_a_mapping_of_ones_own() -> None:
    """Which cannot be referred to weakly: every layer's name is there, and loads."""
    model, own = small(), {}
    model.state_dict(destination=own)
    assert own.keys() >= model.state_dict().keys()
    small(seed=3).load_state_dict(own)


def test_the_same_destination_again() -> None:
    model = small()
    state = model.state_dict()
    keys = list(state)
    state.clear()
    assert list(model.state_dict(destination=state)) == keys


# --- states of earlier versions ---------------------------------------------------------------


def as_earlier(model: nn.Module, state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """A state as earlier versions wrote it: warehouses apart from the layers, after them."""
    names = {w: f"{prefix}warehouses.{name}" for name, w in model.warehouses.items()}
    paths = {f"{prefix}{p}": names[m] for p, m in model.named_modules() if isinstance(m, Warehouse)}
    rest, cells = {}, {}
    for key, value in state.items():
        path, _, tensor = key.rpartition(".")
        if path in paths:
            cells[f"{paths[path]}.{'cells' if tensor == 'weight' else tensor}"] = value
        else:
            rest[key] = value
    return {**rest, **cells}


@each_network
@torch.no_grad()
def test_states_of_earlier_versions_load(build) -> None:
    network, other = converted(build), converted(build, seed=7)
    earlier = as_earlier(network, network.state_dict())
    assert any(key.startswith("warehouses.") for key in earlier)
    other.load_state_dict(earlier)
    assert torch.equal(other(IMAGES), network(IMAGES))


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy])
@torch.no_grad()
def test_states_of_earlier_versions_load_inside_of_other_modules(copied) -> None:
    network, other = converted(resnet), chain(converted(resnet, seed=7), nn.Linear(5, 2))
    earlier = as_earlier(network, {f"a.{k}": v for k, v in network.state_dict().items()}, "a.")
    other = copied(other)
    other.load_state_dict({**earlier, **{f"b.{k}": v for k, v in other.b.state_dict().items()}})
    assert torch.equal(other.a(IMAGES), network(IMAGES))


@torch.no_grad()
def test_a_layers_own_cells_under_their_earlier_name() -> None:
    layer, other = kw.warehouse.KWConv2d(4, 8, 3), kw.warehouse.KWConv2d(4, 8, 3)
    state = layer.state_dict()
    state["warehouse.cells"] = state.pop("warehouse.weight")
    other.load_state_dict(state)
    assert torch.equal(other.warehouse.cells, layer.warehouse.cells)


# --- groups and averages ----------------------------------------------------------------------


@pytest.mark.parametrize("build", [resnet, mobilenet], ids=["resnet", "mobilenet"])
def test_groups_by_weight_and_bias_of_modules_have_every_parameter(build) -> None:
    network = converted(build)
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for module in network.modules():
        for group, name in zip(groups, ("weight", "bias"), strict=True):
            if isinstance(getattr(module, name, None), nn.Parameter):
                group.append(getattr(module, name))
    found = [id(parameter) for group in groups for parameter in group]
    assert sorted(found) == sorted(id(parameter) for parameter in network.parameters())
    assert {id(cells) for cells in used_cells(network)} <= set(map(id, groups[0]))


@each_network
def test_timms_layer_decay_gives_cells_the_rate_of_their_first_layer(build) -> None:
    network = converted(build)
    groups = param_groups_layer_decay(network, weight_decay=0.05, layer_decay=0.5)
    rates = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    seen: set[int] = set()
    for module in network.modules():
        if isinstance(module, KWLayer) and id(module.warehouse.weight) not in seen:
            seen.add(id(module.warehouse.weight))
            assert rates[id(module.warehouse.weight)] == rates[id(module.attention.fc1.weight)]
            assert decays[id(module.warehouse.weight)] == 0.05
    assert len({rates[key] for key in seen}) > 1 or len(seen) == 1


def averaged_by_names(average: nn.Module, network: nn.Module) -> None:
    """As trainers do that go through states: an entry that is there twice moves twice."""
    state = network.state_dict()
    for name, value in average.state_dict().items():
        if value.dtype.is_floating_point:
            value.mul_(0.75).add_(state[name].detach(), alpha=0.25)


def multi(network: nn.Module) -> AveragedModel:
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.75))


AVERAGES = {
    "states": (copy.deepcopy, averaged_by_names),
    "timm's second": (lambda m: ModelEmaV2(m, decay=0.75), lambda a, m: a.update(m)),
    "timm's third": (lambda m: ModelEmaV3(m, decay=0.75), lambda a, m: a.update(m)),
    "timm's third, singly": (
        lambda m: ModelEmaV3(m, decay=0.75, foreach=False),
        lambda a, m: a.update(m),
    ),
    "torch's": (multi, lambda a, m: a.update_parameters(m)),
}


@pytest.mark.parametrize(("begin", "update"), AVERAGES.values(), ids=AVERAGES)
@torch.no_grad()
def test_averages_move_cells_once_an_update(begin, update) -> None:
    network = converted(resnet)
    average = begin(network)
    if isinstance(average, AveragedModel):
        average.update_parameters(network)  # its first update copies
    before = [cells.clone() for cells in used_cells(network)]
    for cells in used_cells(network):
        cells += 1
    update(average, network)
    after = used_cells(average)
    for old, moved in zip(before, after, strict=True):
        torch.testing.assert_close(moved, old + 0.25)


def test_replicas_of_data_parallel_have_cells_of_their_own(monkeypatch) -> None:
    """Replication itself runs; its broadcast, which takes GPUs, is copied here."""
    module = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(
        module,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach: [[t * 1 for t in tensors] for _ in devices],
    )
    network = small().eval()
    first, second = module.replicate(network, [0, 1])
    for replica in (first, second):
        for layer, own in zip(replica, network, strict=True):
            if isinstance(own, KWLayer):
                assert layer.warehouse.cells is not own.warehouse.cells
                assert layer.warehouse.cells.grad_fn is not None
    assert first[0].warehouse.cells is first[2].warehouse.cells
    x = torch.randn(2, 4, 8, 6)
    torch.testing.assert_close(first(x), network(x))
    second(x).sum().backward()
    assert network[0].warehouse.cells.grad.any()


# --- reading a layer as a static one ----------------------------------------------------------


def test_a_layer_has_no_weight_and_says_what_to_do() -> None:
    layer = small()[0]
    assert not hasattr(layer, "weight")
    with pytest.raises(AttributeError, match="assembles a kernel for every sample"):
        layer.weight()
    with pytest.raises(AttributeError, match="no attribute 'wieght'"):
        layer.wieght()


def test_lists_of_layers_are_converted() -> None:
    layers = nn.ModuleList([nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)])
    kw.convert(layers, plan_of(("0|1", "w")))
    assert len(list(layers)) == 2
    assert layers[0].warehouse is layers[1].warehouse is layers.warehouses["w"]


class Pretrained(nn.Sequential):
    """With the method of Hugging Face's models that writes class and weights."""

    def save_pretrained(self, folder: str) -> None:
        raise AssertionError(f"it was saved to {folder}")


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    "copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_save_pretrained_is_refused(inside: bool, copied) -> None:
    """``from_pretrained`` would give the static network, random in part."""
    network = Pretrained(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    model = chain(network) if inside else network
    kw.convert(model, plan_of((r"(a\.)?[02]", "w")))
    saver = copied(model).a if inside else copied(model)
    with pytest.raises(ValueError, match="save_pretrained cannot save a converted network"):
        saver.save_pretrained("folder")
