"""One buffer for the cells' gradients of a warehouse's layers: autograd's semantics in every way of
using it. Gradients are compared with those of the reference, which autograd adds up."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kw.warehouse import KWConv2d, Warehouse
from kw.warehouse.ops import compiled, summing
from kw.warehouse.ops.native import Native
from kw.warehouse.partition import KernelShape

SHAPE = KernelShape(8, 8, (3, 3), 1, "layer")


class Chain(nn.Module):
    """Three layers of one warehouse, the first used twice."""

    def __init__(self, backends=("native",) * 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.warehouse = Warehouse([SHAPE] * 3)
        self.layers = nn.ModuleList(
            KWConv2d(8, 8, 3, padding=1, bias=False, warehouse=self.warehouse, slot=slot)
            for slot in range(3)
        )
        for layer, backend in zip(self.layers, backends, strict=True):
            layer.set_backend(backend)

    @property
    def cells(self) -> nn.Parameter:
        return self.warehouse.cells

    def outputs(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for layer in (*self.layers, self.layers[0]):
            x = layer(x).tanh()
            outputs.append(x)
        return outputs

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs(x)[-1]


@pytest.fixture(autouse=True)
def compiler():
    try:
        compiled.compiler()
    except compiled.CompileError as error:
        pytest.skip(str(error))


@pytest.fixture
def added(monkeypatch):
    """For every gradient of cells that ``native`` computes: whether it was added to others."""
    calls = []
    original = Native.backward_summing

    def spied(self, *arguments):
        total = arguments[-1]
        calls.append(None if total is None else total.value is not None)
        return original(self, *arguments)

    monkeypatch.setattr(Native, "backward_summing", spied)
    return calls


def image(seed: int = 1) -> Tensor:
    return torch.randn(3, 8, 6, 5, generator=torch.Generator().manual_seed(seed))


def plain() -> Chain:
    return Chain(("reference",) * 3)


def same(actual: Tensor | None, expected: Tensor | None) -> None:
    assert actual is not None
    assert expected is not None
    actual, expected = actual.detach(), expected.detach()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def grads(net: Chain, x: Tensor | None = None) -> Tensor:
    net.zero_grad()
    net(image() if x is None else x).sum().backward()
    return net.cells.grad


def test_layers_add_to_one_buffer_which_becomes_the_gradient(added):
    net = Chain()
    buffers = []
    original = summing._Sum.backward

    def spied(ctx, grad):
        buffers.extend(total.value.data_ptr() for total in ctx.sums.values())
        return original(ctx, grad)

    summing._Sum.backward = staticmethod(spied)
    try:
        same(grads(net), grads(plain()))
    finally:
        summing._Sum.backward = staticmethod(original)
    assert added == [False, True, True, True]
    assert buffers == [net.cells.grad.data_ptr()]  # not copied


def test_every_backward_pass_starts_anew_and_keeps_nothing():
    net, theirs = Chain(), plain()
    first = grads(net).clone()
    for _ in range(2):
        assert torch.equal(grads(net), first)
    same(first, grads(theirs))
    gc.collect()
    assert not summing._anchors.get(id(net.cells))


def test_adds_to_a_gradient_that_is_there():
    net, theirs = Chain(), plain()
    for n in (net, theirs):
        n(image(1)).sum().backward()
        before = n.cells.grad
        n(image(2)).sum().backward()
        assert n.cells.grad is before
    same(net.cells.grad, theirs.cells.grad)


def test_a_gradient_that_is_kept_is_not_written_to():
    net = Chain()
    kept = grads(net)
    copy_of_it = kept.clone()
    net.cells.grad = None
    net(image(2)).sum().backward()
    assert torch.equal(kept, copy_of_it)


@pytest.mark.parametrize("reached", [[0], [1], [2, 0], [0, 1, 2, 3]])
def test_gradients_of_parts_of_the_graph(reached):
    results = []
    for net in (Chain(), plain()):
        outputs = net.outputs(image())
        loss = sum(outputs[i].square().sum() for i in reached)
        results.append(torch.autograd.grad(loss, [net.cells])[0])
        assert net.cells.grad is None
    same(*results)


def test_gradients_of_something_else(added):
    """The cells' node does not run: nothing may wait for it."""
    x = image().requires_grad_()
    net = Chain()
    y = net(x)
    torch.autograd.grad(y.sum(), [x], retain_graph=True)
    assert added == [None] * 4
    assert net.cells.grad is None
    y.sum().backward()
    same(net.cells.grad, grads(plain()))


def test_backward_with_inputs():
    x = image().requires_grad_()
    net = Chain()
    net(x).sum().backward(inputs=[x, net.cells])
    same(net.cells.grad, grads(plain()))
    assert all(p.grad is None for p in net.layers.parameters() if p is not net.cells)


def test_two_passes_over_one_graph():
    net = Chain()
    loss = net(image()).sum()
    loss.backward(retain_graph=True)
    once = net.cells.grad.clone()
    loss.backward()
    same(net.cells.grad, 2 * once)


def test_graphs_that_share_a_node_run_apart():
    net, theirs = Chain(), plain()
    for n in (net, theirs):
        losses = [n(image(seed)).sum() for seed in (1, 2, 3)]
        (losses[0] + losses[2]).backward()
        losses[1].backward()
    same(net.cells.grad, theirs.cells.grad)


