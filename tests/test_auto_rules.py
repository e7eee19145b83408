"""The rules of ``auto``: what it converts, leaves and refuses, on networks made for each."""

from __future__ import annotations

import copy
import itertools
from collections import namedtuple

import pytest
import timm
import torch
import torch.nn.functional as F
from networks import plan_of
from timm.layers import Conv2dSame
from timm.layers.padding import get_same_padding
from torch import Tensor, nn
from torch.nn.utils import prune

from kw import convert, set_temperature
from kw.warehouse import (
    KernelShape,
    KWConv2d,
    KWConv2dSame,
    KWLayer,
    KWLinear,
    WarehouseSettings,
    auto_plan,
    register_convertible,
)
from kw.warehouse.auto import _stem
from kw.warehouse.probe import Use
from kw.warehouse.same import same_padding
from kw.warehouse.sharing import MAX_BLOCKS, MAX_CELLS, MIN_CELLS, Candidate, share


class Net(nn.Module):
    """A stem, two stages of ordinary blocks around a layer under test, a classifier."""

    def __init__(self, tested=None, call=None):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 3, 2, 1), nn.BatchNorm2d(64))
        self.stage1 = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) for _ in range(3)))
        self.stage2 = nn.Sequential(
            nn.Conv2d(64, 128, 3, 2, 1), *(nn.Conv2d(128, 128, 3, padding=1) for _ in range(2))
        )
        self.tested = tested if tested is not None else nn.Identity()
        self.call = call or (lambda layer, x: layer(x))
        self.fc = nn.Linear(128, 4)

    def forward(self, x):
        x = self.stage2(self.stage1(self.stem(x)))
        return self.fc(self.call(self.tested, x).flatten(2).mean(2))


IMAGES = torch.randn(2, 3, 16, 16)
STAGES = {
    "stage1_dense": ["stage1.0", "stage1.1", "stage1.2", "stage2.0"],
    "stage2_dense": ["stage2.1", "stage2.2"],
}


def report_of(net, example=IMAGES, **settings):
    return auto_plan(net, example, **settings)[1]


# --- stages and kinds ---------------------------------------------------------------------------


def test_stages_hand_over():
    report = report_of(Net())
    assert report.warehouses == STAGES
    assert report.left == {"stem.0": "stem", "fc": "works on pooled features: a gate or a head"}
    assert report.refused == {}
    assert report.converted == 6


def test_layers_stay_static_on_request():
    report = report_of(Net(nn.ConvTranspose2d(128, 128, 1)), static=r"stage1\.\d|tested")
    assert report.warehouses == {**STAGES, "stage1_dense": ["stage2.0"]}
    asked = {name for name, reason in report.left.items() if reason == "as asked"}
    assert asked == {"tested", "stage1.0", "stage1.1", "stage1.2"}
    assert report.refused == {}
    with pytest.raises(ValueError, match="matches the whole name of no layer"):
        report_of(Net(), static="stage1")
    with pytest.raises(ValueError, match="is no regular expression"):
        report_of(Net(), static="(")


@pytest.mark.parametrize(
    ("layer", "warehouse"),
    [
        (nn.Conv2d(128, 128, 3, padding=1, groups=128), "stage2_depthwise"),
        (nn.Conv2d(128, 128, 3, padding=1, groups=4), "stage2_grouped"),
        (nn.Conv2d(128, 128, 3, padding=2, dilation=2), "stage2_dense"),
        (nn.Conv2d(128, 256, 1), "stage2_dense"),
    ],
)
def test_kinds_are_apart(layer, warehouse):
    net = Net(layer, lambda layer, x: layer(x)[:, :128])
    assert "tested" in report_of(net).warehouses[warehouse]
    convert(net, "auto", example_input=IMAGES)
    net(IMAGES).sum().backward()


def test_linear_layers_over_tokens():
    """Fused projections are a layer like any other; tokens are the positions."""
    fused = nn.Sequential(nn.Linear(128, 384), nn.Linear(384, 128))
    net = Net(fused, lambda layer, x: layer(x.flatten(2).transpose(1, 2)).transpose(1, 2))
    report = report_of(net)
    assert report.warehouses["stage2_linear"] == ["tested.0", "tested.1"]
    convert(net, "auto", example_input=IMAGES)
    assert isinstance(net.tested[0], KWLinear)
    assert net(IMAGES).shape == (2, 4)


