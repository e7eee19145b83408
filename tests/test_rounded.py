"""Cells are rounded once a pass under autocast, are never too old, and get their own gradients."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from functools import partial

import pytest
import timm
import torch
from processes import in_processes
from test_parallel import build, loss_of
from test_summing import SHAPE, Chain, image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import kw  # noqa: F401 -- registers the models
from kw.training.parallel import shard
from kw.warehouse import KWConv2d, KWLinear, Warehouse
from kw.warehouse.ops import set_assembly_precision
from kw.warehouse.ops.rounded import RoundedCells

CELLS = "warehouse.weight"
BF16 = torch.autocast("cpu", torch.bfloat16)


class Casts(TorchDispatchMode):
    """Counts how often tensors are converted to another type."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__()
        self.places = {tensor.data_ptr() for tensor in tensors}
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.places:
            self.count += 1
        return func(*args, **(kwargs or {}))


def chain() -> Chain:
    return Chain(("bmm", "assembled", "bmm"))


def run(net: nn.Module, x: Tensor) -> Tensor:
    with BF16:
        return net(x)


def apart(net: Chain, x: Tensor) -> Tensor:
    """The same, rounded anew by every layer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Warehouse, "rounded", lambda self, dtype, user: self.cells.detach().to(dtype))
        return run(net, x)


def grads_of(net: nn.Module, y: Tensor) -> list[Tensor]:
    net.zero_grad()
    y.float().square().mean().backward()
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


def test_once_a_pass():
    """Three layers, the first used twice: it begins another pass. The backward pass rounds none."""
    net = chain()
    with Casts(net.cells) as casts:
        y = run(net, image())
    assert casts.count == 2
    with Casts(net.cells) as casts:
        grads_of(net, y)
    assert casts.count == 0
    with torch.no_grad(), Casts(net.cells) as casts:
        run(net, image())
    assert casts.count == 2


@pytest.mark.parametrize("name", ["kw_resnet18_4x", "kw_mobilenetv2_050_1x"])
def test_once_a_warehouse_in_whole_networks(name):
    net = timm.create_model(name, num_classes=4)
    warehouses = {m for m in net.modules() if isinstance(m, Warehouse)}
    layers = sum(isinstance(m, (KWConv2d, KWLinear)) for m in net.modules())
    with Casts(*(w.cells for w in warehouses)) as casts:
        run(net, torch.randn(2, 3, 32, 32))
    assert casts.count == len(warehouses) < layers


def test_values_and_gradients_are_those_of_rounding_apart():
    net, x = chain(), image()
    found, expected = run(net, x), apart(net, x)
    assert torch.equal(found, expected)
    for ours, theirs in zip(grads_of(net, found), grads_of(net, expected), strict=True):
        assert torch.equal(ours, theirs)
    assert net.cells.grad.dtype == torch.float32


@pytest.mark.parametrize("change", ["optimizer", "data", "load", "swap", "copy"])
@pytest.mark.parametrize("graph", [True, False], ids=["with a graph", "without"])
def test_changed_cells_are_rounded_anew(change, graph):
    net, x = chain(), image()
    with torch.set_grad_enabled(graph):
        before = run(net, x)  # its graph is alive, and with it what was rounded
        if change == "optimizer":
            net.cells.grad = torch.ones_like(net.cells)
            torch.optim.SGD([net.cells], lr=1.0).step()
        elif change == "data":
            net.cells.data.mul_(-2)  # autograd does not count this
        elif change == "load":
            net.load_state_dict({**net.state_dict(), CELLS: 2 * net.cells.detach()})
        elif change == "swap":
            net.warehouse.weight = nn.Parameter(2 * net.cells.detach())
        else:
            net = copy.deepcopy(net)
            net.cells.data.mul_(-2)
        after = run(net, x)
        assert torch.equal(after, apart(net, x))
    assert not torch.equal(before, after)


def test_inference_tensors_are_not_trained_on():
    net, x = chain(), image()
    with torch.inference_mode():
        run(net, x)
    grads_of(net, run(net, x))
    with torch.inference_mode():
        assert run(chain().eval(), x).isfinite().all()


def test_checkpointed_layers():
    net, x = chain(), image().requires_grad_()
    expected = grads_of(net, run(net, x))
    with BF16:
        y = x
        for layer in (*net.layers, net.layers[0]):
            y = checkpoint(lambda y, layer=layer: layer(y).tanh(), y, use_reentrant=False)
    for ours, theirs in zip(grads_of(net, y), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("saved", [("aten.mm", "aten.bmm"), ("kw.dynamic_conv",), ("",)], ids=str)
@pytest.mark.parametrize("backend", ["auto", "bmm"])
def test_selectively_checkpointed_layers(saved, backend):
    """They do the same again in the backward pass, whatever other layers have rounded and summed
    since: torch gives them the results of before, in order."""

    def policy(context, op, *args, **kwargs):
        kept = str(op).startswith(saved)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    net, x = Chain((backend,) * 3).eval(), image().requires_grad_()
    for precision in (nullcontext(), BF16):
        with precision:
            plain, y = net(x), x
            for layer in (*net.layers, net.layers[0]):
                y = checkpoint(layer, y, use_reentrant=False, context_fn=contexts).tanh()
        expected = grads_of(net, plain)
        for ours, theirs in zip(grads_of(net, y), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_other_types_side_by_side():
    net, x = chain(), image()
    half = torch.autocast("cpu", torch.float16)
    with half:
        expected = net(x)
    run(net, x)
    with half:
        assert torch.equal(net(x), expected)
    assert net(x).dtype == torch.float32


def test_a_thread_gets_no_copy_of_another():
    """Which may be in another type or stream, and not written yet."""
    cells, shared = torch.ones(2, 2), RoundedCells()

    class Interrupted(int):
        """The number of a layer, in whose call another thread comes."""

        def __hash__(self) -> int:
            shared.get(cells, torch.float16, 0)
            return 1

    assert shared.get(cells, torch.bfloat16, Interrupted(1)).dtype == torch.bfloat16


def test_gradients_of_gradients():
    warehouse = Warehouse([SHAPE])
    layer = KWConv2d(8, 8, 3, bias=False, warehouse=warehouse)

    def penalty(rounded: bool) -> Tensor:
        x = image().requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            if not rounded:
                patch.setattr("kw.warehouse.ops.may_share", lambda *_: False)
            with BF16:
                y = layer(x).float().square().sum()
        (dx,) = torch.autograd.grad(y, x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), warehouse.cells)[0]

    torch.testing.assert_close(penalty(True), penalty(False), rtol=0.05, atol=0.05)


def test_assembled_in_float32_nothing_is_rounded():
    net = chain()
    set_assembly_precision("float32")
    try:
        with Casts(net.cells) as casts:
            grads_of(net, run(net, image()))
    finally:
        set_assembly_precision("autocast")
    assert casts.count == 0


def test_copies_do_not_carry_it():
    net, x = chain(), image()
    run(net, x)
    assert len(pickle.dumps(net)) == len(pickle.dumps(chain()))


def check_sharded(process):
    """FSDP frees and gathers the cells between passes; their storage may be another one."""
    plain, sharded = build(cell_num_ratio=4), build(cell_num_ratio=4)
    shard(sharded, process)
    for _ in range(2):
        plain.zero_grad(), sharded.zero_grad()
        for network, seeds in ((plain, range(process.world_size)), (sharded, [process.rank])):
            for seed in seeds:
                with BF16:
                    loss = loss_of(network, seed)
                loss.backward()
        for ours, theirs in zip(sharded.parameters(), plain.parameters(), strict=True):
            expected = theirs.grad / process.world_size
            error = (ours.grad.full_tensor() - expected).abs().max()
            assert error <= 1e-5 * expected.abs().max().clamp_min(1e-6)


def test_sharded_cells():
    in_processes(check_sharded, 2)


def test_graphs_share_nothing(monkeypatch):
    """What one captured graph owns may be gone when another one is replayed."""
    net = chain()
    with torch.no_grad(), Casts(net.cells) as casts:
        run(net, image())
        assert casts.count == 2
        monkeypatch.setattr("kw.warehouse.ops.rounded.is_capturing", lambda device: True)
        run(net, image())
    assert casts.count == 2 + 4
