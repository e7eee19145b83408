"""Back end ``native`` against the reference, computed in float64 from the same values."""

from __future__ import annotations

import math
import os
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kw.warehouse.ops import compiled, native
from kw.warehouse.ops.cache import cache_folder
from kw.warehouse.ops.contraction import Problem
from kw.warehouse.ops.native import Native
from kw.warehouse.ops.reference import conv_reference
from kw.warehouse.ops.spec import ConvSpec
from kw.warehouse.partition import KernelShape, partition_kernels


@dataclass
class Case:
    """One convolution and how its kernel is cut."""

    kernel: tuple[int, ...]
    size: tuple[int, ...]
    channels: tuple[int, int] = (6, 10)
    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] = 0
    dilation: int | tuple[int, ...] = 1
    batch: int = 3
    settings: dict[str, Any] = field(default_factory=dict)
    groups: int = 1

    def axes(self, value):
        return (value,) * len(self.kernel) if isinstance(value, int) else value

    def make(self) -> tuple[Tensor, Tensor, Tensor, ConvSpec]:
        """``(x, alpha, cells, spec)`` in float32."""
        torch.manual_seed(0)
        i, o = self.channels
        shape = KernelShape(o, i, self.kernel, self.groups)
        warehouse = partition_kernels([shape], **self.settings)
        axes = map(self.axes, (self.stride, self.padding, self.dilation))
        spec = ConvSpec(warehouse.layers[0], *axes, self.groups)
        shapes = (
            (self.batch, i, *self.size),
            (self.batch, spec.partition.mixtures, warehouse.cells),
            (warehouse.cells, math.prod(warehouse.cell_shape)),
        )
        return *(torch.randn(s) for s in shapes), spec


HALVES = {"cell_inplane_ratio": 0.5, "cell_outplane_ratio": 0.5}
WHOLE = {"spatial_partition": False}
CASES = {
    "1d": Case((3,), (9,)),
    "1d even kernel, stride, dilation": Case((4,), (17,), stride=3, padding=2, dilation=2),
    "1d pointwise": Case((1,), (7,), settings=HALVES),
    "2d": Case((3, 3), (7, 5), padding=1, settings=HALVES),
    "2d whole cells": Case((3, 3), (7, 5), padding=1, settings={**WHOLE, **HALVES}),
    "2d whole cells, strided": Case((2, 3), (8, 5), (37, 34), 2, 1, settings=WHOLE),
    "2d uneven in every way": Case(
        (3, 2), (9, 11), stride=(2, 1), padding=(2, 0), dilation=(1, 3), settings=HALVES
    ),
    "2d stride beyond kernel": Case((2, 1), (9, 11), stride=3, padding=(1, 0)),
    "2d stride and dilation alike": Case((3, 3), (9, 8), stride=2, padding=2, dilation=2),
    "2d many cells": Case((3, 3), (5, 5), settings={"cell_num_ratio": 40}),
    "2d few cells": Case((2, 2), (5, 5), settings={"cell_num_ratio": 0.5, **HALVES}),
    "2d one sample": Case((3, 3), (7, 5), padding=1, batch=1),
    "2d many samples": Case((2, 2), (5, 4), padding=1, batch=19),
    "2d larger than its input": Case((7, 7), (3, 3), padding=3),
    "2d pointwise": Case((1, 1), (5, 7)),
    "2d pointwise strided": Case((1, 1), (5, 8), stride=(2, 3), settings=HALVES),
    "2d pointwise padded": Case((1, 1), (5, 4), stride=2, padding=(1, 0), dilation=2),
    "2d pointwise one position": Case((1, 1), (1, 1), batch=1),
    "2d full tiles": Case((3, 3), (14, 7), (64, 128), padding=1, batch=2, settings=HALVES),
    "2d tails": Case((3, 3), (9, 7), (2 * 43, 2 * 45), 2, 1, batch=2, settings=HALVES),
    "2d several slices": Case((3, 3), (15, 17), (520, 33), padding=1, batch=2),
    "2d large map": Case((3, 3), (40, 41), (5, 33), padding=1, batch=2),
    "2d deep, many blocks": Case(
        (1, 1), (9, 9), (128, 128), 2, settings=dict.fromkeys(HALVES, 0.125)
    ),
    "3d": Case((3, 1, 2), (5, 4, 3), stride=(1, 2, 1), padding=(1, 0, 1), settings=HALVES),
    "3d whole cells": Case((2, 3, 3), (4, 5, 5), stride=2, padding=1, settings=WHOLE),
    "3d pointwise": Case((1, 1, 1), (3, 2, 5), stride=2),
}
everywhere = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
LAYOUTS = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "sliced": lambda x: torch.stack([x, x + 1], -1)[..., 0],
    "expanded": lambda x: x[:1].expand(len(x), -1, -1, -1),
}