def test_norm_follows_the_network():
    net = Net()
    assert auto_plan(net, IMAGES)[0].settings.norm == "batch"
    assert auto_plan(net, IMAGES, norm="layer")[0].settings.norm == "layer"
    net.stem[1] = nn.GroupNorm(4, 64)
    assert auto_plan(net, IMAGES)[0].settings.norm == "layer"


def test_settings_and_single_warehouses():
    own = {"stage1_dense": {"reduction": 1}}
    net = convert(Net(), "auto", IMAGES, cell_num_ratio=2, warehouses=own)
    assert net.warehouses["stage2_dense"].partition.cells == 2 * 2 * 9
    assert net.stage2[1].attention.fc1.out_features == 16
    assert net.stage2[0].attention.fc1.out_features == 64
    assert net.warehouses["stage1_dense"].settings.reduction == 1


def test_widths_without_a_common_divisor_are_split():
    """31 and 32 channels share cells of 1 x 1: thousands of mixtures."""
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3), *(nn.Conv2d(32, 32, 3, padding=1) for _ in range(2)),
        nn.Conv2d(32, 31, 1), *(nn.Conv2d(31, 31, 3, padding=1) for _ in range(2)),
    )  # fmt: skip
    report = report_of(net)
    assert report.warehouses == {
        "stage1_dense_w32": ["1", "2"],
        "stage1_dense_w31_31x31": ["4", "5"],
    }
    assert "fewer than 4 cells" in report.left["3"]
    convert(net, "auto", example_input=IMAGES)
    for warehouse in net.warehouses.values():
        assert MIN_CELLS <= warehouse.partition.cells <= MAX_CELLS
        for part in warehouse.partition.layers:
            assert part.mixtures <= MAX_BLOCKS * 9


def test_layers_alone_in_their_stage_share_across_stages():
    widths = [16, 32, 64, 128]
    blocks = [nn.Conv2d(a, b, 1, 2) for a, b in itertools.pairwise(widths)]
    report = report_of(nn.Sequential(nn.Conv2d(3, 16, 1), *blocks))
    assert report.warehouses == {"stages_dense": ["1", "2", "3"]}


def shared(count, *kinds, positions=(49,)):
    """Names of warehouses and numbers of their layers, of so many layers of each width and side of
    the kernel, with these positions in turn."""
    shapes = [
        KernelShape(w, w, (k, k), name=f"{w}.{k}.{i}") for w, k in kinds for i in range(count)
    ]
    turns = len(positions)
    layers = [Candidate(s, "dense", i, positions[i % turns]) for i, s in enumerate(shapes)]
    warehouses, _ = share(layers, WarehouseSettings())
    return {name: len(names) for name, names in warehouses.items()}


