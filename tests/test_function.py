"""The autograd function around the back ends: what it keeps, how it is wrapped, in which types."""

from __future__ import annotations

import pytest
import torch
from breadth import breadth
from convolutions import CASES, Case
from torch import nn
from torch.autograd import forward_ad

from kw.warehouse import KWConv2d, KWLinear
from kw.warehouse.ops import (
    CONTRACTIONS,
    Problem,
    assemble,
    assembly_precision,
    dynamic_conv,
    selector,
    set_assembly_precision,
)

POINTWISE = Case((1, 1), (5, 7))
SPATIAL = Case((3, 3), (5, 7), stride=2, padding=1)
DEPTHWISE = Case((3, 3), (5, 7), channels=(4, 4), padding=1, groups=4)
both = pytest.mark.parametrize("case", [POINTWISE, SPATIAL, DEPTHWISE], ids=["1x1", "3x3", "dw"])


def inputs(case: Case, dtype=torch.float64):
    *tensors, spec = case.make()
    return *(t.detach().to(dtype).requires_grad_() for t in tensors), spec


@pytest.fixture(autouse=True)
def restored():
    yield
    set_assembly_precision("autocast")
    selector.mode = "model"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_nothing_but_the_inputs_is_kept(case):
    """Assembled kernels outweigh activations: they are assembled again in the backward pass."""
    x, alpha, cells, spec = inputs(case)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        dynamic_conv(x, alpha, cells, spec)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, alpha, cells)}


@both
def test_operators_are_well_behaved(case):
    """Schema, fake kernels, autograd registration and tracing with dynamic shapes."""
    x, alpha, cells, spec = inputs(case)
    torch.library.opcheck(torch.ops.kw.dynamic_conv, (x, alpha, cells, spec.encode(), "auto"))
    x = x.detach().movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_()
    torch.library.opcheck(torch.ops.kw.dynamic_conv, (x, alpha, cells, spec.encode(), "auto"))


@both
@pytest.mark.parametrize("mask", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)])
def test_only_wanted_gradients_are_computed(case, mask):
    tensors = inputs(case)
    spec = tensors[-1]
    expected = torch.autograd.grad(dynamic_conv(*tensors, "reference").sum(), tensors[:3])
    wanted = [t.detach().requires_grad_(bool(on)) for t, on in zip(tensors, mask, strict=False)]
    dynamic_conv(*wanted, spec).sum().backward()
    for tensor, theirs, on in zip(wanted, expected, mask, strict=True):
        if on:
            torch.testing.assert_close(tensor.grad, theirs)
        else:
            assert tensor.grad is None


@both
def test_second_derivatives(case):
    small = Case(case.kernel, (3, 3), (2, 2), 1, case.padding, 1, 2 if case.groups > 1 else 1, 2)
    *tensors, spec = inputs(small)
    assert torch.autograd.gradgradcheck(lambda *t: dynamic_conv(*t, spec), tensors)


@both
def test_gradients_of_expanded_inputs(case):
    """The gradient of a sum comes as an expanded tensor without strides."""
    x, alpha, cells, spec = inputs(case)
    x = x[:1].expand(3, -1, -1, -1).detach().requires_grad_()
    expected = torch.autograd.grad(dynamic_conv(x, alpha, cells, spec, "reference").sum(), alpha)
    actual = torch.autograd.grad(dynamic_conv(x, alpha, cells, spec).sum(), alpha)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("training", [False, True])
@both
def test_output_lies_as_the_input(case, training):
    x, alpha, cells, spec = (t.detach() if isinstance(t, torch.Tensor) else t for t in inputs(case))
    last = x.to(memory_format=torch.channels_last).requires_grad_(training)
    y = dynamic_conv(last, alpha, cells, spec)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert dynamic_conv(x, alpha, cells, spec).is_contiguous()
    if training:
        y.sum().backward()
        assert last.grad.is_contiguous(memory_format=torch.channels_last)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            KWConv2d(3, 8, 3, padding=1, bias=False, start="paper"),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            KWConv2d(8, 16, 1, stride=2, start="paper"),
        )
        self.head = KWLinear(16, 5, start="paper")

    def forward(self, x):
        return self.head(self.body(x).flatten(2).transpose(1, 2)).mean(1)