@pytest.mark.parametrize("backends", [("native", "bmm", "native"), ("bmm", "native", "assembled")])
def test_users_with_other_back_ends(backends):
    same(grads(Chain(backends)), grads(plain()))


def test_other_uses_of_the_cells():
    results = []
    for net in (Chain(), plain()):
        early = net.cells.square().sum()
        loss = net(image()).sum() + 0.1 * early + net.cells.sin().sum()
        loss.backward()
        results.append(net.cells.grad)
    same(*results)


def test_gradients_come_early_though_an_earlier_loss_lives():
    """In a loop that keeps its loss, as most do, the cells' gradient is not the last of all: what
    is reduced while the pass goes on would wait for it."""
    first, second = nn.Conv2d(8, 8, 1), Chain()
    come: list[str] = []
    for name, parameter in (("first", first.weight), ("cells", second.cells)):
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: come.append(name))
    for _ in range(3):
        loss = second(first(image())).sum()
        loss.backward()
    assert come == ["cells", "first"] * 3


def test_hooks_see_the_whole_gradient_once():
    net = Chain()
    seen = []
    net.cells.register_hook(lambda g: seen.append(g.clone()) or 3 * g)
    after = []
    net.cells.register_post_accumulate_grad_hook(lambda p: after.append(p.grad.clone()))
    grads(net)
    expected = grads(plain())
    assert len(seen) == len(after) == 1
    same(seen[0], expected)
    same(after[0], 3 * expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    net = Chain()
    a, b, c = net.layers
    x = image().requires_grad_()
    net.train()
    y = checkpoint(lambda t: b(a(t).tanh()).tanh(), x, use_reentrant=reentrant)
    y = checkpoint(lambda t: c(t).tanh(), y, use_reentrant=reentrant)
    a(y).tanh().sum().backward()
    same(net.cells.grad, grads(plain()))


def test_double_backward():
    results = []
    for net in (Chain(), plain()):
        x = image().requires_grad_()
        outputs = net.outputs(x)
        first = torch.autograd.grad(outputs[-1].sum(), [x, net.cells], create_graph=True)
        sum(g.square().sum() for g in first).backward()
        results.append((*first, net.cells.grad, x.grad))
    for ours, theirs in zip(*results, strict=True):
        same(ours, theirs)


def test_threads_with_graphs_of_their_own_and_with_one():
    net = Chain()
    outputs = [[], []]

    def work(i: int, loss: Tensor | None) -> None:
        for _ in range(5):
            y = net(image(i)).sum() if loss is None else loss
            outputs[i].append(torch.autograd.grad(y, [net.cells], retain_graph=True)[0])

    net.eval()  # statistics are not shared between threads
    reference = plain().eval()
    expected = [grads(reference, image(i)).clone() for i in (0, 1)]
    shared = net(image(0)).sum()
    for losses in ((None, None), (shared, shared)):
        for results in outputs:
            results.clear()
        threads = [threading.Thread(target=work, args=(i, losses[i])) for i in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i in (0, 1):
            assert len(outputs[i]) == 5
            for result in outputs[i]:
                same(result, expected[i if losses[0] is None else 0])


def test_an_error_in_between_leaves_nothing_behind():
    net = Chain()
    x = image().requires_grad_()
    y = net.layers[0](x)
    y.register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        net.layers[1](y).sum().backward()
    assert net.cells.grad is None
    same(grads(net), grads(plain()))


def test_nothing_is_kept_alive():
    gc.collect()  # graphs of other tests
    others = set(summing._anchors)
    net = Chain()
    cells = weakref.ref(net.cells)
    loss = net(image()).sum()
    (own,) = set(summing._anchors) - others
    assert summing._anchors[own]() is not None
    loss.backward()
    del loss
    assert own not in summing._anchors  # without the garbage collector: there are no cycles
    del net
    gc.collect()
    assert cells() is None


def test_a_model_with_a_living_graph_can_be_copied_and_pickled():
    net = Chain()
    loss = net(image()).sum()
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        same(grads(other), grads(plain()))
    loss.backward()


def test_parameters_that_change_while_a_graph_lives():
    """Another type and back, frozen and trained again: the sum goes where autograd looks for it."""
    net = Chain()
    alive = net(image())
    net.double()
    net.float()
    same(grads(net), grads(plain()))
    net.cells.requires_grad_(False)
    net.zero_grad()
    net(image()).sum().backward()
    assert net.cells.grad is None
    net.cells.requires_grad_(True)
    same(grads(net), grads(plain()))
    del alive


def test_functional_call_and_transforms():
    net = Chain()
    parameters = {k: v.detach().clone() for k, v in net.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(net, parameters, (image(),)).sum()

    name = next(k for k in parameters if k.endswith("warehouse.weight"))
    expected = grads(plain())
    leaves = {k: v.requires_grad_() for k, v in parameters.items()}
    same(torch.autograd.grad(loss(leaves), [leaves[name]])[0], expected)


@pytest.mark.parametrize("view", [False, True])
def test_data_parallel(view, tmp_path):
    """Buckets, their hooks, and micro-steps without reduction."""
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        net, theirs = Chain(), plain()
        parallel = nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=view)
        for _ in range(2):
            for n in (net, theirs):
                n.zero_grad()
            with parallel.no_sync():
                parallel(image(1)).sum().backward()
            parallel(image(2)).sum().backward()
            for seed in (1, 2):
                theirs(image(seed)).sum().backward()
            same(net.cells.grad, theirs.cells.grad)
    finally:
        dist.destroy_process_group()
