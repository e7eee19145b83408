"""The attention branch: its formulas, its initialisation, its precision."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from networks import assert_trains, disturb, every_layer, images, norms, small
from torch import nn

from kw import convert, get_temperature, set_temperature
from kw.warehouse import (
    KernelShape,
    KWConv2d,
    Warehouse,
    WarehouseSettings,
)

# --- attention ------------------------------------------------------------------------------------


def direct(z, function):
    """The four functions written out, the null cell still among the results."""
    total = z.abs().sum(-1, keepdim=True) + 1e-3
    return {
        "contrasting": lambda: z / total,
        "softmax": lambda: z.exp() / z.exp().sum(-1, keepdim=True),
        "sigmoid": lambda: 1 / (1 + (-z).exp()),
        "rectified": lambda: z.clamp(min=0) / total,
    }[function]()


@norms
@pytest.mark.parametrize("function", ["contrasting", "softmax", "sigmoid", "rectified"])
@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0])
@torch.no_grad()
def test_attention_formula(function, norm, tau):
    torch.manual_seed(0)
    layer = KWConv2d(
        40, 12, 3, attention=function, norm=norm, reduction=0.5, cell_num_ratio=2, start="paper"
    ).double()
    attention = disturb(layer).eval().attention
    pooled = torch.randn(5, 40, dtype=torch.float64)
    assert attention.fc1.weight.shape == (20, 40)
    assert (attention.fc1.bias is None) == (norm == "batch")
    hidden = pooled @ attention.fc1.weight.T
    if norm == "batch":
        mean, var = attention.norm1.running_mean, attention.norm1.running_var
        hidden = (hidden - mean) / (var + 1e-5).sqrt()
    else:
        hidden = hidden + attention.fc1.bias
        centred = hidden - hidden.mean(1, keepdim=True)
        hidden = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    hidden = (hidden * attention.norm1.weight + attention.norm1.bias).clamp(min=0)
    z = (hidden @ attention.fc2.weight.T + attention.fc2.bias).view(5, 9, 19)
    beta = torch.zeros(9, 18, dtype=torch.float64)
    for mixture in range(9):
        beta[mixture, 2 * mixture] = 1
    expected = (1 - tau) * direct(z, function)[..., :-1] + tau * beta
    torch.testing.assert_close(attention(pooled, torch.tensor(tau)), expected)


@torch.no_grad()
def test_contrasting_attention_has_negative_coefficients():
    layer = KWConv2d(8, 8, 3, start="paper").eval()
    alpha = layer.attention(torch.randn(4, 8), torch.tensor(0.0))
    assert (alpha < 0).any()
    assert (alpha > 0).any()
    assert (alpha.abs().sum(-1) < 1).all()


@pytest.mark.parametrize(("channels", "reduction", "hidden"), [(64, 1 / 16, 16), (512, 1 / 16, 32)])
def test_hidden_units(channels, reduction, hidden):
    assert KWConv2d(channels, 8, 1, reduction=reduction).attention.fc1.out_features == hidden


@pytest.mark.parametrize("slot", [0, 1, 2])
@torch.no_grad()
def test_nonlocal_basis_formula(slot):
    """Own cells directly, the others through the low-rank map, put back in cell order."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(8, 8, 3), nn.Conv2d(8, 16, 1), nn.Conv2d(8, 8, (3, 1))]
    plan = {
        "rules": [{"match": r"\d", "warehouse": "w"}],
        "nonlocal_basis_ratio": 0.5,
        "start": "paper",
    }
    model = convert(
        nn.Sequential(*convs), {**plan, "cell_num_ratio": 4, "cell_inplane_ratio": 0.5}
    ).double()
    start, own, mixtures = [(0, 72, 18), (72, 16, 4), (88, 24, 6)][slot]
    total = 112
    attention = disturb(model[slot]).eval().attention
    attention.basis_bias.normal_()
    foreign = total - own
    rank = foreign // 2
    assert attention.fc3.weight.shape == (foreign, rank)
    assert attention.fc2.bias is None
    pooled = torch.randn(3, 8, dtype=torch.float64)
    hidden = attention.norm1(attention.fc1(pooled)).relu()
    raw = (hidden @ attention.fc2.weight.T).view(3, mixtures, own + rank + 1)
    z = torch.empty(3, mixtures, total + 1, dtype=torch.float64)
    others = [cell for cell in range(total) if not start <= cell < start + own]
    for mixture in range(mixtures):
        z[:, mixture, start : start + own] = raw[:, mixture, :own]
        z[:, mixture, others] = raw[:, mixture, own:-1] @ attention.fc3.weight.T
        z[:, mixture, -1] = raw[:, mixture, -1]
    z += attention.basis_bias.view(mixtures, total + 1)
    expected = 0.7 * direct(z, "contrasting")[..., :-1] + 0.3 * attention.one_hot
    torch.testing.assert_close(attention(pooled, torch.tensor(0.3)), expected)


def test_nonlocal_basis_without_foreign_cells():
    """A layer alone in its warehouse has direct logits only, and no empty map."""
    layer = KWConv2d(8, 8, 3, nonlocal_basis_ratio=0.5, start="paper")
    assert layer.attention.fc3 is None
    assert layer.attention.fc2.weight.shape == (9 * 10, 16)
    assert_trains(layer, torch.randn(2, 8, 5, 5))


