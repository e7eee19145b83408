"""``convert``: the released layout to the last parameter, what it keeps, and what it refuses."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

from kw import convert, get_temperature, set_temperature
from kw.warehouse import (
    PLANS,
    KWConv1d,
    KWConv2d,
    KWConv3d,
    KWLayer,
    KWLinear,
    Plan,
    Rule,
    WarehouseSettings,
    resolve_plan,
    set_backend,
)
from kw.warehouse.warehouse import WarehouseDict

HALF = {"cell_inplane_ratio": 0.5, "cell_outplane_ratio": 0.5}
# Parameter counts of the authors' released checkpoints, and the shapes of their warehouses.
RESNET18 = {
    "1x": ({}, 11_932_148, (56, 47, 47, 27), (64, 128, 256, 512)),
    "2x": ({"cell_num_ratio": 2}, 23_242_127, (112, 94, 94, 54), (64, 128, 256, 512)),
    "4x": ({"cell_num_ratio": 4}, 45_862_085, (224, 188, 188, 108), (64, 128, 256, 512)),
    "1/2x": ({"cell_num_ratio": 1 / 2, **HALF}, 7_431_044, (112, 94, 94, 54), (32, 64, 128, 256)),
    "1/4x": ({"cell_num_ratio": 1 / 4, **HALF}, 4_031_768, (56, 47, 47, 27), (32, 64, 128, 256)),
}
RESNET18_STATIC = 11_689_512
# Which layer shares with which: a stage hands its cells over to the next one's first layers.
STAGES = {
    "layer1": ["1.0.conv1", "1.0.conv2", "1.1.conv1", "1.1.conv2", "2.0.conv1", "2.0.downsample.0"],
    "layer2": ["2.0.conv2", "2.1.conv1", "2.1.conv2", "3.0.conv1", "3.0.downsample.0"],
    "layer3": ["3.0.conv2", "3.1.conv1", "3.1.conv2", "4.0.conv1", "4.0.downsample.0"],
    "layer4": ["4.0.conv2", "4.1.conv1", "4.1.conv2"],
}


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def narrow_resnet(**settings):
    torch.manual_seed(0)
    return timm.create_model("resnet18", channels=[8, 16, 16, 32], num_classes=5, **settings)


def chain(*layers):
    """A root that is no Sequential, with layers ``a``, ``b``, ..."""
    model = nn.Module()
    for name, layer in zip("abcdef", layers, strict=False):
        model.add_module(name, layer)
    return model


def plan_of(*rules, **rest):
    return {"rules": [{"match": m, "warehouse": w} for m, w in rules], **rest}


def refusal(model, plan, **overrides):
    """The message of the refusal, after which the model must be what it was."""
    before = [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)]
    tensors = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"\w") as error:
        convert(model, plan, **overrides)
    after = [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)]
    assert after == before
    for name, parameter in model.named_parameters():
        assert id(parameter) == tensors[name][0]
        assert torch.equal(parameter, tensors[name][1])
    return str(error.value)


# --- the released ResNet18 ----------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "count", "cells", "widths"), RESNET18.values(), ids=RESNET18)
def test_resnet18_to_the_last_parameter(settings, count, cells, widths):
    with torch.device("meta"):
        model = convert(timm.create_model("resnet18"), "resnet18", **settings)
    assert parameters(model) == count
    assert list(model.warehouses) == list(STAGES)
    warehouses = list(model.warehouses.values())
    assert tuple(w.partition.cells for w in warehouses) == cells
    shapes = [w.partition.cell_shape for w in warehouses]
    assert shapes == [(width, width, 1, 1) for width in widths]
    for warehouse, width, number in zip(warehouses, widths, cells, strict=True):
        assert warehouse.cells.shape == (number, width * width)


def test_resnet18_membership():
    """Who shares with whom, in the order in which cells are handed out; the rest stays static."""
    with torch.device("meta"):
        static = timm.create_model("resnet18")
        assert parameters(static) == RESNET18_STATIC
        model = convert(static, "resnet18")
    for name, members in STAGES.items():
        names = [f"layer{member}" for member in members]
        warehouse = model.warehouses[name]
        assert [shape.name for shape in warehouse.shapes] == names
        starts = []
        for layer in map(model.get_submodule, names):
            assert layer.warehouse is warehouse
            starts.append(layer.attention.own.start)
        assert starts == sorted(set(starts))
        assert starts[0] == 0
    dynamic = [m for m in model.modules() if isinstance(m, KWLayer)]
    assert len(dynamic) == sum(map(len, STAGES.values())) == 19
    assert type(model.conv1) is nn.Conv2d
    assert type(model.fc) is nn.Linear


def own_kernels(model):
    """Static weights from the converted model's cells, put together by hand (1x, whole planes).

    Layer after layer takes the next cells of its warehouse; cell (s, go, gi) is the block at
    spatial position s, output block go, input block gi.
    """
    state = model.state_dict()
    widths = {"layer1": 64, "layer2": 128, "layer3": 256, "layer4": 512}
    kernels = {}
    for warehouse, members in STAGES.items():
        width, taken = widths[warehouse], 0
        cells = state[f"warehouses.{warehouse}.cells"].view(-1, width, width)
        for member in members:
            stage = int(member[0])
            first = member.endswith(("0.conv1", "downsample.0"))
            outs, ins = 32 * 2**stage, 32 * 2 ** (stage - (first and stage > 1))
            size = 1 if "downsample" in member else 3
            kernel = torch.empty(outs, ins, size, size)
            for row in range(size):
                for column in range(size):
                    for o in range(0, outs, width):
                        for i in range(0, ins, width):
                            block = kernel[o : o + width, i : i + width, row, column]
                            block.copy_(cells[taken])
                            taken += 1
            kernels[f"layer{member}.weight"] = kernel
        assert taken == len(cells)
    return kernels


@torch.no_grad()
def test_temperature_1_is_the_static_resnet18():
    torch.manual_seed(0)
    static = timm.create_model("resnet18", num_classes=10)
    # timm starts residual branches at zero: what they compute would not be seen.
    for module in static.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1)
            module.running_mean.normal_(0, 0.1)
    model = convert(copy.deepcopy(static), "resnet18")
    missing, unexpected = static.load_state_dict(own_kernels(model), strict=False)
    assert not unexpected
    assert "fc.weight" in missing
    static.eval(), model.eval()
    x = torch.randn(2, 3, 48, 48)
    set_temperature(model, 1.0)
    expected = static(x)
    error = (model(x) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5
    set_temperature(model, 0.0)
    assert (model(x) - expected).abs().max() > 1e-2 * expected.abs().max()


# --- what conversion keeps ----------------------------------------------------------------------


def test_the_model_is_changed_in_place_and_keeps_its_class():
    model = narrow_resnet()
    assert convert(model, "resnet18") is model
    assert type(model) is timm.models.ResNet
    names = [name for name, _ in narrow_resnet().named_modules()]
    kept = [n for n, _ in model.named_modules() if "attention" not in n and "warehouses" not in n]
    assert kept == names
    assert model.num_features == 32


def test_sequential_roots():
    """Warehouses are the last child of a Sequential and leave its result alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(8, 4, 1)))
    convert(model, plan_of(("0", "x"), (r"1\.1", "y")))
    assert isinstance(model[-1], WarehouseDict)
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(model(x), model[1](model[0](x)))
    assert model(x).shape == (2, 4, 3, 3)


