"""The start that keeps static kernels: the same outputs, the best below a budget of 1, and a way
from there."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import timm
import torch
from networks import disturb, narrow_resnet
from torch import nn

import kw
import kw.config
from kw.training.optim import build_optimizer
from kw.warehouse import PLANS, KWConv2d, KWLayer, Plan, Rule, WarehouseSettings
from kw.warehouse.attention import ATTENTION_FUNCTIONS
from kw.warehouse.ops import assemble

HALF = {"cell_num_ratio": 0.5, "cell_inplane_ratio": 0.5, "cell_outplane_ratio": 0.5}


class Tokens(nn.Module):
    """Linear layers over tokens ``[B, N, 8]``."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 8)

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu())


def convolutions(dims, **settings):
    conv = getattr(nn, f"Conv{dims}d")
    return nn.Sequential(
        conv(4, 8, 3, padding=1, **settings),
        nn.ReLU(),
        conv(8, 8, 3, stride=2, padding=1, bias=False, **settings),
        getattr(nn, f"BatchNorm{dims}d")(8),
        conv(8, 16, 1),
    )


NETWORKS = {
    "1d": (lambda: convolutions(1), (3, 4, 9)),
    "2d": (lambda: convolutions(2), (3, 4, 9, 8)),
    "3d": (lambda: convolutions(3), (3, 4, 5, 6, 7)),
    "grouped": (lambda: convolutions(2, groups=2), (3, 4, 9, 8)),
    "reflected, dilated": (
        lambda: convolutions(2, padding_mode="reflect", dilation=2),
        (3, 4, 9, 8),
    ),
    "depthwise": (
        lambda: nn.Sequential(
            nn.Conv2d(8, 8, 3, padding="same", groups=8),
            nn.Conv2d(8, 8, 4, padding="same", groups=8),
        ),
        (3, 8, 9, 8),
    ),
    "linear": (Tokens, (3, 5, 8)),
}
SETTINGS = {
    "1x": {},
    "4x": {"cell_num_ratio": 4},
    "fine cells": {"cell_inplane_ratio": 0.5, "cell_outplane_ratio": 0.5},
    "layer norm": {"norm": "layer"},
    "nonlocal basis": {"nonlocal_basis_ratio": 0.25, "cell_num_ratio": 2},
    **{f: {"attention": f, "cell_num_ratio": 2} for f in ATTENTION_FUNCTIONS},
    "firm": {"firmness": 20},
    "loose": {"firmness": 0.002, "attention": "rectified"},
    "per warehouse": {"warehouses": {"all": {"cell_num_ratio": 3}}},
}


def difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def everything(settings, **rest):
    """A plan with every layer in one warehouse, kernels of one size in one without partition."""
    single = settings.get("warehouses")
    rules = (Rule(r".*", "all"),)
    plain = {k: v for k, v in settings.items() if k != "warehouses"}
    return Plan(rules, WarehouseSettings(**plain), single or {}), rest


def check_kept(model, images, convert, bounds):
    for mode in (True, False):
        for dtype, bound in bounds:
            static = disturb(copy.deepcopy(model)).to(dtype).train(mode)
            exact = copy.deepcopy(static).double()
            converted = convert(copy.deepcopy(static)).train(mode)
            x = images.to(dtype)
            expected = static(x)
            # BatchNorm over few values makes much of rounding, in the static network too.
            rounding = difference(expected.double(), exact(x.double()))
            assert difference(converted(x), expected) < max(bound, 3 * rounding)
            assert any(isinstance(module, KWLayer) for module in converted.modules())
    return converted


BOUNDS = ((torch.float64, 1e-10), (torch.float32, 1e-5))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(("build", "shape"), NETWORKS.values(), ids=NETWORKS)
def test_outputs_are_kept(build, shape, settings):
    torch.manual_seed(0)
    plan, _ = everything(settings)
    converted = check_kept(
        build(), torch.randn(shape), lambda m: kw.convert(m, plan, announce=False), BOUNDS
    )
    kept = converted.warehouses.conversion.warehouses
    assert all(warehouse.kept == 1 for warehouse in kept.values())