def test_nonlocal_rank_is_at_least_16():
    layer = convert(
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)),
        {"rules": [{"match": r"\d", "warehouse": "w"}], "nonlocal_basis_ratio": 1 / 16},
    )[0]
    assert layer.attention.fc3.in_features == 16


@torch.no_grad()
def test_initialisation():
    """Kaiming normal, fan out, ReLU: linear weights, and cells by the slice of each layer."""
    torch.manual_seed(0)
    shapes = [KernelShape(64, 64, (3, 3), name="a"), KernelShape(256, 128, (3, 3), name="b")]
    warehouse = Warehouse(shapes, WarehouseSettings(start="paper"))
    for own, cells in zip(warehouse.partition.slices, (9, 72), strict=True):
        part = warehouse.cells[own.start : own.stop]
        assert len(part) == cells
        assert part.std().item() == pytest.approx(math.sqrt(2 / (cells * 64)), rel=0.02)
    whole = Warehouse([KernelShape(64, 32, (3, 3))], name="whole")
    assert whole.cells.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.03)
    attention = warehouse.build_attention(1)
    for linear in (attention.fc1, attention.fc2):
        deviation = math.sqrt(2 / linear.out_features)
        assert linear.weight.std().item() == pytest.approx(deviation, rel=0.05)
    assert not attention.fc2.bias.any()
    assert warehouse.temperature == 0


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"attention": "relu"}, ["'relu' is unknown", "contrasting, softmax, sigmoid, rectified"]),
        ({"norm": "instance"}, ["'instance' is unknown", "'batch' or 'layer'"]),
        ({"nonlocal_basis_ratio": 1.5}, ["nonlocal_basis_ratio is 1.5", "(0, 1]"]),
        ({"nonlocal_basis_ratio": 0}, ["nonlocal_basis_ratio is 0", "(0, 1]"]),
        ({"reduction": 0}, ["reduction is 0", "above 0"]),
        ({"reduction": -0.1}, ["reduction is -0.1", "above 0"]),
    ],
)
def test_impossible_attention_settings_are_refused(settings, facts):
    with pytest.raises(ValueError, match="'stem'") as error:
        KWConv2d(8, 8, 3, name="stem", **settings)
    assert all(fact in str(error.value) for fact in (*facts, "'warehouse'"))


# --- precision ------------------------------------------------------------------------------------


def watch_dtypes(model):
    """Every dtype that enters or leaves a module of an attention branch."""
    seen = set()
    for name, module in model.named_modules():
        if "attention" in name:
            module.register_forward_hook(
                lambda _, inputs, output: seen.update(t.dtype for t in (*inputs, output))
            )
    return seen


@norms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_is_float32_under_autocast(norm, dtype):
    """Although the second layer's input and all convolutions have 16 bits."""
    model = small(norm=norm)
    exact = copy.deepcopy(model).double()
    seen, outputs = watch_dtypes(model), []
    for layer in (model[0], model[2]):
        layer.register_forward_hook(lambda _, __, output: outputs.append(output.dtype))
    coefficients = []
    model[0].attention.register_forward_hook(lambda _, __, output: coefficients.append(output))
    with torch.autocast("cpu", dtype):
        y = assert_trains(model, images())
    assert outputs == [dtype, dtype]
    assert seen == {torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    pooled = images().double().mean((2, 3))
    alpha = exact[0].attention(pooled, exact[0].warehouse.temperature)
    torch.testing.assert_close(coefficients[0].double(), alpha, rtol=1e-4, atol=1e-6)
    expected = exact(images().double())
    assert (y - expected).abs().max() < 0.03 * expected.abs().max()


def test_coefficients_of_a_16_bit_input_are_pooled_in_float32():
    """A mean of 16-bit values in 16 bits would be off by a hundred times this tolerance."""
    layer = KWConv2d(4, 8, 1).eval()
    x = (images() + 30).bfloat16()
    pooled = []
    layer.attention.register_forward_hook(lambda _, inputs, __: pooled.append(inputs[0]))
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    torch.testing.assert_close(pooled[0], x.double().mean((2, 3)).float(), rtol=1e-6, atol=1e-6)


@every_layer
@norms
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_model(build, shape, norm, dtype):
    torch.manual_seed(0)
    layer = build(norm=norm)
    set_temperature(layer, 0.25)
    x = torch.randn(shape)
    expected = copy.deepcopy(layer)(x)
    layer = layer.half() if dtype == torch.float16 else layer.bfloat16()
    coefficients = []
    layer.attention.register_forward_hook(lambda _, __, output: coefficients.append(output.dtype))
    y = assert_trains(layer, x.to(dtype))
    assert y.dtype == dtype
    assert coefficients == [torch.float32]
    assert (y - expected).abs().max() < 0.05 * expected.abs().max()
    assert get_temperature(layer) == 0.25


@every_layer
def test_double_precision_stays_double(build, shape):
    layer = build(dtype=torch.float64)
    coefficients = []
    layer.attention.register_forward_hook(lambda _, __, output: coefficients.append(output.dtype))
    assert layer(torch.randn(shape, dtype=torch.float64)).dtype == torch.float64
    assert coefficients == [torch.float64]