@pytest.fixture(scope="module")
def backend():
    try:
        compiled.compiler()
    except compiled.CompileError as error:
        pytest.skip(str(error))
    return Native()


@pytest.fixture
def threads():
    """Sets the number of threads; it is restored."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def problem(x: Tensor, cells: Tensor, spec: ConvSpec, **changes) -> Problem:
    given = {"dtype": x.dtype, "device": x.device.type, "training": True, **changes}
    return Problem(spec, len(cells), len(x), tuple(x.shape[2:]), **given)


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5 * expected.abs().max())


def expected(grad: Tensor, *tensors: Tensor, spec: ConvSpec) -> list[Tensor]:
    """Result and gradients of the reference, in float64."""
    leaves = [t.detach().double().requires_grad_() for t in tensors]
    y = conv_reference(*leaves, spec)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.double())]


def both(backend, grad, *tensors, spec, needs=(True, True, True)):
    y = backend.forward(*tensors, spec)
    return [y, *backend.backward(grad, *tensors, spec, needs)]


def random_grad(x: Tensor, spec: ConvSpec) -> Tensor:
    return torch.randn(len(x), spec.out_channels, *spec.output_size(x.shape[2:]))


@everywhere
def test_equals_reference(case, backend):
    x, alpha, cells, spec = case.make()
    assert backend.refusal(problem(x, cells, spec)) is None
    grad = random_grad(x, spec)
    theirs = expected(grad, x, alpha, cells, spec=spec)
    for ours, their in zip(both(backend, grad, x, alpha, cells, spec=spec), theirs, strict=True):
        close(ours, their)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["2d", "2d tails", "2d full tiles", "2d pointwise"])
def test_layouts(name, layout, backend):
    """Input, gradient and cells that are not contiguous; channels last stays channels last."""
    x, alpha, cells, spec = CASES[name].make()
    x, grad = LAYOUTS[layout](x), LAYOUTS[layout](random_grad(x, spec))
    alpha, cells = (t.mT.contiguous().mT for t in (alpha, cells))
    theirs = expected(grad, x, alpha, cells, spec=spec)
    ours = both(backend, grad, x, alpha, cells, spec=spec)
    for our, their in zip(ours, theirs, strict=True):
        close(our, their)
    form = torch.channels_last if layout == "channels last" else torch.contiguous_format
    assert all(t.is_contiguous(memory_format=form) for t in ours[:2])


@pytest.mark.parametrize("last", [(True, False), (False, True)])
def test_gradient_in_another_layout_than_the_input(last, backend):
    x, alpha, cells, spec = CASES["2d tails"].make()
    grad = random_grad(x, spec)
    theirs = expected(grad, x, alpha, cells, spec=spec)
    x, grad = (
        t.to(memory_format=torch.channels_last) if yes else t
        for t, yes in zip((x, grad), last, strict=True)
    )
    for our, their in zip(both(backend, grad, x, alpha, cells, spec=spec), theirs, strict=True):
        close(our, their)


@pytest.mark.parametrize("name", ["2d", "2d several slices", "2d many samples", "2d large map"])
def test_threads_and_repetition_change_nothing(name, backend, threads):
    x, alpha, cells, spec = CASES[name].make()
    grad = random_grad(x, spec)
    runs = []
    for count in (1, 3, 3, 8):
        threads(count)
        runs.append(both(backend, grad, x, alpha, cells, spec=spec))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3]
)
def test_only_what_is_wanted(needs, backend):
    x, alpha, cells, spec = CASES["2d tails"].make()
    grad = random_grad(x, spec)
    everything = backend.backward(grad, x, alpha, cells, spec, (True, True, True))
    some = backend.backward(grad, x, alpha, cells, spec, needs)
    for wanted, whole, part in zip(needs, everything, some, strict=True):
        assert torch.equal(whole, part) if wanted else part is None


def test_batches_that_go_through_scratch_memory_in_parts(backend):
    """Inputs of more than 64 MB."""
    case = Case((1, 1), (520, 520), (24, 2), batch=3)
    x, alpha, cells, spec = case.make()
    grad = random_grad(x, spec)
    whole = both(backend, grad, x, alpha, cells, spec=spec)
    each = [
        both(backend, g, x_, a, cells, spec=spec)
        for g, x_, a in zip(grad.split(1), x.split(1), alpha.split(1), strict=True)
    ]
    for i in range(3):
        torch.testing.assert_close(whole[i], torch.cat([one[i] for one in each]))
    total = torch.stack([one[3] for one in each]).double().sum(0)
    torch.testing.assert_close(whole[3].double(), total, rtol=0, atol=1e-5 * total.abs().max())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cuda"}, "on a CPU only, not on cuda"),
        ({"dtype": torch.float64}, "float32 only, not in float64"),
        ({"dtype": torch.bfloat16}, "float32 only, not in bfloat16"),
    ],
)
def test_refusals(changes, reason):
    x, _, cells, spec = CASES["2d"].make()
    assert reason in Native().refusal(problem(x, cells, spec, **changes))


def test_groups_are_refused():
    x, _, cells, spec = Case((3, 3), (5, 5), (4, 6), groups=2).make()
    assert "without groups" in Native().refusal(problem(x, cells, spec))


def test_can_be_turned_off(monkeypatch):
    x, _, cells, spec = CASES["2d"].make()
    monkeypatch.setenv("KW_NATIVE", "0")
    assert "KW_NATIVE=0" in Native().refusal(problem(x, cells, spec))


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As if nothing had been compiled by this process, nor for this user."""
    monkeypatch.setattr(compiled, "_loaded", None)
    monkeypatch.delenv("KW_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._library.cache_clear(), native._no_library.cache_clear()
    yield tmp_path / "kernelwarehouse"
    native._library.cache_clear(), native._no_library.cache_clear()


def test_no_compiler_is_refused_and_said_once(fresh, monkeypatch, caplog):
    x, _, cells, spec = CASES["2d"].make()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    for _ in range(2):
        reason = Native().refusal(problem(x, cells, spec))
        assert reason == "needs a C++ compiler, and none of c++, g++, clang++ is there"
    assert len(caplog.records) == 1


def test_compiler_that_fails_is_refused(fresh, monkeypatch):
    x, _, cells, spec = CASES["2d"].make()
    monkeypatch.setenv("CXX", "false")
    assert "could not compile" in Native().refusal(problem(x, cells, spec))
    assert not list(fresh.iterdir())


def test_library_is_compiled_once(fresh, backend, monkeypatch):
    compiled.library()
    (path,) = fresh.iterdir()
    written = path.stat().st_mtime_ns
    monkeypatch.setattr(compiled, "_loaded", None)
    compiled.library()
    assert [p.stat().st_mtime_ns for p in fresh.iterdir()] == [written]
    # Nor again where the folder cannot be written any more.
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    monkeypatch.setattr(compiled, "_loaded", None)
    monkeypatch.setattr(compiled, "_compile", lambda *_: pytest.fail("compiled again"))
    assert compiled.library()._name == str(path)


@pytest.mark.parametrize("function", [None, "link", "access"])
def test_of_two_that_compile_at_once_the_first_stays(function, tmp_path, monkeypatch):
    """Another machine may have loaded it from the same disk. One that this user cannot read does
    not stay."""

    def fails(*_):
        raise PermissionError

    if function == "link":
        monkeypatch.setattr(os, "link", fails)
    if function == "access":
        monkeypatch.setattr(os, "access", lambda *_: False)
    path, script = tmp_path / "native.so", tmp_path / "compiler"
    for text in ("first", "second"):
        script.write_text(f"#!/bin/sh\nprintf {text} >$2\n")
        script.chmod(0o700)
        compiled._compile([str(script)], path)
    assert path.read_text() == ("second" if function == "access" else "first")
    assert {p.name for p in tmp_path.iterdir()} == {"native.so", "compiler"}


def test_the_cache_may_be_the_present_folder(fresh, backend, monkeypatch, tmp_path):
    """The loader takes a name without a folder for a library of the system."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KW_CACHE_DIR", ".")
    assert Path(compiled.library()._name).parent == tmp_path


def test_openmp_runtime_is_the_one_torch_brought(backend):
    """Two of them would start twice as many threads as there are cores."""
    library = compiled.library()
    needed = subprocess.run(["ldd", library._name], capture_output=True, text=True).stdout
    assert "omp" not in needed


def test_a_cache_that_everybody_writes_to_is_not_used(fresh, tmp_path, monkeypatch):
    """Whoever can write there could have a library of theirs loaded (docs/security.md)."""
    tried = []
    monkeypatch.setenv("KW_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiled, "_compile", lambda arguments, path: tried.append(path.parent))
    for mode, is_used in ((0o700, True), (0o777, False)):
        tmp_path.chmod(mode)
        with pytest.raises(OSError, match="native-"):  # nothing was compiled
            compiled._load()
        assert (tried[-1] == tmp_path) == is_used
    assert not tried[-1].exists()  # the folder of this process alone


def test_a_user_without_a_home_has_a_cache(monkeypatch, tmp_path):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    for name in ("KW_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = cache_folder()
    assert folder.parent == tmp_path
    assert folder.name == f"kernelwarehouse-{os.getuid()}"