def test_all_kinds_of_layers():
    layers = (nn.Conv1d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv3d(4, 4, 1), nn.Linear(4, 4))
    model = convert(chain(*layers), plan_of(("[a-d]", "w")))
    assert [type(m) for m in (model.a, model.b, model.c, model.d)] == [
        KWConv1d,
        KWConv2d,
        KWConv3d,
        KWLinear,
    ]
    assert model.warehouses["w"].partition.cells == 4


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 8, 3, 2, 1, 1, 2, bias=False),
        nn.Conv2d(4, 8, (3, 2), (1, 2), (2, 0), (1, 3), padding_mode="circular"),
        nn.Conv2d(4, 8, (4, 2), padding="same", padding_mode="reflect"),
        nn.Conv2d(4, 4, 5, padding="valid", groups=4),
    ],
)
@torch.no_grad()
def test_geometry_and_bias_are_kept(conv):
    """At temperature 1 the layer is a convolution as before, with its own cells for a kernel."""
    model = convert(nn.Sequential(copy.deepcopy(conv)), plan_of(("0", "w")))
    layer = model[0]
    assert (layer.bias is None) == (conv.bias is None)
    set_temperature(model, 1.0)
    cells = layer.warehouse.cells  # one cell a position: the kernel has one block of channels
    conv.weight.copy_(cells.view(-1, *conv.weight.shape[:2]).permute(1, 2, 0).view_as(conv.weight))
    x = torch.randn(2, 4, 9, 8)
    torch.testing.assert_close(model(x), conv(x))