@pytest.mark.parametrize("function", ATTENTION_FUNCTIONS)
def test_outputs_are_kept_without_spatial_partition(function):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, (3, 2)), nn.ReLU(), nn.Conv2d(8, 8, (3, 2)))
    plan, _ = everything({"spatial_partition": False, "attention": function, "cell_num_ratio": 2})
    check_kept(model, torch.randn(2, 4, 9, 8), lambda m: kw.convert(m, plan), BOUNDS)


MODELS = {
    "resnet18": ("resnet18", {"channels": [8, 16, 16, 32]}, "resnet18", {}),
    "resnet18 4x": ("resnet18", {"channels": [8, 16, 16, 32]}, "resnet18", {"cell_num_ratio": 4}),
    "convnext": ("convnext_atto", {"dims": [8, 16, 16, 32]}, "convnext_tiny", {}),
    "mobilenetv2": ("mobilenetv2_035", {}, "mobilenetv2_1x", {}),
    "deit": ("deit_tiny_patch16_224", {"embed_dim": 24, "img_size": 32}, "deit", {}),
    "tensorflow's padding": ("tf_mobilenetv3_small_minimal_100", {}, "auto", {}),
}


@pytest.mark.parametrize(("name", "args", "plan", "settings"), MODELS.values(), ids=MODELS)
def test_whole_networks_are_kept(name, args, plan, settings):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **args)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean, std=0.3)
    check_kept(
        model.eval(), torch.randn(4, 3, 32, 32), lambda m: kw.convert(m, plan, **settings), BOUNDS
    )


# --- below a budget of 1 ---------------------------------------------------------------------


