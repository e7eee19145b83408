"""Layers under what PyTorch does to modules: copies, files, formats, devices, modes."""

from __future__ import annotations

import copy
import io
import pickle
from contextlib import nullcontext

import pytest
import torch
from networks import assert_trains, disturb, every_layer, images, norms, small

from kw import get_temperature, set_temperature
from kw.warehouse import (
    KernelShape,
    KWConv1d,
    KWConv2d,
    KWLayer,
    KWLinear,
    Warehouse,
)

# --- copies, files, formats -----------------------------------------------------------------------


def test_channels_last():
    expected = small()(images())
    model = small().to(memory_format=torch.channels_last)
    y = assert_trains(model, images().to(memory_format=torch.channels_last))
    torch.testing.assert_close(y, expected)


@every_layer
def test_channels_last_never_raises(build, shape):
    """5-D parameters would: that is why cells have two dimensions."""
    model = build().to(memory_format=torch.channels_last)
    assert_trains(model, torch.randn(shape))


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
@torch.no_grad()
def test_a_copy_stands_alone(duplicate):
    """Its layers use its own warehouses, and nothing that is done to it reaches the original."""
    model = small().eval()
    expected = model(images())
    twin = duplicate(model)
    assert torch.equal(twin(images()), expected)
    names = {0: "spatial", 2: "spatial", 3: "pointwise"}
    for i, name in names.items():
        assert twin[i].warehouse is twin.warehouses[name]
        assert twin[i].warehouse is not model[i].warehouse
        assert twin[i].attention.one_hot is not model[i].attention.one_hot
    set_temperature(twin, 1.0)
    assert get_temperature(model) == pytest.approx(0.3)
    for parameter in twin.parameters():
        parameter.zero_()
    assert torch.equal(model(images()), expected)
    assert not twin(images()).any()


@torch.no_grad()
def test_state_dict_round_trip():
    model = disturb(small()).eval()
    other = small(seed=7).eval()
    set_temperature(other, 1.0)
    expected = model(images())
    assert not torch.allclose(other(images()), expected, atol=1e-3)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(other(images()), expected)
    assert get_temperature(other) == pytest.approx(0.3)


def test_state_dict_keys():
    """Cells and temperature once a warehouse; beta, which the partition gives, not at all."""
    state = small().state_dict()
    own = [key for key in state if "attention" not in key]
    assert own == [
        *("0.bias", "0.warehouse.weight", "0.warehouse.temperature"),
        *("2.bias", "3.bias", "3.warehouse.weight", "3.warehouse.temperature"),
    ]
    assert not [key for key in state if "one_hot" in key]


@norms
@pytest.mark.parametrize("way", ["to_empty", "assign", "reset", "copies", "moved"])
@torch.no_grad()
def test_built_on_the_meta_device(norm, way):
    source = disturb(small(norm=norm, cell_num_ratio=2)).eval()
    with torch.device("cpu" if way == "moved" else "meta"):
        model = small(norm=norm, cell_num_ratio=2).eval()
    if way == "moved":
        model.to("meta")
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
    if way == "assign":
        model.load_state_dict(source.state_dict(), assign=True)
    else:
        model.to_empty(device="cpu")
        for buffer in model.buffers():
            buffer.fill_(7)  # what memory may hold
    if way == "to_empty":
        model.load_state_dict(source.state_dict())
    if way in ("copies", "moved"):  # as Hugging Face loads timm's networks
        for target, value in zip(
            model.state_dict().values(), source.state_dict().values(), strict=True
        ):
            target.copy_(value)
    if way == "reset":
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        assert get_temperature(model) == 0
        model.load_state_dict(source.state_dict(), strict=True)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cpu"}
    assert torch.equal(model(images()), source(images()))


@torch.no_grad()
def test_reset_alone_makes_a_meta_model_whole():
    """For loops that materialise shards and call ``reset_parameters``: beta is right, bias zero."""
    with torch.device("meta"):
        layer = KWConv2d(4, 8, 3)
    layer.to_empty(device="cpu")
    for tensor in (*layer.buffers(), *layer.parameters()):
        tensor.fill_(7)
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert torch.equal(layer.attention.one_hot, torch.eye(9))
    assert not layer.bias.any()
    assert layer(torch.ones(2, 4, 5, 5)).abs().max() < 7