def test_bias_is_the_same_parameter():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Linear(4, 2))
    biases = [layer.bias for layer in model]
    biases[0].requires_grad_(False)
    convert(model, plan_of(("0", "x"), ("1", "y")))
    assert model[0].bias is biases[0]
    assert model[1].bias is biases[1]
    assert not model[0].bias.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_dtype_and_device_are_kept(dtype, device):
    model = narrow_resnet().to(device=device, dtype=dtype)
    convert(model, "resnet18")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.device.type == device, name
        assert tensor.dtype == dtype or not tensor.is_floating_point(), name


def test_training_flags_are_kept():
    model = narrow_resnet()
    model.eval()
    model.layer2.train()
    convert(model, "resnet18")
    for name, module in model.named_modules():
        if "warehouses" not in name and name:
            assert module.training == name.startswith("layer2"), name


def test_temperature_starts_at_zero():
    assert get_temperature(convert(narrow_resnet(), "resnet18")) == 0


def test_backend_is_set_where_it_can_do_the_layer():
    model = convert(narrow_resnet(), "resnet18").eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        for backend in ("reference", "grouped", "auto"):
            set_backend(model, backend)
            assert {m.backend for m in model.modules() if isinstance(m, KWLayer)} == {backend}
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="'bmm'.*3x3"):
        set_backend(model, "bmm")
    with pytest.raises(ValueError, match="no KernelWarehouse layer"):
        set_backend(narrow_resnet(), "grouped")