def halved(uneven=0.0, **settings):
    """Two 1x1 convolutions whose kernels are four blocks each, converted with half of the cells."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 16, 1, bias=False)).double()
    return model, {"rules": [{"match": "[01]", "warehouse": "all"}], **HALF, **settings}


def blocks_of(kernel):
    """``[m, cell]`` in the order of METHOD: output blocks, then input blocks."""
    return (
        kernel.view(kernel.shape[0] // 4, 4, kernel.shape[1] // 4, 4)
        .transpose(1, 2)
        .reshape(-1, 16)
    )


def test_fewer_cells_hold_the_best_that_they_can():
    model, plan = halved()
    rows = torch.cat([blocks_of(layer.weight[:, :, 0, 0]) for layer in model]).detach()
    values = torch.linalg.svdvals(rows)
    best = (values[:6].square().sum() / values.square().sum()).item()
    kw.convert(model, plan)
    (kept,) = model.warehouses.conversion.warehouses.values()
    assert (kept.mixtures, kept.cells) == (12, 6)
    assert kept.kept == pytest.approx(best, rel=1e-9)
    held = []
    for layer in (model[0], model[1]):
        alpha = layer.attention(torch.randn(3, 8).double(), None)
        assert (alpha.abs().sum(-1) <= 1).all()
        assert torch.equal(alpha[0], alpha[1])
        held.append(alpha[0] @ model.warehouses["all"].cells)
    found = 1 - (rows - torch.cat(held)).square().sum() / rows.square().sum()
    assert found.item() == pytest.approx(best, rel=1e-9)


def test_inputs_decide_what_is_kept():
    """Channels that are large at the inputs count more, and the outputs come nearer."""
    scale = torch.tensor([1, 0.1, 5, 0.1, 0, 0, 0, 0]).double()[:, None, None]
    images = torch.randn(64, 8, 6, 5).double() * scale
    errors = []
    for batches in (None, [images[:32]]):
        model, plan = halved()
        expected = model[0](images[32:])
        kw.convert(model, plan, batches=batches)
        errors.append((model[0](images[32:]) - expected).square().mean().item())
    assert errors[1] < 0.7 * errors[0]
    # Blocks whose input was zero are not lost: in training it may become another one.
    static, _ = halved()
    dead = (scale == 0).double().expand(1, 8, 6, 5)
    assert difference(model[0](dead), static[0](dead)) < 0.9


def test_inputs_count_by_their_mean_over_positions():
    """Layers of large images count no more than others."""
    levels, found = torch.randn(5, 8, 1, 1).double(), []
    for side in (2, 6):
        model, plan = halved(rules=[{"match": "[02]", "warehouse": "all"}])
        model.insert(1, nn.AdaptiveAvgPool2d(1))
        images = levels.expand(-1, -1, side, side)
        found.append(kw.convert(model, plan, batches=[images])(images))
    torch.testing.assert_close(*found)


def test_inputs_of_grouped_layers_count_by_group():
    model = nn.Sequential(nn.Conv2d(16, 16, 1, groups=2), nn.Conv2d(16, 16, 1, groups=2)).double()
    torch.manual_seed(0)
    scale = torch.ones(16, 1, 1).double()
    scale[8:] = 0.01  # the second group hardly matters
    images = torch.randn(64, 16, 5, 5).double() * scale
    expected = model[0](images)
    errors = []
    for batches in (None, [images]):
        converted = copy.deepcopy(model)
        kw.convert(
            converted, {"rules": [{"match": "0", "warehouse": "w"}], **HALF}, batches=batches
        )
        errors.append((converted[0](images) - expected)[:, :8].square().mean().item())
    assert errors[1] < 0.1 * errors[0]


def test_enough_cells_keep_everything_below_one():
    """Kernels of low rank are kept whole."""
    model, plan = halved()
    with torch.no_grad():
        first = torch.randn(4, 4).double()
        for layer in model:
            for o in range(0, layer.out_channels, 4):
                for i in range(0, 8, 4):
                    layer.weight[o : o + 4, i : i + 4, 0, 0] = first * (o + i + 1)
    x = torch.randn(2, 8, 3, 3).double()
    expected = model(x)
    kw.convert(model, plan)
    assert difference(model(x), expected) < 1e-10


@pytest.mark.parametrize("function", [f for f in ATTENTION_FUNCTIONS if f != "contrasting"])
def test_fewer_cells_need_negative_coefficients(function):
    model, plan = halved(attention=function)
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=rf"'all'.*{function}.*start='paper'"):
        kw.convert(model, plan)
    assert [type(module) for module in model.modules()] == before
    kw.convert(model, plan, start="paper")


@pytest.mark.parametrize("plan_settings", [{}, HALF])
def test_weights_that_are_not_finite_are_refused(plan_settings):
    model, plan = halved(**dict.fromkeys(HALF, 1))
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the weight of layer '1' is not finite"):
        kw.convert(model, {**plan, **plan_settings})


def test_shared_weights_are_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"'0'.*shares its weight with '1'"):
        kw.convert(model, {"rules": [{"match": "0", "warehouse": "w"}]})


def test_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(ValueError, match="cannot be trained"):
        kw.convert(narrow_resnet(), "resnet18")


def test_a_second_conversion_leaves_the_branches_of_the_first():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    kw.convert(model, {"rules": [{"match": "0", "warehouse": "a"}]})
    kw.convert(model, {"rules": [{"match": ".*1.*", "warehouse": "b"}]})
    assert [isinstance(m, KWLayer) for m in (model[0], model[1], model[0].attention.fc1)] == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("function", ATTENTION_FUNCTIONS)
def test_reset_parameters_begins_as_a_static_layer(function):
    """Also after a stay on the meta device."""
    with torch.device("meta"):
        layer = KWConv2d(4, 8, 3, cell_num_ratio=2, attention=function)
    layer.to_empty(device="cpu")
    for module in layer.modules():  # children after their parents
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    alpha = layer.attention(torch.randn(2, 4), layer.warehouse.temperature)
    assert torch.equal(alpha[0], alpha[1])
    owners = torch.tensor(layer.attention.own.owners)
    assert torch.equal(alpha[0].argmax(-1), owners)


def test_functions_without_an_inverse_are_refused(monkeypatch):
    monkeypatch.setitem(ATTENTION_FUNCTIONS, "cubed", lambda logits: logits**3)
    with pytest.raises(ValueError, match=r"'cubed' has no inverse .*set start='paper'"):
        kw.convert(narrow_resnet(), "resnet18", attention="cubed")
    kw.convert(narrow_resnet(), "resnet18", attention="cubed", start="paper")


def test_zero_kernels_are_kept():
    model, plan = halved()
    for layer in model:
        nn.init.zeros_(layer.weight)
    kw.convert(model, plan)
    assert not model(torch.randn(2, 8, 3, 3).double()).any()


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "at least one batch"),
        ([torch.empty(0, 8, 3, 3).double()], "at least one batch"),
        (torch.randn(2, 8, 3, 3), r"is a tensor; expected several batches"),
        ([(torch.randn(2, 8, 3, 3).double(), torch.zeros(2))], "without labels"),
        ([torch.randn(2, 8, 3, 3)], "does not take a batch of .2, 8, 3, 3"),
        ([torch.full((2, 8, 3, 3), torch.nan).double()], "input of layer '0' is not finite"),
    ],
)
def test_batches_that_cannot_be(batches, message):
    model, plan = halved()
    with pytest.raises(ValueError, match=message):
        kw.convert(model, plan, batches=batches)
    assert not any(isinstance(module, KWLayer) for module in model.modules())
    kw.convert(model, plan, start="paper", batches=[])  # not looked at


def test_layers_that_no_batch_reaches_count_little(caplog):
    """The scale of the inputs does not matter."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(16, 16, bias=False) for _ in "abc")

        def forward(self, x):
            return self.b(input=self.a(x))

    caplog.set_level(logging.INFO, "kw")
    found = []
    for scale in (1e-3, 1, 1e3):
        torch.manual_seed(0)
        model = Network().double()
        x = torch.randn(8, 5, 16).double() * scale
        expected = model(x)
        rules = {"rules": [{"match": "[abc]", "warehouse": "w"}], **HALF}
        kw.convert(model, rules, batches=[x])
        found.append(difference(model(x), expected))
    assert found == pytest.approx([found[1]] * 3, rel=1e-4)
    assert "layers that no batch reaches count little: c" in caplog.text


