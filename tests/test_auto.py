"""``convert(model, "auto")`` on networks that it has never seen: timm's, family after family."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import timm
import torch
from breadth import breadth
from timm.layers import DropPath

from kw import convert, set_temperature
from kw.warehouse import KWLayer, KWLinear, auto_plan

CLASSES = 5
# Families, their small members, and the side of the images that they are tried on. A side below
# zero is one that the network must be built for (img_size).
FAMILIES: dict[str, dict[str, int]] = {
    "ResNet": {"resnet10t": 64, "resnet18": 64, "resnet26d": 64, "resnetv2_18": 64},
    "ResNeXt": {"resnext26ts": 64},
    "SE, ECA, SK": {"seresnet18": 64, "ecaresnet26t": 64, "skresnet18": 64},
    "ResNeSt": {"resnest14d": 64},
    "Res2Net": {"res2net50_26w_4s": 64},
    "RegNet": {"regnetx_002": 64, "regnety_002": 64, "regnetz_005": 64},
    "EfficientNet": {"efficientnet_lite0": 64, "tf_efficientnet_b0": 64, "tinynet_e": 64},
    "EfficientNetV2": {"tf_efficientnetv2_b0": 64},
    "MobileNet": {
        "mobilenetv1_100": 64,
        "mobilenetv2_035": 64,
        "mobilenetv3_small_050": 64,
        "tf_mobilenetv3_small_minimal_100": 64,
        "mobilenetv4_conv_small_035": 64,
        "mobilenetv4_hybrid_medium": 64,
    },
    "MNASNet, LCNet, FBNet": {"mnasnet_small": 64, "lcnet_035": 64, "fbnetc_100": 64},
    "GhostNet": {"ghostnet_050": 64, "repghostnet_050": 64},
    "ReXNet": {"rexnetr_100": 64},
    "DenseNet": {"densenet121": 64},
    "VGG": {"vgg11_bn": 32},
    "HRNet": {"hrnet_w18_small": 64},
    "ConvNeXt": {"convnext_atto": 64, "convnextv2_atto": 64, "inception_next_atto": 64},
    "ViT, DeiT": {"vit_tiny_patch16_224": -32, "deit_tiny_distilled_patch16_224": -32},
    "BEiT, EVA": {"eva02_tiny_patch14_224": -28},
    "Swin": {"swin_tiny_patch4_window7_224": -64, "swinv2_cr_tiny_ns_224": -64},
    "MaxViT": {"maxvit_pico_rw_256": -64},
    "CoAtNet": {"coatnet_pico_rw_224": -64},
    "MLP": {"mixer_s32_224": -64, "resmlp_12_224": -32, "gmlp_ti16_224": -32},
    "MetaFormer": {"poolformer_s12": 64, "poolformerv2_s12": 64},
    "EfficientFormer": {"efficientformer_l1": 224, "efficientformerv2_s0": -64},
    "RepVGG, MobileOne": {"repvgg_a0": 64, "mobileone_s0": 64, "repvit_m0_9": 64},
    "DLA": {"dla46_c": 64, "dla34": 64},
    "CSPNet, DarkNet": {"cs3darknet_s": 64, "darknet17": 64},
    "VoVNet": {"ese_vovnet19b_dw": 64},
    "FocalNet": {"focalnet_tiny_srf": 64},
    "EdgeNeXt": {"edgenext_xx_small": 64},
    "MobileViT": {"mobilevit_xxs": 64, "mobilevitv2_050": 64},
    "Inception": {"inception_v3": 96},
    "Xception": {"xception41": 64},
    "DPN": {"dpn48b": 64},
    "LeViT": {"levit_128s": 224},
    "PVT": {"pvt_v2_b0": 64},
    "XCiT, CaiT": {"xcit_nano_12_p16_224": -64, "cait_xxs24_224": -32},
    "PiT, NesT, ConViT": {"pit_ti_224": -64, "convit_tiny": -32},
    "FastViT, FasterNet": {"fastvit_t8": 64, "fasternet_t0": 64},
    "StarNet, SHViT": {"starnet_s050": 64, "shvit_s1": 64},
    "EfficientViT": {"efficientvit_b0": 64, "efficientvit_m0": 224},
    "SwiftFormer, TinyViT": {"swiftformer_xs": 64, "tiny_vit_5m_224": 224},
    "HGNet": {"hgnetv2_b0": 64},
    "GCViT, MViT": {"mvitv2_tiny": -64},
}
SIDES = {name: side for members in FAMILIES.values() for name, side in members.items()}
# Each is built in a way that no other of them is.
QUICK = (
    *("resnet18", "seresnet18", "regnety_002", "tf_efficientnet_b0", "mobilenetv4_conv_small_035"),
    *("ghostnet_050", "convnext_atto", "vit_tiny_patch16_224", "poolformer_s12"),
)
architectures = pytest.mark.parametrize("name", breadth(SIDES, QUICK))


def build(name, rate=0.1):
    """A static network, and images that it takes. Every branch counts: timm starts some at zero."""
    torch.manual_seed(0)
    side = SIDES[name]
    settings = {"img_size": -side} if side < 0 else {}
    try:
        model = timm.create_model(name, num_classes=CLASSES, drop_path_rate=rate, **settings)
    except TypeError:  # some have no drop path
        model = timm.create_model(name, num_classes=CLASSES, **settings)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1 and not parameter_name.endswith("bias"):
                parameter.uniform_(0.5, 1)
            elif parameter.dim() > 1 and not parameter.any():
                parameter.normal_(0, 0.02)
    return model, torch.randn(2, 3, abs(side), abs(side))


def example_of(name, x):
    """Convolutional networks are planned at their native size, which costs nothing."""
    return x if SIDES[name] < 0 else None


def own_kernels(model):
    """Static weights from each layer's own cells, put together block by block (ratio 1)."""
    weights = {}
    for warehouse in model.warehouses.values():
        out, inner, *_ = warehouse.partition.cell_shape
        taken = 0
        for shape in warehouse.shapes:
            size = math.prod(shape.kernel)
            grid = (size, shape.out_channels // out, shape.in_per_group // inner)
            cells = warehouse.cells.detach()[taken : taken + math.prod(grid)]
            taken += len(cells)
            blocks = cells.view(*grid, out, inner)  # [S, GO, GI, c_out, c_in]
            kernel = blocks.permute(1, 3, 2, 4, 0).reshape(shape.out_channels, -1, *shape.kernel)
            is_linear = isinstance(model.get_submodule(shape.name), KWLinear)
            weights[f"{shape.name}.weight"] = kernel.flatten(1) if is_linear else kernel
        assert taken == len(warehouse.cells)
    return weights


def test_sixty_architectures_of_twenty_families():
    assert len(SIDES) >= 60
    assert len(FAMILIES) >= 20


@architectures
def test_architecture(name):
    model, x = build(name)
    static = copy.deepcopy(model)
    plan, report = auto_plan(model, example_of(name, x))
    convert(model, plan, start="paper")
    layers = [n for n, module in model.named_modules() if isinstance(module, KWLayer)]
    assert sorted(layers) == sorted(n for names in report.warehouses.values() for n in names)
    grown = parameters(model) / parameters(static)
    assert grown < 1.8  # attention branches stay sane

    # At temperature 1: the static network with the layers' own cells for weights.
    missing, unexpected = static.load_state_dict(own_kernels(model), strict=False)
    assert not unexpected
    assert not set(missing) & {f"{n}.weight" for n in layers}
    static.eval(), model.eval()
    set_temperature(model, 1.0)
    with torch.no_grad():
        expected = static(x)
        y = model(x)
        scale = expected.abs().max()
        assert scale.isfinite()
        assert scale > 0
        assert (y - expected).abs().max() < 1e-3 * scale
        set_temperature(model, 0.0)

    # While it anneals: all cells learn, through timm's own two halves of the forward pass.
    set_temperature(model, 0.5)
    model.train()
    features = model.forward_features(x)
    y = model.forward_head(features)
    (y[0] if isinstance(y, tuple) else y).float().square().mean().backward()
    for warehouse in model.warehouses.values():
        assert warehouse.cells.grad is not None
        assert warehouse.cells.grad.isfinite().all()
    for n in layers:
        for parameter in model.get_submodule(n).attention.parameters():
            assert parameter.grad is not None, n
            assert parameter.grad.isfinite().all(), n

    model.reset_classifier(7)
    model.eval()
    with torch.no_grad():
        head = model.forward_head(features)
    assert head.shape == (2, 7)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "name",
    breadth(
        [
            "resnet18",
            "densenet121",
            "regnetx_002",
            "tf_efficientnet_b0",
            "mobilenetv4_conv_small_035",
            "convnext_atto",
            "hrnet_w18_small",
            "vgg11_bn",  # by hooks
            "vit_tiny_patch16_224",  # by forward_intermediates
            "swin_tiny_patch4_window7_224",
            "mobileone_s0",
            "poolformer_s12",
        ],
        quick=["resnet18", "hrnet_w18_small", "vgg11_bn", "vit_tiny_patch16_224"],
    ),
)
def test_features_only(name):
    """A feature extractor is converted as it is; so is one made of a part of the network."""
    side = abs(SIDES[name])
    settings = {"img_size": side} if SIDES[name] < 0 else {}
    model = timm.create_model(name, features_only=True, **settings)
    x = torch.randn(2, 3, side, side)
    shapes = [f.shape for f in model.eval()(x)]
    channels = model.feature_info.channels()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of what is refused, tested below
        convert(model, "auto", example_input=example_of(name, x))
    assert any(isinstance(m, KWLayer) for m in model.modules())
    features = model.train()(x)
    assert [f.shape for f in features] == shapes
    assert model.feature_info.channels() == channels
    sum(f.square().mean() for f in features).backward()
    assert any(w.cells.grad is not None for w in model.warehouses.values())


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "vit_tiny_patch16_224"])
def test_drop_path_keeps_dropping(name):
    """Whole branches of some samples vanish in training, of none in evaluation."""
    model, x = build(name, rate=0.5)
    x = x[:1].repeat(8, 1, 1, 1)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of what is refused, tested below
        convert(model, "auto", example_input=example_of(name, x), start="paper")
    assert [m.drop_prob for m in model.modules() if isinstance(m, DropPath)] == rates
    for module in model.modules():  # BatchNorm and the attention see the same batch eight times
        module.train(isinstance(module, DropPath))
    with torch.no_grad():
        y = model.forward_features(x)
        assert (y - y[:1]).abs().max() > 1e-2 * y.abs().max()
        y = model.eval().forward_features(x)
        assert (y - y[:1]).abs().max() < 1e-3 * y.abs().max()