def test_a_second_conversion_adds_warehouses():
    model = chain(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    convert(model, plan_of(("a", "first")))
    first = model.warehouses["first"]
    convert(model, plan_of(("b", "second")))
    assert list(model.warehouses) == ["first", "second"]
    assert model.a.warehouse is model.warehouses["first"] is first
    assert model.b.warehouse is model.warehouses["second"]


# --- plans --------------------------------------------------------------------------------------


def test_a_mapping_is_the_same_plan_as_objects():
    mapping = {
        "rules": [
            {"match": "conv1", "static": True},
            {
                "match": r"layer(?P<stage>\d)\..*conv\d",
                "warehouse": "layer{stage}",
                "handover": r"layer[234]\.0\.conv1",
                "attention": "softmax",
            },
        ],
        "cell_num_ratio": 2,
        "warehouses": {"layer3": {"norm": "layer"}},
    }
    rule = Rule(
        r"layer(?P<stage>\d)\..*conv\d",
        "layer{stage}",
        r"layer[234]\.0\.conv1",
        {"attention": "softmax"},
    )
    settings = WarehouseSettings(cell_num_ratio=2)
    plan = Plan((Rule("conv1"), rule), settings, {"layer3": {"norm": "layer"}})
    assert Plan.from_mapping(mapping) == plan
    assert resolve_plan(mapping) == plan
    assert resolve_plan("resnet18") is PLANS["resnet18"]
    one, other = convert(narrow_resnet(), mapping), convert(narrow_resnet(), plan)
    assert str(one) == str(other)
    assert list(one.warehouses) == list(other.warehouses) == [f"layer{i}" for i in (1, 2, 3, 4)]
    other.load_state_dict(one.state_dict(), strict=True)


def test_warehouses_are_numbered_by_rule_and_their_layers_by_module():
    layers = [nn.Conv2d(4, 4, 1) for _ in range(4)]
    model = convert(chain(*layers), plan_of(("[bd]", "late"), ("c", "early"), ("a", "late")))
    assert list(model.warehouses) == ["late", "early"]
    assert [s.name for s in model.warehouses["late"].shapes] == ["a", "b", "d"]
    starts = [m.attention.own.start for m in (model.a, model.b, model.d)]
    assert starts == [0, 1, 2]


def test_names_must_match_as_a_whole():
    message = refusal(chain(nn.Conv2d(4, 4, 1)), plan_of(("a.", "w")))
    assert "'a.' matches no layer" in message


def test_settings_come_from_the_nearest_place():
    """A warehouse's own, before overrides of ``convert``, before its rule's, before the plan's."""
    plan = {
        "rules": [
            {"match": "a", "warehouse": "x", "attention": "softmax", "reduction": 0.25},
            {"match": "b", "warehouse": "y"},
            {"match": "c", "warehouse": "z", "reduction": 0.25},
        ],
        "attention": "sigmoid",
        "reduction": 0.5,
        "warehouses": {"z": {"cell_num_ratio": 4, "attention": "rectified"}},
    }

    def used(**overrides):
        layers = [nn.Conv2d(64, 64, 1) for _ in range(3)]
        model = convert(chain(*layers), plan, **overrides)
        return [
            (
                layer.attention.function,
                layer.attention.fc1.out_features,
                layer.warehouse.partition.cells,
            )
            for layer in (model.a, model.b, model.c)
        ]

    assert used() == [("softmax", 16, 1), ("sigmoid", 32, 1), ("rectified", 16, 4)]
    assert used(reduction=1, cell_num_ratio=2) == [
        ("softmax", 64, 2),
        ("sigmoid", 64, 2),
        ("rectified", 64, 4),
    ]
    assert used(warehouses={"z": {"cell_num_ratio": 3}, "y": {"attention": "softmax"}}) == [
        ("softmax", 16, 1),
        ("softmax", 32, 1),
        ("rectified", 16, 3),
    ]


def test_settings_of_one_warehouse_take_effect():
    own = {"layer2": {"cell_num_ratio": 2, "norm": "layer"}, "layer4": {"reduction": 1}}
    model = convert(narrow_resnet(), "resnet18", warehouses=own)
    plain = convert(narrow_resnet(), "resnet18")
    for name, warehouse in model.warehouses.items():
        budget = 2 if name == "layer2" else 1
        assert warehouse.partition.cells == budget * plain.warehouses[name].partition.cells
    assert isinstance(model.layer2[1].conv1.attention.norm1, nn.LayerNorm)
    assert isinstance(model.layer1[1].conv1.attention.norm1, nn.BatchNorm1d)
    assert model.layer4[1].conv1.attention.fc1.out_features == 32
    assert PLANS["resnet18"].warehouses == {}


def test_a_static_rule_shields_from_later_rules():
    rules = [{"match": "b", "static": True}, {"match": "[abc]", "warehouse": "w"}]
    model = convert(chain(*(nn.Conv2d(4, 4, 1) for _ in range(3))), {"rules": rules})
    assert type(model.b) is nn.Conv2d
    assert [s.name for s in model.warehouses["w"].shapes] == ["a", "c"]


def test_handover_across_several_stages():
    """The layer joins the warehouse that was opened last before its own."""
    layers = [nn.Conv2d(4, 4, 1) for _ in range(5)]
    rule = Rule("(?P<own>[a-e])", "{own}", "[bde]")
    model = convert(chain(*layers), Plan((rule,)))
    members = {name: [s.name for s in w.shapes] for name, w in model.warehouses.items()}
    assert members == {"a": ["a", "b"], "c": ["c", "d", "e"]}


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet81", "resnet", "ResNet18"])
def test_unknown_plan(name):
    message = refusal(narrow_resnet(), name)
    assert f"plan {name!r} is unknown" in message
    assert "'resnet18'" in message


def test_rule_without_a_layer():
    plan = plan_of((r"layer1\.0\.conv1", "w"), (r"layer1.0.cnv2", "w"))
    message = refusal(narrow_resnet(), plan)
    for fact in ("'layer1.0.cnv2'", "matches no layer of ResNet", "nearest: 'layer1.0.conv2'"):
        assert fact in message


def test_a_converted_model_has_no_layers_left():
    message = refusal(convert(narrow_resnet(), "resnet18"), "resnet18")
    assert "matches no layer of ResNet" in message


def test_layer_claimed_by_two_rules():
    model = chain(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    message = refusal(model, plan_of(("[ab]", "first"), ("b", "second")))
    for fact in ("layer 'b'", "'first'", "'[ab]'", "'second'", "narrow"):
        assert fact in message


def test_layer_claimed_twice_for_one_warehouse():
    message = refusal(chain(nn.Conv2d(4, 4, 1)), plan_of(("a", "w"), ("[ab]", "w")))
    for fact in ("layer 'a'", "'w'", "'[ab]'", "narrow"):
        assert fact in message


@pytest.mark.parametrize("match", ["a|b", "a", "b"])
def test_module_that_stands_twice_in_the_network(match):
    """Also where the plan names one place only: replacing it there would untie the two."""
    conv = nn.Conv2d(4, 4, 1)
    message = refusal(chain(conv, conv, nn.Conv2d(4, 4, 1)), plan_of((match, "w"), ("c", "v")))
    for fact in ("layer 'a'", "'b'", "warehouse 'w'", "same module", "static"):
        assert fact.replace("layer 'a'", "'a'") in message


def test_shared_module_may_stay_static():
    conv = nn.Conv2d(4, 4, 1)
    model = convert(chain(conv, conv, nn.Conv2d(4, 4, 1)), plan_of(("c", "w")))
    assert model.a is model.b is conv


class OwnConv(nn.Conv2d):
    """A subclass may compute something else."""


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.ConvTranspose2d(4, 4, 1), "ConvTranspose2d"),
        (nn.Embedding(4, 4), "Embedding"),
        (OwnConv(4, 4, 1), "OwnConv"),
        (nn.LazyConv2d(4, 1), "LazyConv2d"),
        (nn.Bilinear(4, 4, 4), "Bilinear"),
    ],
)
def test_unconvertible_type(layer, kind):
    model = nn.Module()
    model.first, model.odd = nn.Conv2d(4, 4, 1), layer
    plan = plan_of(("first|odd", "w"))
    with pytest.raises(ValueError, match=r"layer 'odd' is a") as error:
        convert(model, plan)
    for fact in (kind, "Conv1d, Conv2d, Conv3d, Linear", "static: true", "before"):
        assert fact in str(error.value)
    assert type(model.first) is nn.Conv2d
    assert model.odd is layer
    convert(model, plan_of(("first", "w")))
    assert type(model.first) is KWConv2d