def test_bounds_are_reached_and_not_passed():
    """Sharing stays as it is: a checkpoint of an auto-converted network fits that sharing alone."""
    assert shared(MIN_CELLS - 1, (128, 1)) == {}
    assert shared(MIN_CELLS, (128, 1)) == {"stage1_dense": MIN_CELLS}
    whole = MAX_CELLS // 4  # layers of four cells
    assert shared(whole, (128, 2)) == {"stage1_dense": whole}
    halves = {"stage1_dense_a": whole // 2 + 1, "stage1_dense_b": whole // 2}
    assert shared(whole + 1, (128, 2)) == halves
    # Of splits that leave nothing static, that into fewest warehouses: not that by three widths.
    kinds = [(width, side) for width in (128, 256, 384) for side in (1, 2)]
    assert shared(8, *kinds) == {"stage1_dense_k1x1": 24, "stage1_dense_k2x2": 24}
    # A class token begins no stage.
    stages = {"stage1_dense": 4, "stage2_dense": 8}
    assert shared(12, (128, 1), positions=(256, 64, 65)) == stages


# --- left static --------------------------------------------------------------------------------


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(128, 8, 1), nn.Conv2d(8, 128, 1)

    def forward(self, x):
        return x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class SpatialGate(nn.Module):
    """A map of where to look, as in CBAM."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x):
        maps = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * self.conv(maps).sigmoid()


class ChannelGate(nn.Module):
    """A convolution over channels, as in ECA."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x):
        return x * self.conv(x.mean((2, 3))[:, None]).sigmoid().transpose(1, 2)[..., None]


@pytest.mark.parametrize("gate", [Gate, SpatialGate, ChannelGate])
def test_gates_stay_static(gate):
    report = report_of(Net(gate()))
    assert report.warehouses == STAGES
    gated = {name: reason for name, reason in report.left.items() if "tested" in name}
    assert gated
    assert all("gate" in reason for reason in gated.values())
    assert not report.refused


@pytest.mark.parametrize(
    ("width", "kernel", "reason"),
    [
        (7, 1, "fewer than 8 channels"),
        (8, 1, "would mix fewer than 4 cells"),
        (128, 4, "works on pooled features"),
    ],
)
def test_maps_and_poolings_stay_static(width, kernel, reason):
    net = Net(nn.Conv2d(128, width, kernel), lambda layer, x: (layer(x), x)[1])
    assert report_of(net).left["tested"].startswith(reason)  # it gets 4 x 4 pixels


def test_a_deep_stem_stays_static_as_a_whole():
    net = Net()
    net.stem = nn.Sequential(nn.Conv2d(3, 64, 3, 2, 1), nn.Conv2d(64, 64, 3, padding=1))
    assert report_of(net).left["stem.1"] == "stem"


@pytest.mark.parametrize(("inside", "layers", "found"), [(4, 16, 4), (5, 20, 1), (4, 15, 1)])
def test_a_stem_is_four_layers_and_a_quarter_at_most(inside, layers, found):
    names = [f"{'stem' if i < inside else 'body'}.{i}" for i in range(layers)]
    assert _stem({name: Use(i, 1) for i, name in enumerate(names)}) == set(names[:found])


def test_classifier_by_timms_name():
    net = Net(nn.Conv2d(128, 128, 3, padding=1))
    net.get_classifier = lambda: net.tested
    assert report_of(net).left["tested"] == "classifier"


# --- refused ------------------------------------------------------------------------------------


class Doubled(nn.Conv2d):
    """Computes something else than its name says."""

    def forward(self, x):
        return F.conv2d(x, 2 * self.weight, self.bias)


def windows(layer, x):
    tokens = x.unflatten(2, (2, 2)).unflatten(4, (2, 2)).permute(0, 2, 4, 3, 5, 1)
    return layer(tokens.flatten(3, 4).flatten(0, 2)).unflatten(0, (len(x), -1)).flatten(1, 2).mT


def tokens_first(layer, x):
    return layer(x.flatten(2).permute(2, 0, 1)).permute(1, 2, 0)


@pytest.mark.parametrize(
    ("layer", "call", "names", "reason"),
    [
        (nn.Linear(128, 128), windows, "tested", "leading dimension is not the sample"),
        (nn.Linear(128, 128), tokens_first, "tested", "leading dimension is not the sample"),
        (nn.Conv2d(128, 128, 1), lambda conv, x: conv(conv(x)), "tested", "called several times"),
        (
            nn.Linear(128, 128),
            lambda linear, x: F.linear(x.flatten(2).mT, linear.weight).mT,
            "tested",
            "read elsewhere",
        ),
        (
            nn.Conv2d(128, 128, 1),
            lambda conv, x: conv(x.to(conv.weight.dtype)),
            "tested",
            "read elsewhere",
        ),
        (nn.Conv2d(128, 128, 1), lambda conv, x: x, "tested", "not called"),
        (
            nn.MultiheadAttention(128, 4, batch_first=True),
            lambda attention, x: attention(*[x.flatten(2).mT] * 3)[0].mT,
            "tested.out_proj",
            "NonDynamicallyQuantizableLinear",
        ),
        (Doubled(128, 128, 1), None, "tested", "is a Doubled"),
        (
            nn.utils.parametrizations.weight_norm(nn.Conv2d(128, 128, 1)),
            None,
            "tested",
            "no parameter but computed",
        ),
        (
            prune.random_unstructured(nn.Conv2d(128, 128, 1), "weight", 0.5),
            lambda conv, x: conv(x) if x.sum().item() < 1e9 else x,  # not on the meta device
            "tested",
            "the weight is no parameter but computed",
        ),
    ],
)
def test_refused_with_the_reason(layer, call, names, reason):
    net = Net(layer, call)
    report = report_of(net)
    assert list(report.refused) == [names]
    assert reason in report.refused[names]
    assert report.warehouses == STAGES
    with pytest.warns(UserWarning, match="1 layers of Net cannot be converted") as caught:
        convert(net, "auto", example_input=IMAGES)
    assert len(caught) == 1
    assert names in str(caught[0].message)
    assert reason in str(caught[0].message)
    assert net(IMAGES).shape == (2, 4)


@pytest.mark.parametrize("fast", [True, False])
def test_the_fast_path_of_torchs_encoder_layer(fast, monkeypatch):
    """In evaluation it reads the weights of its linear layers, so that a network which had trained
    failed in its first evaluation. Where the path is off, they are called."""
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", fast)
    layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True)
    net = Net(layer, lambda layer, x: layer(x.flatten(2).mT).mT).eval()
    expected = net(IMAGES)
    with pytest.warns(UserWarning, match="cannot be converted"):
        convert(net, "auto", IMAGES)
    assert isinstance(net.tested.linear1, KWLinear) == (not fast)
    torch.testing.assert_close(net(IMAGES), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(net(IMAGES), expected, rtol=1e-4, atol=1e-5)


def test_reasons_are_said_once():
    layers = nn.Sequential(*(nn.utils.spectral_norm(nn.Conv2d(128, 128, 1)) for _ in range(2)))
    net = Net(layers)
    net(IMAGES)  # the weights are results of a computation now
    assert report_of(net).refusals().startswith("  tested.* (2): the weight is no parameter")


def test_what_holds_for_one_block_holds_for_all():
    """A window as large as the image has samples first, at this size alone."""
    layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(2))

    def call(layers, x):
        return windows(layers[0], x) + tokens_of(layers[1], x)

    def tokens_of(layer, x):
        return layer(x.flatten(2).mT).mT

    assert sorted(report_of(Net(layers, call)).refused) == ["tested.0", "tested.1"]


