"""``convert``: who shares with whom in ResNet18, and what a conversion keeps."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from networks import chain, narrow_resnet, plan_of
from timm.layers import Conv2dSame
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kw import convert, get_temperature, peers, set_temperature
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

RESNET18 = Path(__file__).parents[1] / "configs/imagenet/resnet18/resnet18.yaml"
# Which layer shares with which: a stage hands its cells over to the next one's first layers.
STAGES = {
    "layer1": ["1.0.conv1", "1.0.conv2", "1.1.conv1", "1.1.conv2", "2.0.conv1", "2.0.downsample.0"],
    "layer2": ["2.0.conv2", "2.1.conv1", "2.1.conv2", "3.0.conv1", "3.0.downsample.0"],
    "layer3": ["3.0.conv2", "3.1.conv1", "3.1.conv2", "4.0.conv1", "4.0.downsample.0"],
    "layer4": ["4.0.conv2", "4.1.conv1", "4.1.conv2"],
}


# --- the released ResNet18 ----------------------------------------------------------------------


def test_resnet18_membership():
    """Who shares with whom, in the order in which cells are handed out; the rest stays static."""
    with torch.device("meta"):
        model = convert(timm.create_model("resnet18"), "resnet18")
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


@pytest.mark.parametrize("plan", ["resnet18", "auto", "dyconv"])
def test_converted_without_values(plan, capsys):
    """As on the meta device: shapes alone, for estimates of memory before there is any."""
    shapes = []
    for mode in (FakeTensorMode(), torch.device("meta")):
        with mode:
            assert KWConv2d(8, 8, 3)(torch.zeros(2, 8, 9, 9)).shape == (2, 8, 7, 7)
            model = narrow_resnet()
            peers.convert(model, plan) if plan == "dyconv" else convert(model, plan)
            assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
        assert "no weights yet" in capsys.readouterr().err
        shapes.append({name: tuple(p.shape) for name, p in model.named_parameters()})
    assert shapes[0] == shapes[1]


def own_kernels(model):
    """Static weights from the converted model's cells, put together by hand (1x, whole planes).

    Layer after layer takes the next cells of its warehouse; cell (s, go, gi) is the block at
    spatial position s, output block go, input block gi.
    """
    widths = {"layer1": 64, "layer2": 128, "layer3": 256, "layer4": 512}
    kernels = {}
    for warehouse, members in STAGES.items():
        width, taken = widths[warehouse], 0
        cells = model.warehouses[warehouse].cells.view(-1, width, width)
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
    model = convert(copy.deepcopy(static), "resnet18", start="paper")
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
    kept = [n for n, _ in model.named_modules() if "attention" not in n and "warehouse" not in n]
    assert kept == names
    assert model.num_features == 32


def test_sequential_roots():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(8, 4, 1)))
    convert(model, plan_of(("0", "x"), (r"1\.1", "y")))
    assert len(model) == 2
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
    model = convert(nn.Sequential(copy.deepcopy(conv)), plan_of(("0", "w"), start="paper"))
    layer = model[0]
    assert (layer.bias is None) == (conv.bias is None)
    set_temperature(model, 1.0)
    cells = layer.warehouse.cells  # one cell a position: the kernel has one block of channels
    conv.weight.copy_(cells.view(-1, *conv.weight.shape[:2]).permute(1, 2, 0).view_as(conv.weight))
    x = torch.randn(2, 4, 9, 8)
    torch.testing.assert_close(model(x), conv(x))


@pytest.mark.parametrize(
    ("conv", "later"),
    [
        (nn.Conv2d(4, 8, 3, 2, 1), {"dilation": (2, 2), "padding": (2, 2), "stride": (1, 1)}),
        (nn.Conv2d(4, 8, 3, padding=1), {"padding_mode": "circular"}),
        (nn.Conv2d(4, 8, (4, 2), padding="same"), {"padding": (1, 0), "stride": 2}),
        (nn.Conv1d(4, 8, 3, groups=2), {"dilation": 2}),
        (Conv2dSame(4, 8, 3, 2), {"stride": (1, 1), "dilation": (2, 2)}),
    ],
)
@pytest.mark.parametrize("duplicate", [lambda m: m, copy.deepcopy])
@torch.no_grad()
def test_geometry_may_be_set_later(conv, later, duplicate):
    """Networks for segmentation take strides out of a backbone in this way; it had no effect."""
    conv = copy.deepcopy(conv)
    (layer,) = model = duplicate(convert(nn.Sequential(copy.deepcopy(conv)), plan_of(("0", "w"))))
    for name, value in later.items():
        for module in (conv, layer):
            setattr(module, name, value)
    x = torch.randn(2, 4, 9, 8) if conv.weight.ndim == 4 else torch.randn(2, 4, 9)
    torch.testing.assert_close(model(x), conv(x))


def test_geometry_that_cannot_be_is_refused_later_too():
    layer = KWConv2d(4, 8, 3, padding="same")
    for name, value in {"stride": 2, "padding_mode": "mirror", "dilation": (1, 1, 1)}.items():
        with pytest.raises(ValueError, match=r"same|mirror|one size per axis"):
            setattr(copy.deepcopy(layer), name, value)


def test_bias_is_the_same_parameter():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Linear(4, 2))
    biases = [layer.bias for layer in model]
    biases[0].requires_grad_(False)
    convert(model, plan_of(("0", "x"), ("1", "y")))
    assert model[0].bias is biases[0]
    assert model[1].bias is biases[1]
    assert not model[0].bias.requires_grad


def test_hooks_are_kept():
    model, seen = nn.Sequential(nn.Conv2d(4, 8, 3)), []
    handles = [
        model[0].register_forward_pre_hook(lambda *_: seen.append("before")),
        model[0].register_forward_hook(lambda *_, **__: seen.append("after"), with_kwargs=True),
        model[0].register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    model[0].register_state_dict_pre_hook(lambda *_: pytest.fail("it expects a weight"))
    convert(model, plan_of(("0", "w"))).state_dict()
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    model(x).sum().backward()
    assert seen == ["before", "after", "backward"]
    for handle in handles:
        handle.remove()
    model(x).sum().backward()
    assert len(seen) == 3


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
        if "warehouse" not in name and name:
            assert module.training == name.startswith("layer2"), name


def test_temperature_starts_at_zero():
    assert get_temperature(convert(narrow_resnet(), "resnet18")) == 0


def test_backend_is_set_where_it_can_do_the_layer():
    model = convert(narrow_resnet(), "resnet18", start="paper").eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        for backend in ("reference", "grouped", "auto"):
            set_backend(model, backend)
            assert {m.backend for m in model.modules() if isinstance(m, KWLayer)} == {backend}
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="back end 'depthwise' cannot do this"):
        set_backend(model, "depthwise")
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


def test_a_rule_without_settings_joins_a_warehouse_as_it_is():
    rules = [
        {"match": "a", "warehouse": "x", "reduction": np.float64(0.5)},
        {"match": "b", "warehouse": "x"},
    ]
    model = convert(chain(nn.Conv2d(64, 64, 1), nn.Conv2d(64, 64, 1)), {"rules": rules})
    assert [layer.attention.fc1.out_features for layer in (model.a, model.b)] == [32, 32]
    (plan,) = model.warehouses.plans  # of plain types, which YAML takes
    assert type(plan["rules"][0]["reduction"]) is float


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


def test_an_optional_rule_may_match_nothing():
    rules = [
        {"match": "a", "warehouse": "w"},
        {"match": "z", "warehouse": "v", "optional": True, "cell_num_ratio": 2},
    ]
    assert Plan.from_mapping({"rules": rules}).rules[1] == Rule(
        "z", "v", settings={"cell_num_ratio": 2}, optional=True
    )
    model = convert(chain(nn.Conv2d(4, 4, 1)), {"rules": rules})
    assert list(model.warehouses) == ["w"]


def test_handover_across_several_stages():
    """The layer joins the warehouse that was opened last before its own."""
    layers = [nn.Conv2d(4, 4, 1) for _ in range(5)]
    rule = Rule("(?P<own>[a-e])", "{own}", "[bde]")
    model = convert(chain(*layers), Plan((rule,)))
    members = {name: [s.name for s in w.shapes] for name, w in model.warehouses.items()}
    assert members == {"a": ["a", "b"], "c": ["c", "d", "e"]}


# --- imports ------------------------------------------------------------------------------------


def test_what_is_imported():
    """In an interpreter of its own: converting a plain network, by a plan or ``auto``, imports no
    other library of ours; configurations load where there is no timm; timm may be imported after
    this, also where somebody has only asked whether it is there, and knows our networks; COCO's
    figures and annotations need no mmdetection."""
    code = (
        "import sys\n"
        "from kw import convert, set_temperature\n"
        "from torch import nn\n"
        "rules = [{'match': '0', 'warehouse': 'w'}]\n"
        "model = convert(nn.Sequential(nn.Conv2d(4, 4, 3)), {'rules': rules})\n"
        "set_temperature(model, 0.5)\n"
        "layers = [nn.Conv2d(3, 64, 3), *(nn.Conv2d(64, 64, 3) for _ in range(3))]\n"
        "model = convert(nn.Sequential(*layers), 'auto')\n"
        "heavy = {'mmengine', 'timm', 'torchvision', 'yaml', 'mmdet', 'cv2', 'PIL', 'sklearn'}\n"
        "print(len(model.warehouses), sorted(heavy & set(sys.modules)), 'kw' in sys.modules)\n"
        "sys.modules['timm'] = None\n"
        "from kw.config import load_config\n"
        f"print(load_config({str(RESNET18)!r}).epochs)\n"
        "del sys.modules['timm']\n"
        "from importlib.util import find_spec\n"
        "assert find_spec('timm')\n"
        "from timm.models import resnet\n"
        "import timm, torch\n"
        "assert not any('kw' in type(finder).__module__ for finder in sys.meta_path)\n"
        "assert 'mmengine' not in sys.modules\n"
        "with torch.device('meta'):\n"
        "    print(type(timm.create_model('kw_resnet18_1d4x', num_classes=10)).__name__)\n"
        "import kw.detection.evaluation, kw.detection.annotations\n"
        "print(sorted({'mmdet', 'mmcv', 'faster_coco_eval'} & set(sys.modules)))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["1 [] True", "300", "ResNet", "[]"]