def test_cells_that_are_not_needed_may_train():
    """More cells than a cell has values: the others stay random."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(16, 16, 4, groups=16, padding="same") for _ in range(8)))
    kw.convert(model, {"rules": [{"match": ".", "warehouse": "w"}], "cell_num_ratio": 0.5})
    cells = model.warehouses["w"].cells
    assert cells.shape == (64, 16)
    assert cells.any(1).all()


# --- from the start on -----------------------------------------------------------------------


@pytest.mark.parametrize("function", ATTENTION_FUNCTIONS)
@pytest.mark.parametrize("nonlocal_basis_ratio", [1.0, 0.5])
def test_everything_parts_from_the_start(function, nonlocal_basis_ratio):
    """Cells that no mixture starts on begin to move, coefficients to depend on the input."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    settings = {"cell_num_ratio": 2, "attention": function, "norm": "layer"}
    plan, _ = everything({**settings, "nonlocal_basis_ratio": nonlocal_basis_ratio})
    kw.convert(model, plan)
    x, target = torch.randn(16, 8, 6, 6), torch.randn(16, 8, 6, 6)
    x = x + 2 * torch.randn(16, 8, 1, 1)
    start = model.warehouses["all"].cells.detach().clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
    cells = model.warehouses["all"].cells.detach()
    assert (cells != start).any(1).all()
    alpha = model[2].attention(model[2].pooled(model[:2](x)), None)
    varied = (alpha.std(0) > 0).float().mean()
    assert varied > 0.5 if function == "rectified" else varied == 1  # some are negative, hence cut
    assert len(cells.unique(dim=0)) == len(cells)


def test_a_loose_start_moves_more_than_a_firm_one():
    moved = []
    for firmness in (0.1, 10):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))
        plan, _ = everything({"firmness": firmness, "cell_num_ratio": 4})
        kw.convert(model, plan)
        x = torch.randn(16, 8, 3, 3)
        pooled = model[0].pooled(x)
        before = model[0].attention(pooled, None)
        optimizer = torch.optim.SGD(model[0].attention.parameters(), lr=1e-2)
        model(x).square().mean().backward()
        optimizer.step()
        moved.append((model[0].attention(pooled, None) - before).abs().max().item())
    assert moved[0] > 100 * moved[1]


def test_temperature_one_is_the_static_network_too():
    model = narrow_resnet().eval()
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    kw.convert(model, "resnet18")
    kw.set_temperature(model, 1)
    assert difference(model(x), expected) < 1e-2  # coefficients 1 for 1 - eps / c