def test_tied_weights_are_refused():
    layers = nn.Sequential(nn.Conv2d(128, 128, 1), nn.Conv2d(128, 128, 1))
    layers[1].weight = layers[0].weight
    report = report_of(Net(layers))
    assert sorted(report.refused) == ["tested.0", "tested.1"]
    assert "shares its weight" in report.refused["tested.0"]


# --- the example --------------------------------------------------------------------------------


def test_examples_of_several_arguments():

    class Scaled(Net):
        def forward(self, x, flag, *, scale=1):
            return super().forward(x * scale) if flag else None

    assert report_of(Scaled(), {"x": IMAGES, "flag": True, "scale": 2}).warehouses == STAGES
    assert report_of(Scaled(), (IMAGES, True)).warehouses == STAGES

    class Named(Net):
        def forward(self, pair):
            return super().forward(pair.left + pair.right)

    pair = namedtuple("Pair", "left right")(IMAGES, IMAGES)
    assert report_of(Named(), {"pair": pair}).warehouses == STAGES


def test_networks_whose_forward_needs_values():
    """What the meta device cannot run is run as it is."""
    net = Net(nn.Conv2d(128, 128, 1), lambda conv, x: conv(x) if x.sum().item() < 1e9 else x)
    assert "tested" in report_of(net).warehouses["stage2_dense"]


@pytest.mark.parametrize("needs_values", [True, False])
def test_the_network_is_not_touched(needs_values):
    """Nor are random numbers, whichever it draws."""

    def call(conv, x):
        least = x.square().sum().item() if needs_values else 0
        return conv(x) if torch.rand(()).item() > -1 - least else x

    net = Net(nn.Conv2d(128, 128, 1), call)
    net.stage1.eval()
    before = copy.deepcopy(net.state_dict())
    modes = [module.training for module in net.modules()]
    state = torch.random.get_rng_state()
    auto_plan(net, IMAGES)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in net.modules()] == modes
    assert not any(module._forward_hooks for module in net.modules())
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    with torch.device("meta"):
        assert report_of(Net()).warehouses == STAGES


@pytest.mark.parametrize(
    ("example", "facts"),
    [
        (torch.zeros(1, 3, 16, 16), ["at least two samples", "[1, 3, 16, 16]"]),
        ({"flag": True}, ["no tensor", "at least two samples"]),
        (torch.zeros(2, 5, 16, 16), ["Net could not be run", "[2, 5, 16, 16]", "example_input="]),
    ],
)
def test_examples_that_cannot_be(example, facts):
    with pytest.raises(ValueError, match="auto:") as error:
        convert(Net(), "auto", example_input=example)
    for fact in facts:
        assert fact in str(error.value)


def test_an_example_is_for_auto_alone():
    with pytest.raises(ValueError, match="example_input is for the plan 'auto'"):
        convert(Net(), plan_of((r"stage1\.0", "w")), example_input=IMAGES)


def test_nothing_to_convert():
    with pytest.raises(ValueError, match="no layer of Sequential can be converted"):
        convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), "auto", example_input=IMAGES)


def test_a_converted_network_is_not_converted_again():
    net = convert(Net(), "auto", example_input=IMAGES)
    with pytest.raises(ValueError, match="no layer of Net can be converted"):
        convert(net, "auto", example_input=IMAGES)


