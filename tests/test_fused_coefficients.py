"""The Triton kernels of attention coefficients against plain operators in float64.

tests/test_triton.py runs this file in the interpreter.
"""

from __future__ import annotations

import logging
import re
from contextlib import contextmanager

import pytest
import torch
from triton_checks import DEVICE, INTERPRETED

from kw.benchmark.doctor import examine_attention
from kw.warehouse import KWConv2d, set_temperature
from kw.warehouse.ops import coefficients as room
from kw.warehouse.ops.coefficients import (
    annealed,
    contrasting,
    deviations,
    fused_coefficients,
    is_fused,
)
from kw.warehouse.ops.precision import coefficient_type, set_assembly_precision
from kw.warehouse.ops.trials import DeviceLostError

runs_kernels = pytest.mark.skipif(
    not INTERPRETED and DEVICE == "cpu", reason="needs Triton and a GPU or its interpreter"
)
SIZES = [(1, 1, 1), (3, 5, 27), (2, 7, 15), (2, 3, 16), (9, 11, 108), (1, 4, 552), (70, 2, 3)]


def operands(batch, mixtures, cells, tau):
    torch.manual_seed(batch + cells)
    logits = torch.randn(batch, mixtures, cells + 1)
    logits[0, 0] = 0  # the denominator is eps
    logits[-1, -1, :-1] *= 1e-6
    one_hot = torch.eye(cells)[torch.arange(mixtures) % cells]
    temperature = None if tau is None else torch.tensor(tau)
    return [None if t is None else t.to(DEVICE) for t in (logits, one_hot, temperature)]