def test_meta_forward_gives_shapes():
    with torch.device("meta"):
        model = small()
    for context in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            assert model(images(device="meta")).shape == (3, 16, 4, 3)


def test_functional_call_replaces_cells():
    model = small().eval()
    cells = {
        k: torch.zeros_like(v) for k, v in model.named_parameters() if k.endswith("house.weight")
    }
    assert len(cells) == 2
    expected = model(images())
    y = torch.func.functional_call(model, cells, (images(),))
    torch.testing.assert_close(y, model[3].bias.view(-1, 1, 1).expand_as(y))
    assert torch.equal(model(images()), expected)  # the model has its own again


# --- training and evaluation ----------------------------------------------------------------------


@every_layer
@norms
def test_training_at_batch_1(build, shape, norm):
    torch.manual_seed(0)
    layer = disturb(build(norm=norm))
    set_temperature(layer, 0.3)
    before = {k: v.clone() for k, v in layer.named_buffers()}
    x = torch.randn(1, *shape[1:])
    y = assert_trains(layer.train(), x)
    # One sample has no batch statistics: the running ones serve, and are not moved by it.
    torch.testing.assert_close(y, layer.eval()(x))
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert (layer.attention.fc1.weight.grad != 0).any()


@every_layer
@norms
@pytest.mark.parametrize("training", [False, True])
def test_no_samples_give_no_outputs(build, shape, norm, training):
    """As of a static layer, whose gradients are then zeros: a detector's head without regions."""
    layer = build(norm=norm).train(training)
    set_temperature(layer, 0.3)
    before = {k: v.clone() for k, v in layer.named_buffers()}
    x = torch.randn(0, *shape[1:], requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert x.grad.shape == x.shape
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert y.shape == layer(torch.randn(2, *shape[1:]))[:0].shape


@every_layer
@norms
def test_samples_without_positions(build, shape, norm):
    """No tokens give no outputs, as of nn.Linear; a convolution refuses them, as torch's do, and
    keeps no statistics of them."""
    layer = build(norm=norm).train()
    before = {k: v.clone() for k, v in layer.named_buffers()}
    if isinstance(layer, KWLinear):
        x = torch.randn(2, 3, 0, shape[-1], requires_grad=True)
        y = layer(x)
        assert y.shape == (2, 3, 0, layer.out_features)
        y.sum().backward()
        assert x.grad.shape == x.shape
        assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())
    else:
        with pytest.raises(ValueError, match="has no positions"):
            layer(torch.randn(*shape[:-1], 0))
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_batch_statistics_from_two_samples_on():
    layer = KWConv2d(4, 8, 3).train()
    layer(images(2))
    norm = layer.attention.norm1
    assert norm.num_batches_tracked == 1
    assert (norm.running_mean != 0).any()
    layer.eval()
    mean = norm.running_mean.clone()
    layer(images(2))
    assert torch.equal(norm.running_mean, mean)


@norms
@torch.no_grad()
def test_eval_is_per_sample_and_train_is_not(norm):
    model = disturb(small(norm=norm)).eval()
    together = model(images(3))
    one_by_one = torch.cat([model(x[None]) for x in images(3)])
    torch.testing.assert_close(together, one_by_one, rtol=1e-4, atol=1e-6)
    differ = not torch.allclose(model.train()(images(3)), together, atol=1e-4)
    assert differ == (norm == "batch")