def test_a_layer_alone_begins_as_a_static_one():
    torch.manual_seed(0)
    layer = KWConv2d(8, 16, 3, padding=1, cell_num_ratio=2)
    x = torch.randn(4, 8, 6, 6)
    alpha = layer.attention(layer.pooled(x), None)
    assert torch.equal(alpha[0], alpha[3])
    kernels = assemble(alpha, layer.warehouse.cells, layer.spec)
    assert difference(layer(x), nn.functional.conv2d(x, kernels[0], layer.bias, padding=1)) < 1e-5
    assert kernels.std().item() == pytest.approx((2 / (16 * 9)) ** 0.5, rel=0.1)
    dynamic = KWConv2d(8, 16, 3, padding=1, start="paper")
    alpha = dynamic.attention(dynamic.pooled(x), None)
    assert not torch.equal(alpha[0], alpha[3])


def test_attention_branches_and_the_classifier_may_have_rates_of_their_own():
    settings = {"lr": 0.5, "weight_decay": 0.1, "attention_lr": 3, "head_lr": 5}
    config = kw.config.config_from_mapping(
        {
            "model": {"name": "resnet18", "kernel_warehouse": {"plan": "resnet18"}},
            "data": {"root": "x"},
            "optimizer": settings,
            "epochs": 1,
            "total_batch_size": 1,
            "batch_size": 1,
        },
        check_model_name=False,
    )
    model = narrow_resnet()
    kw.convert(model, "resnet18")
    optimizer = build_optimizer(model, config.optimizer, torch.device("cpu"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        inside = [names[id(parameter)] for parameter in group["params"]]
        assert {".attention." in name for name in inside} == {group["lr_scale"] == 3}
        assert {name.startswith("fc.") for name in inside} == {group["lr_scale"] == 5}
    assert optimizer.param_groups[0]["lr_scale"] == 1  # the one that is logged
    assert {group["lr_scale"] for group in optimizer.param_groups} == {1, 3, 5}
    model.pretrained_cfg = {}
    with pytest.raises(
        kw.config.ConfigError, match=r"head_lr = 5: .*which module is its classifier"
    ):
        build_optimizer(model, config.optimizer, torch.device("cpu"))


# --- what is said, and wrapped ---------------------------------------------------------------


def test_a_network_without_weights_says_so(caplog):
    caplog.set_level(logging.INFO, "kw")
    with torch.device("meta"):
        kw.convert(narrow_resnet(), "resnet18")
        kw.peers.convert(narrow_resnet(), "odconv")
    assert len(caplog.records) == 2
    assert all(r.message.endswith("; no weights yet (meta device)") for r in caplog.records)


@pytest.mark.parametrize("frozen", [0, 1, 20])
def test_frozen_layers_that_train_are_said(frozen, caplog):
    caplog.set_level(logging.INFO, "kw")
    model = narrow_resnet()
    convolutions = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)][1:]
    for module in convolutions[:frozen]:
        module.requires_grad_(False)
    kw.convert(model, "resnet18")
    lines = [r.message for r in caplog.records[1:]]
    few = "layer1.0.conv1, layer1.0.conv2, layer1.0.downsample.0, ..."
    assert lines == {
        0: [],
        1: ["1 layer was frozen and trains now (layer1.0.conv1); freeze after the conversion"],
        20: [f"20 layers were frozen and train now ({few}); freeze after the conversion"],
    }.get(frozen)


def test_one_line_says_what_was_done(caplog):
    caplog.set_level(logging.INFO, "kw")
    model = narrow_resnet()
    before = sum(p.numel() for p in model.parameters())
    kw.convert(model, "resnet18")
    (record,) = caplog.records
    after = sum(p.numel() for p in model.parameters())
    line = record.message
    assert "\n" not in line
    for part in ("20 layers converted to 4 warehouses", "2 layers static (conv1, fc)", "kept"):
        assert part in line
    assert f"{before:,} -> {after:,} ({100 * (after / before - 1):+.1f}%)" in line
    caplog.clear()
    kw.convert(narrow_resnet(), "resnet18", start="paper")
    assert "weights replaced by random ones" in caplog.records[0].message
    caplog.clear()
    kw.convert(narrow_resnet(), "resnet18", warehouses={"layer1": {"start": "paper"}})
    assert (
        "kept in part: 3 warehouses, those of 1 other replaced by random ones"
        in caplog.records[0].message
    )
    caplog.clear()
    kw.convert(narrow_resnet(), "resnet18", announce=False)
    assert not caplog.records