def test_weight_standardised_networks_are_refused_by_name():
    with torch.device("meta"):
        model = timm.create_model("nfnet_f0")
    with pytest.raises(ValueError, match="no layer of NormFreeNet can be converted") as error:
        convert(model, "auto")
    for fact in ("ScaledStdConv2d", "stages.*.*.conv*", "(36)", "gate", "plan of your own"):
        assert fact in str(error.value)


@pytest.mark.parametrize(
    ("name", "layers", "reason"),
    [
        ("swin_tiny_patch4_window7_224", "layers.*.blocks.*.attn.qkv (12)", "not the sample"),
        ("beit_base_patch16_224", "blocks.*.attn.qkv (12)", "read elsewhere"),
        ("maxvit_pico_rw_256", "stages.*.blocks.*.attn_grid.attn.qkv (11)", "not the sample"),
        ("coat_lite_tiny", "cpe*.proj (4)", "shares its weight"),
    ],
)
def test_what_is_refused_is_said(name, layers, reason):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.warns(UserWarning, match="cannot be converted and stay static") as caught:
        convert(model, "auto")
    assert len(caught) == 1
    line = next(line for line in str(caught[0].message).splitlines() if layers in line)
    assert reason in line


@pytest.mark.parametrize("ratio", [0.5, 2, 4])
@pytest.mark.parametrize(
    "name",
    breadth(["resnet18", "resnet50", "convnext_tiny", "mobilenetv2_100"], ["resnet18"]),
)
def test_other_budgets_share_alike(name, ratio):
    """The same layers share the same warehouses; below 1, what cannot be cut stays static."""
    cut = {"cell_inplane_ratio": 0.5, "cell_outplane_ratio": 0.5} if ratio < 1 else {}
    with torch.device("meta"):
        model = timm.create_model(name)
    _, one = auto_plan(model)
    _, other = auto_plan(model, cell_num_ratio=ratio, **cut)
    if ratio > 1:
        assert other == one
    converted = {n: w for w, names in one.warehouses.items() for n in names}
    assert {n for names in other.warehouses.values() for n in names} <= set(converted)
    assert not other.refused
    convert(model, "auto", cell_num_ratio=ratio, **cut)
    assert list(model.warehouses) == list(other.warehouses)


def test_resnet18_is_shared_as_in_the_paper():
    with torch.device("meta"):
        models = [timm.create_model("resnet18") for _ in range(2)]
    convert(models[0], "resnet18"), convert(models[1], "auto")
    layouts = [[w.shapes for w in model.warehouses.values()] for model in models]
    assert layouts[0] == layouts[1]