def test_gradients_at_temperature_1():
    """A static network: attention rests, each layer's own cells learn, no others."""
    torch.manual_seed(0)
    model = small(cell_num_ratio=2)
    set_temperature(model, 1.0)
    assert_trains(model, images())
    for layer in (model[0], model[2], model[3]):
        assert all(not p.grad.any() for p in layer.attention.parameters())
    owned = model.warehouses["spatial"].cells.grad.any(1)
    assert owned.tolist() == [True, False] * (len(owned) // 2)


def test_cells_stand_once_among_the_parameters():
    model = small()
    cells = [p for p in model.parameters() if p is model[0].warehouse.cells]
    assert len(cells) == 1
    assert len(list(model.parameters())) == len({id(p) for p in model.parameters()})
    everywhere = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert everywhere == [name for name, _ in model.named_parameters()]


# --- what a layer refuses -------------------------------------------------------------------------


@every_layer
def test_private_warehouse(build, shape):
    """A layer by itself owns its cells; its state is whole without a model around it."""
    layer = build()
    assert [w for w in layer.modules() if isinstance(w, Warehouse)] == [layer.warehouse]
    assert {"warehouse.weight", "warehouse.temperature", "bias"} <= set(layer.state_dict())
    assert layer(torch.randn(shape)).shape[:1] == shape[:1]


def test_shared_warehouse():
    """Two layers made by hand on one warehouse: the second's slot is the second shape's."""
    shapes = [KernelShape(8, 4, (3, 3)), KernelShape(8, 8, (1, 1))]
    warehouse = Warehouse(shapes, name="mine")
    first = KWConv2d(4, 8, 3, padding=1, warehouse=warehouse, slot=0)
    second = KWConv2d(8, 8, 1, warehouse=warehouse, slot=1)
    assert first.warehouse is second.warehouse is warehouse
    assert (first.attention.mixtures, second.attention.mixtures) == (9, 2)
    assert second.attention.own.start == 9
    assert second(first(images())).shape == (3, 8, 8, 6)
    assert first.bias.dtype == warehouse.cells.dtype


@pytest.mark.parametrize(
    ("layer", "facts"),
    [
        (lambda w: KWConv2d(4, 8, 3, warehouse=w, slot=1), ["slot 1", "'mine'", "(1, 1)"]),
        (lambda w: KWConv2d(8, 8, (1, 3), warehouse=w, slot=1), ["slot 1", "'mine'"]),
        (lambda w: KWConv2d(8, 8, 1, groups=2, warehouse=w, slot=1), ["slot 1", "groups"]),
        (lambda w: KWConv2d(4, 8, 3, warehouse=w, slot=2), ["no slot 2", "2 layers"]),
        (lambda w: KWConv2d(8, 8, 1, warehouse=w, slot=-1), ["no slot -1", "2 layers"]),
        (lambda w: KWConv2d(4, 8, 3, warehouse=w, cell_num_ratio=2), ["cell_num_ratio", "given"]),
        (lambda _: KWConv2d(4, 8, 3, cell_num_ratoi=2), ["did you mean 'cell_num_ratio'"]),
        (lambda _: KWLinear(4, 8, nrom="layer"), ["KWLinear", "did you mean 'norm'"]),
        (lambda _: KWConv2d(4, 8, 3, groups=3), ["3 groups", "4 input channels"]),
        (lambda _: KWConv2d(4, 8, (3, 3, 3)), ["KWConv2d", "one size per axis"]),
        (lambda _: KWConv1d(4, 8, 3, stride=(1, 2)), ["KWConv1d", "one size per axis"]),
    ],
)
def test_layers_that_cannot_be_are_refused(layer, facts):
    shapes = [KernelShape(8, 4, (3, 3)), KernelShape(8, 8, (1, 1))]
    warehouse = Warehouse(shapes, name="mine")
    with pytest.raises(ValueError, match=r"slot|settings|setting|groups|size") as error:
        layer(warehouse)
    for fact in facts:
        assert fact in str(error.value)


@every_layer
def test_input_without_a_batch_is_refused(build, shape):
    layer = build()
    x = torch.randn(shape[-1] if isinstance(layer, KWLinear) else shape[1:])
    with pytest.raises(ValueError, match=rf"{type(layer).__name__} takes \[batch, ") as error:
        layer(x)
    assert str(list(x.shape)) in str(error.value)


def test_repr_names_the_warehouse():
    lines = repr(small())
    assert "8, 16, kernel=1x1, groups=1, bias=True, warehouse='pointwise'" in lines
    assert "(warehouse): Warehouse(cells=27, cell_shape=8x4x1x1, layers=2)" in lines
    assert isinstance(small()[0], KWLayer)