def test_unknown_setting():
    with pytest.raises(ValueError, match=r"auto: unknown warehouse setting 'nrom'.*'norm'"):
        convert(Net(), "auto", example_input=IMAGES, nrom="layer")


# --- layers of other classes --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "dilation", "groups"),
    [((9, 8), 3, 2, 1, 1), ((7, 12), 5, 3, 1, 4), ((10, 10), (3, 2), (2, 1), (2, 1), 1)],
)
@torch.no_grad()
def test_same_padding_is_timms(size, kernel, stride, dilation, groups):
    conv = Conv2dSame(4, 8, kernel, stride, dilation=dilation, groups=groups)
    model = convert(nn.Sequential(copy.deepcopy(conv)), plan_of(("0", "w"), start="paper"))
    layer = model[0]
    assert type(layer) is KWConv2dSame
    set_temperature(model, 1.0)
    cells = layer.warehouse.cells  # one cell a position: the kernel has one block of channels
    conv.weight.copy_(cells.view(-1, *conv.weight.shape[:2]).permute(1, 2, 0).view_as(conv.weight))
    x = torch.randn(2, 4, *size)
    torch.testing.assert_close(layer(x), conv(x))


def test_same_padding_of_every_size_is_timms():
    for axis in itertools.product(range(1, 40), range(1, 8), range(1, 9), (1, 2, 3)):
        assert same_padding(*axis) == max(get_same_padding(*axis), 0), axis


def test_same_padding_takes_no_padding():
    with pytest.raises(ValueError, match="KWConv2dSame pads by its input's size"):
        KWConv2dSame(4, 4, 3, padding=1)


def test_registering_a_class_of_ones_own():
    class Named(nn.Conv2d):
        pass

    net = Net(Named(128, 128, 3, padding=1))
    assert "is a Named" in report_of(net).refused["tested"]
    register_convertible(Named, KWConv2d)
    convert(net, "auto", example_input=IMAGES)
    assert isinstance(net.tested, KWLayer)
    with pytest.raises(ValueError, match="Named needs a subclass of KWConvNd, got KWLinear"):
        register_convertible(Named, KWLinear)
    with pytest.raises(ValueError, match="Bilinear is not a subclass of one of Conv1d"):
        register_convertible(nn.Bilinear, KWLinear)


def test_models_of_timm_bring_their_size():
    """No example is needed, whatever the size."""
    with torch.device("meta"):
        model = timm.create_model("resnet18", pretrained_cfg_overlay={"input_size": (3, 64, 64)})
    assert auto_plan(model)[1].converted == 19


class OfImages(nn.Module):
    """As detectors do: a list of images of any sizes becomes a padded batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, images: list[Tensor]) -> Tensor:
        size = IMAGES.shape[-2:]
        padding = [(0, size[1] - x.shape[2], 0, size[0] - x.shape[1]) for x in images]
        padded = [nn.functional.pad(x, p) for x, p in zip(images, padding, strict=True)]
        return self.net(torch.stack(padded))


def test_a_list_of_images_is_one_argument() -> None:
    images = [IMAGES[0], IMAGES[1, :, :-2, :-1], IMAGES[0]]
    report = report_of(OfImages(), images)
    expected = report_of(Net())
    assert report.warehouses == {
        name: [f"net.{layer}" for layer in layers] for name, layers in expected.warehouses.items()
    }
    assert len(report.refused) == len(expected.refused)
    with pytest.raises(ValueError, match="at least two samples"):
        report_of(OfImages(), [IMAGES[0]])


def test_frozen_layers_stay_where_others_train():
    """What is frozen is meant to stay as it is, but of a network that is frozen as a whole."""
    net = Net()
    net.stage1.requires_grad_(False)
    report = report_of(net)
    assert set(report.left) == {"stem.0", "fc", "stage1.0", "stage1.1", "stage1.2"}
    assert report.left["stage1.0"] == "frozen, while others train"
    converted = [n for names in report.warehouses.values() for n in names]
    assert converted == ["stage2.0", "stage2.1", "stage2.2"]
    assert report_of(Net().requires_grad_(False)).warehouses == STAGES


def test_parts_of_a_dynamic_layer_in_two_places_are_no_layers():
    dynamic = KWConv2d(128, 128, 3, padding=1)
    report = report_of(Net(nn.Sequential(dynamic, nn.ReLU(), dynamic)))
    assert report.warehouses == STAGES
    assert not any("attention" in name for name in (*report.left, *report.refused))