@pytest.mark.parametrize(
    "normalise",
    [nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm],
    ids=["parametrized", "hooked"],
)
def test_weight_that_is_computed(normalise):
    """Converting would silently drop what computes it."""
    model = chain(nn.Conv2d(4, 4, 1), normalise(nn.Conv2d(4, 4, 1)))
    with pytest.raises(ValueError, match="weight of layer 'b' is no parameter") as error:
        convert(model, plan_of(("[ab]", "w")))
    assert "remove that first" in str(error.value)
    assert type(model.a) is nn.Conv2d


def test_static_rule_too_late():
    rules = [{"match": "[ab]", "warehouse": "w"}, {"match": "b", "static": True}]
    message = refusal(chain(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)), {"rules": rules})
    for fact in ("layer 'b'", "'w'", "'[ab]'", "static", "first"):
        assert fact in message


def test_plan_of_static_rules_only():
    message = refusal(chain(nn.Conv2d(4, 4, 1)), {"rules": [{"match": "a", "static": True}]})
    assert "every layer" in message
    assert "'warehouse'" in message


def test_settings_that_two_rules_give_differently():
    rules = [
        {"match": "a", "warehouse": "w", "attention": "softmax"},
        {"match": "b", "warehouse": "w", "attention": "sigmoid"},
    ]
    model = chain(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    message = refusal(model, {"rules": rules})
    for fact in ("rule 'b'", "'w'", "'warehouses'"):
        assert fact in message
    rules[1]["attention"] = "softmax"
    assert convert(model, {"rules": rules}).b.attention.function == "softmax"


@pytest.mark.parametrize(
    ("plan", "overrides", "facts"),
    [
        ({"cell_num_ration": 2}, {}, ["plan:", "'cell_num_ration'", "'cell_num_ratio'"]),
        ({}, {"cell_num_ration": 2}, ["convert:", "'cell_num_ration'", "'cell_num_ratio'"]),
        ({}, {"colour": "red"}, ["convert:", "'colour'", "reduction"]),
        (
            {"warehouses": {"w": {"nrom": "layer"}}},
            {},
            ["warehouse 'w'", "'nrom'", "did you mean 'norm'"],
        ),
        ({}, {"warehouses": {"w": {"nrom": 1}}}, ["warehouse 'w'", "did you mean 'norm'"]),
        ({"warehouses": {"v": {"norm": "layer"}}}, {}, ["warehouse 'v'", "nearest: 'w'"]),
        ({}, {"warehouses": {"v": {"norm": "layer"}}}, ["warehouse 'v'", "nearest: 'w'"]),
        ({}, {"norm": "group"}, ["'w'", "layer 'a'", "'group'", "'batch' or 'layer'"]),
        ({}, {"cell_num_ratio": 1.5}, ["'w'", "'a'", "1.5", "1 / integer"]),
        ({}, {"cell_inplane_ratio": 0.75}, ["'w'", "'a'", "cell_inplane_ratio", "1 / integer"]),
        ({}, {"cell_num_ratio": 0.5}, ["'w'", "'a' 9", "multiple of 4"]),
    ],
)
def test_settings_that_cannot_be(plan, overrides, facts):
    message = refusal(chain(nn.Conv2d(16, 8, 3)), plan_of(("a", "w"), **plan), **overrides)
    for fact in facts:
        assert fact in message


@pytest.mark.parametrize(
    ("rules", "facts"),
    [
        (None, ["'rules'", "at least one"]),
        ([], ["'rules'", "at least one"]),
        ("conv", ["'rules'", "list"]),
        ([{"warehouse": "w"}], ["no 'match'"]),
        ([{"match": 3, "warehouse": "w"}], ["no 'match'"]),
        ([{"match": "a"}], ["'a'", "'warehouse: NAME'", "'static: true'"]),
        ([{"match": "a", "warehouse": "w", "static": True}], ["either"]),
        ([{"match": "a", "static": "yes"}], ["either"]),
        ([{"match": "a", "warehouse": "w", "nrom": 1}], ["rule 'a'", "did you mean 'norm'"]),
        ([{"match": "(a", "warehouse": "w"}], ["match '(a'", "regular expression"]),
        ([{"match": "a", "warehouse": "w", "handover": "["}], ["handover '['"]),
        ([{"match": "a", "static": True, "handover": "a"}], ["handover", "no warehouse"]),
        ([{"match": "a", "warehouse": "w{stage}"}], ["{stage}", "(?P<stage>...)"]),
        ([{"match": "a", "warehouse": "w.1"}], ["'w.1'", "without dots"]),
        ([{"match": "a", "warehouse": "forward"}], ["'forward' cannot name"]),
        ([{"match": "a", "warehouse": "_parameters"}], ["'_parameters' cannot name"]),
        ([{"match": "a", "warehouse": ""}], ["'' cannot name"]),
    ],
)
def test_rules_that_are_none(rules, facts):
    message = refusal(chain(nn.Conv2d(4, 4, 1)), {"rules": rules})
    for fact in facts:
        assert fact in message


def test_handover_without_a_warehouse_before():
    rule = Rule(r"(?P<own>[ab])", "{own}", "a")
    message = refusal(chain(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)), Plan((rule,)))
    for fact in ("layer 'a'", "before 'a'", "narrow 'handover'"):
        assert fact in message