@runs_kernels
@pytest.mark.parametrize("tau", [None, 0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_plain_operators(size, tau):
    logits, one_hot, temperature = operands(*size, tau)
    assert is_fused(logits, one_hot, temperature, torch.float32)
    ours = logits.clone().requires_grad_()
    exact = logits.double().requires_grad_()
    alpha = fused_coefficients(ours, one_hot, temperature, torch.float32)
    expected = annealed(contrasting(exact)[..., :-1], one_hot, temperature)
    torch.testing.assert_close(alpha.double(), expected, rtol=1e-5, atol=1e-7)
    if temperature is not None and tau == 1:
        assert torch.equal(alpha, one_hot.expand_as(alpha))
    if temperature is not None:
        temperature.fill_(0.5)  # the backward pass has its own
    weight = torch.randn(size, device=DEVICE)
    alpha.backward(weight)
    expected.backward(weight.double())
    scale = exact.grad.abs().amax(-1, keepdim=True) + 1e-12
    torch.testing.assert_close(ours.grad / scale, exact.grad / scale, rtol=0, atol=2e-5)


@runs_kernels
def test_lies_as_assembly_reads_it():
    alpha = fused_coefficients(*operands(4, 6, 9, 0.2), torch.bfloat16)
    assert alpha.dtype == torch.bfloat16
    assert alpha.flatten(0, 1).t().is_contiguous()
    plain = fused_coefficients(*operands(4, 6, 9, 0.2), torch.float32)
    torch.testing.assert_close(plain, alpha.float(), rtol=2**-7, atol=0)  # one bit


@runs_kernels
@pytest.mark.parametrize("mixtures", [1, 4])
@pytest.mark.parametrize("shape", ["expanded", "by cell", "transposed"])
def test_gradients_of_any_layout(shape, mixtures):
    """Transposed, the axis of one mixture has a stride of its own, and torch calls it contiguous
    (https://github.com/pytorch/pytorch/issues/144711)."""
    logits, one_hot, temperature = operands(3, mixtures, 6, 0.4)
    grads = {
        "expanded": torch.randn(1, 1, 6).expand(3, mixtures, 6),
        "by cell": torch.randn(6, 3, mixtures).permute(1, 2, 0),
        "transposed": torch.randn(mixtures, 3, 6).transpose(0, 1),
    }
    grad = grads[shape].to(DEVICE)
    found = []
    for each in (grad, grad.clone(memory_format=torch.contiguous_format)):
        leaf = logits.clone().requires_grad_()
        fused_coefficients(leaf, one_hot, temperature, torch.float32).backward(each)
        found.append(leaf.grad)
    torch.testing.assert_close(*found)
    assert found[0].abs().sum() > 0


@runs_kernels
def test_gradients_of_gradients():
    logits, one_hot, temperature = operands(2, 3, 4, 0.4)
    found = []
    for fused in (True, False):
        leaf = (logits + 0.1).detach().requires_grad_()
        if fused:
            alpha = fused_coefficients(leaf, one_hot, temperature, torch.float32)
        else:
            alpha = annealed(contrasting(leaf)[..., :-1], one_hot, temperature)
        (first,) = torch.autograd.grad(alpha.square().sum(), leaf, create_graph=True)
        first.square().sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@runs_kernels
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_a_layer_trains_alike(norm, monkeypatch):
    torch.manual_seed(0)
    layer = KWConv2d(6, 8, 3, padding=1, cell_num_ratio=2, norm=norm, start="paper").to(DEVICE)
    set_temperature(layer, 0.25)
    x = torch.randn(4, 6, 9, 9, device=DEVICE)
    found = []
    for usable in (True, False):
        if not usable:
            monkeypatch.setattr(room, "_kernels", lambda: "off")
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.square().sum().backward()
        found.append([y.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@runs_kernels
def test_what_it_does_not_take():
    logits, one_hot, temperature = operands(2, 3, 4, 0.4)
    take = (one_hot, temperature, torch.float32)
    assert is_fused(logits, *take)
    assert not is_fused(logits.double(), *take)
    assert not is_fused(logits.transpose(0, 1), *take)
    assert not is_fused(logits[:0], *take)
    assert not is_fused(logits.as_subclass(torch.nn.Parameter), *take)
    seen = []

    def transformed(z):
        seen.append(is_fused(z, *take))
        return z.sum()

    torch.func.grad(transformed)(logits)
    assert seen == [False]


def test_types():
    assert coefficient_type("cpu") == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert coefficient_type("cpu") == torch.bfloat16
        set_assembly_precision("float32")
        try:
            assert coefficient_type("cpu") == torch.float32
        finally:
            set_assembly_precision("autocast")
    with torch.autocast("cpu", torch.float16):  # gradients would overflow
        assert coefficient_type("cpu") == torch.float32


def spoiled(*, error=None, factor=1.0):
    """A launch with a fault."""

    def launch(logits, one_hot, temperature, dtype):
        if error is not None:
            raise error
        alpha = annealed(contrasting(logits)[..., :-1], one_hot, temperature)
        return (alpha * factor).to(dtype), temperature

    return launch


def plain_gradient(grad, logits, kept):
    with torch.inference_mode(False), torch.enable_grad():
        exact = logits.clone().requires_grad_()
        own = torch.zeros_like(logits[0, :, :-1])
        alpha = annealed(contrasting(exact)[..., :-1], own, kept)
        return torch.autograd.grad(alpha, exact, grad.float())[0]


@pytest.mark.parametrize(
    ("launch", "reason"),
    [
        (spoiled(error=RuntimeError("Failed to find C compiler.")), "C compiler"),
        (spoiled(error=SyntaxError("at 3:1: unexpected token")), "unexpected token"),
        (spoiled(factor=1.01), "coefficients is off by"),
        (spoiled(factor=torch.nan), "off by inf"),
    ],
    ids=["no compiler", "compile error", "wrong", "unwritten"],
)
def test_a_fault_bans_the_kernel(launch, reason, monkeypatch, caplog):
    with_faults(monkeypatch, launch)
    logits, one_hot, temperature = operands(2, 3, 4, 0.4)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert not is_fused(logits, one_hot, temperature, torch.float32)
    (record,) = caplog.records
    assert "the kernel of attention coefficients is not used for 4 cells" in record.getMessage()
    assert reason in record.getMessage()
    with_faults(monkeypatch, spoiled())
    assert is_fused(logits, one_hot, temperature, torch.float32)
    with torch.inference_mode():
        assert is_fused(logits, one_hot, None, torch.bfloat16)


def test_a_lost_device_is_said_with_advice(monkeypatch):
    with_faults(monkeypatch, spoiled())

    def lost(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("kw.warehouse.ops.trials._synchronise", lost)
    with pytest.raises(DeviceLostError, match=r"illegal memory access.*KW_FUSED_ATTENTION=0"):
        is_fused(*operands(2, 3, 4, 0.4), torch.float32)


def with_faults(monkeypatch, launch):
    """As on a GPU, with these kernels."""
    monkeypatch.setattr(room, "trials", room.Trials())
    monkeypatch.setattr(room, "interpreted", lambda: False)
    monkeypatch.setattr(room, "_kernels", lambda: room)
    monkeypatch.setattr(room, "_is_supported", lambda logits: True)
    monkeypatch.setattr(room, "launch", launch)
    monkeypatch.setattr(room, "launch_gradient", plain_gradient)


@runs_kernels
def test_the_trial_finds_no_fault():
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        for is_annealed in (True, False):
            found = deviations(5, 27, is_annealed, dtype, DEVICE)
            assert max(found.values()) < limit


def test_a_trial_is_made_on_the_device_of_the_logits(monkeypatch):
    """Which need not be the current one."""
    current, seen = [0], []

    @contextmanager
    def device_of(tensor):
        current.append(1)
        yield
        current.pop()

    def launch(*operands):
        seen.append(current[-1])
        return spoiled()(*operands)

    with_faults(monkeypatch, launch)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(room, "current_gpu", lambda device: current[-1])
    assert is_fused(*operands(2, 3, 4, 0.4), torch.float32)
    ((*_, gpu),) = room.trials._admitted
    assert (gpu, seen) == (1, [1])


@pytest.mark.parametrize("default", [torch.device("meta"), torch.float64], ids=str)
def test_a_trial_does_not_depend_on_torchs_defaults(default, monkeypatch, caplog):
    with_faults(monkeypatch, spoiled())
    is_type = isinstance(default, torch.dtype)
    operand = operands(2, 3, 4, 0.4)
    (torch.set_default_dtype if is_type else torch.set_default_device)(default)
    try:
        assert is_fused(*operand, torch.float32), caplog.text
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@pytest.mark.parametrize(
    ("launch", "words"),
    [
        (spoiled(), r"float32 \de-\d+, bfloat16 \de-0\d"),
        (spoiled(factor=1.2), "float32 WRONG: coefficients is off by 2e-01 of.*, bfloat16 WRONG"),
        (spoiled(error=RuntimeError("no C compiler")), "float32 FAILS: RuntimeError: no C comp"),
    ],
    ids=["right", "wrong", "fails"],
)
def test_the_doctor_examines_the_kernel(launch, words, monkeypatch):
    with_faults(monkeypatch, launch)
    assert re.match(words, examine_attention("cpu"))