def test_the_line_goes_to_stderr_where_nobody_logs(capsys, monkeypatch):
    kw.convert(narrow_resnet(), "resnet18")  # a handler is there, but for warnings only
    assert "20 layers converted" in capsys.readouterr().err
    monkeypatch.setattr(logging.Logger, "hasHandlers", lambda self: False)
    kw.convert(narrow_resnet(), "resnet18")
    assert "20 layers converted" in capsys.readouterr().err
    monkeypatch.setattr(logging.getLogger("kw"), "level", logging.WARNING)
    kw.convert(narrow_resnet(), "resnet18")
    assert not capsys.readouterr().err
    monkeypatch.setattr(logging.getLogger("kw"), "level", logging.NOTSET)
    monkeypatch.setenv("RANK", "1")
    kw.convert(narrow_resnet(), "resnet18")
    assert not capsys.readouterr().err


def test_copies_keep_start_and_report():
    model = narrow_resnet()
    kw.convert(model, "resnet18")
    x = torch.randn(2, 3, 32, 32)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.eval()(x), model.eval()(x))
        assert other.warehouses.conversion == model.warehouses.conversion


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_what_it_can(dtype):
    model = narrow_resnet().to(dtype)
    weight = model.layer1[0].conv1.weight.detach().clone()
    kw.convert(model, "resnet18")
    layer = model.layer1[0].conv1
    alpha = layer.attention(torch.randn(1, 64), None)
    kernel = assemble(alpha, layer.warehouse.cells.float(), layer.spec)[0]
    assert difference(kernel, weight.float()) < 3 * torch.finfo(dtype).eps


def test_on_the_meta_device_nothing_is_kept():
    with torch.device("meta"):
        model = narrow_resnet()
        kw.convert(model, "resnet18")
    kept = model.warehouses.conversion.warehouses.values()
    assert all(warehouse.kept is None for warehouse in kept)
    whole = narrow_resnet()
    kw.convert(whole, "resnet18")
    model.to_empty(device="cpu").load_state_dict(whole.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(x), whole.eval()(x))


def test_the_papers_start_is_drawn_as_before():
    """Cells and branches are the first things that the conversion draws, in their order."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3))
    torch.manual_seed(4)
    kw.convert(model, {"rules": [{"match": ".", "warehouse": "w"}]}, start="paper")
    torch.manual_seed(4)
    cells = torch.empty(27, 32)
    for rows, count in ((cells[:9], 9), (cells[9:], 18)):
        nn.init.kaiming_normal_(rows.view(8 * count, 4, 1, 1), mode="fan_out", nonlinearity="relu")
    assert torch.equal(model.warehouses["w"].cells, cells)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"start": "kept"}, "start 'kept' is unknown; choose one of 'keep', 'paper'"),
        ({"firmness": 0.0}, "firmness is 0.0; expected a number from 0.001"),
        ({"firmness": float("nan")}, "firmness is nan"),
    ],
)
def test_settings_that_cannot_be(setting, message):
    with pytest.raises(ValueError, match=message):
        kw.convert(narrow_resnet(), "resnet18", **setting)
    with pytest.raises(ValueError, match=message):
        KWConv2d(4, 4, 3, **setting)


def test_a_single_cell_needs_more_than_the_least_firmness():
    """At 0.001 its coefficient is 0: no cell times it is the kernel."""
    with pytest.raises(ValueError, match=r"firmness is 0.001; .* above 0.001 for a single cell"):
        KWConv2d(8, 8, 1, firmness=0.001)
    assert KWConv2d(8, 8, 1, firmness=0.0011)(torch.randn(2, 8, 3, 3)).isfinite().all()
    assert KWConv2d(8, 8, 3, firmness=0.001)(torch.randn(2, 8, 3, 3)).isfinite().all()


def test_plans_leave_the_start_to_the_user():
    assert {plan.settings.start for plan in PLANS.values()} == {"keep"}