def test_unequal_kernels_that_are_to_stay_whole():
    model = chain(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1))
    message = refusal(model, plan_of(("[ab]", "w"), spatial_partition=False))
    for fact in ("'w'", "'a' 3x3", "'b' 1x1", "spatial_partition"):
        assert fact in message


def test_the_last_of_many_warehouses_refused_leaves_the_rest_alone():
    message = refusal(narrow_resnet(), "resnet18", warehouses={"layer4": {"cell_num_ratio": 1.5}})
    assert "'layer4'" in message


def test_second_conversion_under_a_name_that_is_taken():
    model = convert(chain(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)), plan_of(("a", "w")))
    message = refusal(model, plan_of(("b", "w")))
    assert "already has a warehouse 'w'" in message


def test_attribute_warehouses_of_the_models_own():
    model = chain(nn.Conv2d(4, 4, 1))
    model.warehouses = nn.Identity()
    assert "'warehouses' of its own" in refusal(model, plan_of(("a", "w")))


@pytest.mark.parametrize("kind", [nn.ModuleList, lambda layers: nn.ModuleDict({"0": layers[0]})])
def test_roots_that_cannot_hold_warehouses(kind):
    message = refusal(kind([nn.Conv2d(4, 4, 1)]), plan_of(("0", "w")))
    assert "cannot hold warehouses" in message


def test_a_single_layer_cannot_be_converted():
    assert "matches no layer of Conv2d" in refusal(nn.Conv2d(4, 4, 1), plan_of((".*", "w")))


# --- imports ------------------------------------------------------------------------------------


def test_conversion_needs_torch_alone():
    """In an interpreter of its own: converting a plain network imports no other library of ours."""
    code = (
        "import sys\n"
        "from kw import convert, set_temperature\n"
        "from torch import nn\n"
        "rules = [{'match': '0', 'warehouse': 'w'}]\n"
        "model = convert(nn.Sequential(nn.Conv2d(4, 4, 3)), {'rules': rules})\n"
        "set_temperature(model, 0.5)\n"
        "heavy = {'mmengine', 'timm', 'torchvision', 'yaml', 'mmdet', 'cv2', 'PIL', 'sklearn'}\n"
        "print(sorted(heavy & set(sys.modules)), 'kw' in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[] True"