@pytest.mark.parametrize("autocast", breadth([False, True], [True]))
def test_compiles_into_one_graph(autocast):
    """Forward and backward; a batch of another size does not compile anew."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = Network()
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (4, 6):
        x = torch.randn(batch, 3, 9, 9)
        results = []
        for module in (net, compiled):
            net.zero_grad()
            with (
                torch._dynamo.config.patch(error_on_recompile=True),
                torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            ):
                y = module(x)
            y.float().square().sum().backward()
            results.append([y, *(p.grad.clone() for p in net.parameters() if p.grad is not None)])
        for ours, theirs in zip(*results, strict=True):
            assert (ours - theirs).norm() <= (0.03 if autocast else 1e-5) * ours.norm() + 1e-6


def test_exports_with_a_dynamic_batch():
    net = Network().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(net, (torch.randn(3, 3, 9, 9),), dynamic_shapes=({0: batch},))
    targets = {str(node.target) for node in exported.graph.nodes}
    assert not any("kw." in target for target in targets)  # operators that any runtime knows
    x = torch.randn(5, 3, 9, 9)
    torch.testing.assert_close(exported.module()(x), net(x))


def test_autocast_computes_in_its_type():
    x, alpha, cells, spec = inputs(SPATIAL, torch.float32)
    with torch.autocast("cpu", torch.bfloat16), selector.recording() as seen:
        y = dynamic_conv(x, alpha, cells, spec)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert [t.grad.dtype for t in (x, alpha, cells)] == [torch.float32] * 3
    assert seen[0][0].dtype == torch.bfloat16


def test_assembly_in_float32_is_nearer_to_the_truth():
    """Signed coefficients over many cells: what rounding them before the sum costs."""
    torch.manual_seed(0)
    case = Case((3, 3), (5, 5), (16, 16), settings={"cell_num_ratio": 16})
    x, alpha, cells, spec = (
        t.detach() if isinstance(t, torch.Tensor) else t for t in inputs(case, torch.float32)
    )
    alpha = alpha / alpha.abs().sum(-1, keepdim=True)
    exact = dynamic_conv(x.bfloat16().double(), alpha.double(), cells.double(), spec, "reference")
    errors = {}
    for precision in ("autocast", "float32"):
        set_assembly_precision(precision)
        assert assembly_precision() == precision
        with torch.autocast("cpu", torch.bfloat16):
            y = dynamic_conv(x, alpha, cells, spec)
        assert y.dtype == torch.bfloat16
        errors[precision] = ((y - exact).norm() / exact.norm()).item()
    assert errors["float32"] < errors["autocast"] < 0.01


@pytest.mark.parametrize("name", CONTRACTIONS)
def test_float32_assembly_in_every_back_end(name):
    """Forward and all gradients; those that cannot mix types say so."""
    set_assembly_precision("float32")
    x, alpha, cells, spec = inputs(SPATIAL, torch.float32)
    problem = Problem(spec, len(cells), 3, (5, 7), torch.bfloat16, "cpu", cells_dtype=torch.float32)
    refusal = CONTRACTIONS[name].refusal(problem)
    with torch.autocast("cpu", torch.bfloat16):
        if refusal:
            with pytest.raises(ValueError, match=f"back end '{name}'"):
                dynamic_conv(x, alpha, cells, spec, name)
            return
        y = dynamic_conv(x, alpha, cells, spec, name)
    expected = dynamic_conv(x, alpha, cells, spec, "reference")
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.1)
    weight = torch.randn_like(expected)
    actual = torch.autograd.grad((y * weight).sum(), (x, alpha, cells))
    theirs = torch.autograd.grad((expected * weight).sum(), (x, alpha, cells))
    for a, b in zip(actual, theirs, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.02 * b.norm()


def test_types_that_do_not_match_are_refused():
    x, alpha, cells, spec = inputs(SPATIAL, torch.float32)
    with pytest.raises(
        ValueError, match=r"input is torch.bfloat16 and the layer's cells are torch"
    ):
        dynamic_conv(x.bfloat16(), alpha, cells, spec)


def test_unknown_assembly_precision_is_refused():
    with pytest.raises(ValueError, match="'float' is unknown; did you mean 'float32'"):
        set_assembly_precision("float")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graph_replays_the_layer():
    layer = KWConv2d(16, 16, 3, padding=1, device="cuda", start="paper").eval()
    x = torch.randn(4, 16, 9, 9, device="cuda")
    with torch.no_grad():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(y, layer(x))


# --- other ways to differentiate ------------------------------------------------------------------


def transformed():
    """Transforms of a function of one tensor, at ``x`` in the direction ``t``."""

    def dual(f, x, t):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, t))).tangent

    return {
        "jvp": lambda f, x, t: torch.func.jvp(f, (x,), (t,))[1],
        "dual": dual,
        "vjp": lambda f, x, t: torch.func.vjp(f, x)[1](f(t))[0],
        "jacrev": lambda f, x, t: torch.func.jacrev(f)(x),
        "jacfwd": lambda f, x, t: torch.func.jacfwd(f)(x),
        "vmap": lambda f, x, t: torch.func.vmap(f)(torch.stack([x, t])),
    }


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("backend", ["auto", "bmm"])
@pytest.mark.parametrize("way", transformed())
def test_transforms_give_what_they_give_of_plain_operators(way, backend, frozen):
    """Back ends compute outside of autograd: what has derivatives or batches of its own must not
    reach them, or those are lost without a word."""
    torch.manual_seed(0)
    layer = KWConv2d(8, 8, 3, padding=1, start="paper").eval().requires_grad_(not frozen)
    x, t = torch.randn(2, 2, 8, 6, 6)

    def plain(x):
        alpha = layer.attention(x.mean((2, 3)), layer.warehouse.temperature)
        kernels = assemble(alpha, layer.warehouse.cells, layer.spec)
        return layer.spec.conv(x.flatten(0, 1)[None], kernels.flatten(0, 1), 2).view(2, 8, 6, 6)

    layer.set_backend(backend)
    expected = transformed()[way](plain, x, t)
    torch.testing.assert_close(transformed()[way](layer, x, t), expected, rtol=1e-4, atol=1e-5)


def test_gradients_of_gradients_do_not_follow_a_later_autocast():
    """As those of static layers: the precision is that of the forward pass."""
    x, alpha, cells, spec = inputs(SPATIAL, torch.float32)
    found = []
    for enabled in (False, True):
        y = dynamic_conv(x, alpha, cells, spec)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            (into,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(into.square().sum(), cells)[0])
    torch.testing.assert_close(*found)
