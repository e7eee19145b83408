"""Temperature through every wrapper, without recompiling or synchronising."""

from __future__ import annotations

import copy
import math
import pickle
import sys

import pytest
import timm
import torch
import torch.distributed as dist
from networks import assert_trains, images, norms, small
from timm.utils import ModelEmaV3
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

import kw
from kw import get_temperature, set_temperature
from kw.warehouse import (
    anneal,
    annealed_temperature,
    find_warehouses,
    fold_temperature,
    set_backend,
)

# --- temperature ----------------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def ema_with_copied_buffers(model):
    return ModelEmaV3(model, exclude_buffers=True)


WRAPPERS = [
    copy.deepcopy,
    ModelEmaV3,
    ema_with_copied_buffers,
    AveragedModel,
    DistributedDataParallel,
    lambda model: torch.compile(model, backend="eager"),
    lambda model: AveragedModel(DistributedDataParallel(torch.compile(model, backend="eager"))),
]
WRAPPER_NAMES = ["deepcopy", "ema", "ema buffers", "averaged", "ddp", "compile", "all"]


@pytest.mark.parametrize("wrap", WRAPPERS, ids=WRAPPER_NAMES)
@pytest.mark.usefixtures("one_process")
@torch.no_grad()
def test_temperature_through_wrappers(wrap):
    """The wrapper starts at its model's temperature; setting it changes what it computes."""
    model = small().eval()
    expected = {}
    for tau in (0.8, 0.3):
        set_temperature(model, tau)
        expected[tau] = model(images())
    wrapped = wrap(model).eval()
    assert get_temperature(wrapped) == pytest.approx(0.3)
    torch.testing.assert_close(wrapped(images()), expected[0.3])
    set_temperature(wrapped, 0.8)
    torch.testing.assert_close(wrapped(images()), expected[0.8])


def test_annealing_is_refused_where_it_would_be_wrong():
    network = timm.create_model("resnet10t")
    in_part = {"start": "paper", "warehouses": {"stage2_dense": {"start": "keep"}}}
    for start in ({"start": "keep"}, in_part):
        kept = kw.convert(copy.deepcopy(network), "auto", **start)
        with pytest.raises(ValueError, match=r"start 'keep'.*temperature 0 only"):
            anneal(kept, 4)
        assert get_temperature(kept) == 0
    fresh = anneal(kw.convert(network, "auto", start="paper"), 4)
    with pytest.raises(ValueError, match="anneals already"):
        anneal(fresh, 8)


@pytest.mark.parametrize("average", [ema_with_copied_buffers, AveragedModel])
def test_averages_receive_the_temperature(average):
    """An average whose buffers are copied follows the model, with no call of its own."""
    model = small()
    averaged = average(model)
    set_temperature(model, 0.6)
    update = getattr(averaged, "update", None) or averaged.update_parameters
    update(model)
    assert get_temperature(averaged) == pytest.approx(0.6)


@pytest.mark.parametrize("tau", [-0.1, 1.1, math.nan, math.inf])
def test_temperature_out_of_range_is_refused(tau):
    model = small()
    with pytest.raises(ValueError, match=r"expected a value in \[0, 1\]"):
        set_temperature(model, tau)
    assert get_temperature(model) == pytest.approx(0.3)


def test_temperature_of_a_static_model_is_refused():
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match="Sequential has no KernelWarehouse layer"):
        set_temperature(model, 0.5)
    with pytest.raises(ValueError, match="KernelWarehouse layer"):
        get_temperature(model)


def test_unequal_temperatures_are_no_temperature():
    model = small()
    set_temperature(model[0], 0.5)
    with pytest.raises(ValueError, match="no single temperature") as error:
        get_temperature(model)
    assert "0.5" in str(error.value)


def test_a_part_of_a_model_reaches_its_warehouses():
    model = small()
    assert find_warehouses(model) == list(model.warehouses.values())
    assert find_warehouses(model[:3]) == [model.warehouses["spatial"]]
    set_temperature(model[3], 1.0)
    assert get_temperature(model.warehouses["pointwise"]) == 1
    assert get_temperature(model.warehouses["spatial"]) == pytest.approx(0.3)


def test_setting_the_temperature_writes_into_the_buffer():
    """In place: a captured graph or a flattened buffer keeps pointing at it."""
    model = small()
    buffers = [w.temperature for w in find_warehouses(model)]
    set_temperature(model, 0.7)
    assert all(w.temperature is b for w, b in zip(find_warehouses(model), buffers, strict=True))


