"""What PyTorch does not document: each part by itself, so that a new version names what broke."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from kw import torch_private as private

ROOT = Path(__file__).parents[1]


def test_nowhere_else() -> None:
    """Of modules and operators; private attributes of modules are the conversion's business."""
    pattern = re.compile(
        r"torch\._[A-Za-z]\w*|torch\.(?:ops|utils|nn)\.[\w.]*\._\w+|from torch[\w.]*\._\w+ import"
        r"|from torch[\w.]* import _\w+|batchnorm\._\w+"
    )
    allowed = {"torch.utils._pytree"}  # documented by its use in torch.compile's guides
    found = [
        f"{path.relative_to(ROOT)}: {match}"
        for path in ROOT.glob("kw/**/*.py")
        if path.name != "torch_private.py"
        for match in pattern.findall(path.read_text())
        if not any(match.startswith((name, f"from {name}")) for name in allowed)
    ]
    assert found == []


def test_bases() -> None:
    assert all(issubclass(n, private.BatchNorm) for n in (nn.BatchNorm1d, nn.SyncBatchNorm))
    assert issubclass(nn.InstanceNorm2d, private.BatchOrInstanceNorm)
    assert not issubclass(nn.LayerNorm, private.BatchOrInstanceNorm)


def test_values() -> None:
    with FakeTensorMode():
        assert not private.has_values(nn.Linear(2, 2).weight)
    assert not private.has_values(torch.empty(2, device="meta"))
    assert private.has_values(nn.Linear(2, 2).weight)


def test_backward_passes() -> None:
    seen: list[int] = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    reached: list[bool] = []

    def look(_: Tensor) -> None:
        seen.append(private.backward_pass())
        reached.append(private.runs_in_this_pass(other.grad_fn))
        reached.append(private.runs_in_this_pass(y.grad_fn))

    y.register_hook(look)
    other = x * 3
    assert private.backward_pass() == -1
    for _ in range(2):
        y.sum().backward(retain_graph=True)
    assert len(set(seen)) == 2
    assert -1 not in seen
    assert reached == [False, True] * 2


def test_transforms_and_modes() -> None:
    inside: list[bool] = []
    torch.func.vmap(lambda t: inside.append(private.in_function_transform()) or t)(torch.ones(2))
    with torch.autograd.forward_ad.dual_level():
        inside.append(private.in_function_transform())
    assert inside == [True, True]
    assert not private.in_function_transform()
    for context in (FlopCounterMode(display=False), *create_selective_checkpoint_contexts([])):
        with context:
            assert private.is_watched()
    assert not private.is_watched()


def test_many_tensors_at_once() -> None:
    a, b = [torch.zeros(2), torch.ones(3)], [torch.ones(2), torch.full((3,), 3.0)]
    private.copy_all(a, b)
    assert all(map(torch.equal, a, b))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bad", [True, False])
def test_steps_that_a_fault_stops(fused: bool, bad: bool) -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
    weight.grad = torch.ones(3)
    private.step_unless(torch.tensor(bad), optimizer)
    assert torch.equal(weight, torch.ones(3)) == bad
    assert not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("value", [1.0, float("inf")])
def test_overflow_of_a_scaler(value: float) -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(weight.sum() * value).backward()
    scaler.unscale_(optimizer)
    overflowed, scale = private.overflow(scaler, optimizer)
    assert bool(overflowed) == (value != 1.0)
    assert scale.item() == 8.0


def test_exports() -> None:
    """True where torch.export traces, in either of its ways, and not where torch.compile does."""

    class Asks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if private.exports() else x

    x = torch.zeros(2)
    assert torch.equal(Asks()(x), x)
    assert torch.equal(torch.compile(Asks(), backend="eager", fullgraph=True)(x), x)
    for strict in (True, False):
        assert torch.equal(torch.export.export(Asks(), (x,), strict=strict).module()(x), x + 1)


def test_uncompiled() -> None:
    network = nn.Linear(2, 2)
    network.compile(backend="eager")
    seen: list[int] = []
    with private.uncompiled(network):
        network.register_forward_hook(lambda *_: seen.append(1))
        network(torch.ones(1, 2))
    assert seen == [1]
    assert network._compiled_call_impl is not None
    private.clear_compiled(limit=32)
    private.clear_compiled()


def test_a_scan() -> None:
    values = torch.arange(6.0).view(3, 2)
    doubled = private.scan(lambda c, v: (c.clone(), 2 * v[0]), torch.zeros(1), (values,))
    assert torch.equal(doubled, 2 * values)


def test_onednn() -> None:
    product = private.onednn_linear()
    if product is None:
        pytest.skip("this build of PyTorch has no oneDNN")
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    torch.testing.assert_close(product(a, b), a @ b)


def test_errors_of_tracing() -> None:
    assert issubclass(private.trace_errors(), Exception)