def test_temperature_may_change_before_the_backward_pass():
    model, other = small(), small()
    gradients = []
    for network, tau in ((model, 0.3), (other, 0.9)):
        y = network(images()).square().mean()
        set_temperature(network, tau)
        y.backward()
        gradients.append([p.grad for p in network.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_annealing():
    values = [annealed_temperature(step, 4) for step in (0, 1, 2, 3, 4, 5, 100)]
    assert values == [1, 0.75, 0.5, 0.25, 0, 0, 0]
    assert annealed_temperature(0, 0) == 0
    assert annealed_temperature(1, 2.5) == pytest.approx(0.6)


# --- by passes ------------------------------------------------------------------------------------


def taus(model, passes):
    """The temperature of each of some passes in training."""
    found = []
    for _ in range(passes):
        model.train()(images())
        found.append(get_temperature(model))
    return found


def test_passes_anneal():
    model = anneal(small(), 4)
    assert get_temperature(model) == 1
    with torch.no_grad():
        model(images())  # statistics alone: no pass of training
    model.eval()(images())
    assert taus(model, 6) == [1, 0.75, 0.5, 0.25, 0, 0]
    fold_temperature(model).train()(images())


def test_passes_of_replicas_are_refused(monkeypatch):
    """nn.DataParallel's replicas end with the pass: the network itself would stay at 1."""
    monkeypatch.setattr(
        sys.modules["torch.nn.parallel.replicate"],
        "_broadcast_coalesced_reshape",  # which takes GPUs
        lambda tensors, devices, detach: [[t * 1 for t in tensors] for _ in devices],
    )
    model = anneal(small(), 4)
    first, second = torch.nn.parallel.replicate(model, [0, 1])
    with pytest.raises(ValueError, match="use DistributedDataParallel"):
        first(images())
    second.eval()(images())


def test_passes_go_on_after_a_state_is_loaded():
    model = anneal(small(), 10)
    taus(model, 3)
    other = anneal(small(), 10)
    other.load_state_dict(model.state_dict())
    assert taus(other, 3) == taus(model, 3) == pytest.approx([0.7, 0.6, 0.5])


@pytest.mark.parametrize("kind", ["ModelEmaV2", "ModelEmaV3"])
def test_an_average_of_timm_has_the_temperature_of_its_network(kind):
    """timm averages all buffers, or copies them: the temperature of a network that anneals would
    lag behind."""
    model = anneal(small(), 4)
    average = getattr(timm.utils, kind)(model, decay=0.9)
    for tau in (1, 0.75, 0.5):
        assert taus(model, 1) == [tau]
        average.update(model)
        average.module(images())
        assert get_temperature(average.module) == tau


def test_copies_that_train_count_for_themselves():
    model = anneal(small(), 4)
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    assert taus(first, 2) == taus(second, 2) == [1, 0.75]
    assert taus(model, 1) == [1]
    second.eval()(images())
    assert get_temperature(second) == 0.75
    further = [copy.deepcopy(second), pickle.loads(pickle.dumps(second)), second]
    assert [taus(each, 1) for each in further] == [[0.5]] * 3


def test_passes_of_a_compiled_network():
    model = anneal(small(), 4)
    compiled = torch.compile(model, backend="eager")
    compiled(images())
    torch._dynamo.config.error_on_recompile = True
    try:
        assert taus(compiled, 3) == [0.75, 0.5, 0.25]
    finally:
        torch._dynamo.config.error_on_recompile = False


@pytest.mark.parametrize("passes", [0, -1, 2.5])
def test_passes_are_a_number(passes):
    with pytest.raises(ValueError, match=f"passes is {passes}"):
        anneal(small(), passes)
    with pytest.raises(ValueError, match="convert it first"):
        anneal(torch.nn.Linear(2, 2), 3)


# --- compiled and without synchronisation ---------------------------------------------------------


@norms
def test_compiled_once_for_all_temperatures(norm):
    """One full graph in training, whatever the temperature, with the eager outputs."""
    torch._dynamo.reset()
    model, eager = small(norm=norm), small(norm=norm)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for tau in (1.0, 0.7, 0.25, 0.0):
        set_temperature(compiled, tau)
        set_temperature(eager, tau)
        torch.testing.assert_close(assert_trains(compiled, images()), eager(images()))
    assert counter.frame_count == 1


@torch.no_grad()
def test_compiled_by_aot_autograd():
    torch._dynamo.reset()
    model = small().eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()), model(images()))


class Recorder(TorchDispatchMode):
    """Names of all operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


SYNCHRONISING = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal"}
CONSTANTS = {"lift_fresh", "lift_fresh_copy", "scalar_tensor", "tensor", "eye", "arange", "full"}


@pytest.mark.parametrize("precision", ["float32", "autocast", "half"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_neither_synchronises_nor_makes_constants(batch, precision):
    """No value is read by the host, and no tensor is made of Python numbers to be sent over."""
    model = small(cell_num_ratio=2, nonlocal_basis_ratio=0.5)
    set_backend(model, "assembled")  # one whose calls are all operators, which the recorder sees
    x = images(batch)
    if precision == "half":
        model, x = model.bfloat16(), x.bfloat16()
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast")
    with autocast:
        model(x)  # a library is tried once in a process
    with Recorder() as recorder:
        set_temperature(model, 0.6)
        with autocast:
            y = model(x)
        y.backward(torch.ones_like(y))
    seen = set(recorder.names)
    assert {"lerp", "convolution"} <= seen  # the recorder sees the step
    assert not seen & SYNCHRONISING
    assert not seen & CONSTANTS


def test_the_recorder_would_notice():
    with Recorder() as recorder:
        torch.tensor([1.0]).sum().item()
    assert {"lift_fresh", "_local_scalar_dense"} <= set(recorder.names)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_on_the_gpu_never_synchronises():
    model, x = small().cuda(), images(device="cuda")
    model(x).square().mean().backward()  # libraries set themselves up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        set_temperature(model, 0.6)
        with torch.autocast("cuda", torch.bfloat16):
            model(x).square().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
