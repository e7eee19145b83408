"""Back ends that compile kernels are tried before their first use; every fault is injected here."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace

import pytest
import torch
from convolutions import problem
from torch import nn

from kw.warehouse import KWConv2d
from kw.warehouse.ops import CONTRACTIONS, Cost, selector
from kw.warehouse.ops import trials as room
from kw.warehouse.ops.admission import Admission
from kw.warehouse.ops.contraction import Contraction
from kw.warehouse.ops.selection import Selector
from kw.warehouse.ops.trials import DeviceLostError
from kw.warehouse.ops.triton_conv import TritonConv
from kw.warehouse.ops.triton_on_chip import TritonOnChip

LIBRARY = CONTRACTIONS["assembled"]


class Compiled(Contraction):
    """As a back end with kernels of its own: the library's results with a fault."""

    name = "compiled"

    def __init__(self, fault=lambda results: results):
        self.fault, self.calls = fault, 0

    def refusal(self, problem):
        return None

    def needs_trial(self, problem):
        return True

    def cost(self, problem):
        return Cost()  # predicted to be the fastest

    def _forward(self, *operands):
        self.calls += 1
        return self.fault((LIBRARY.forward(*operands),))[0]

    def _backward(self, *operands):
        self.calls += 1
        return self.fault(LIBRARY.backward(*operands))


def selector_of(compiled):
    return Selector({"compiled": compiled, "assembled": LIBRARY}, fallback="assembled")


def raising(error):
    def fault(results):
        raise error

    return fault


def corner(results):
    """One wrong value, of the last sample."""
    results[0].flatten()[-1] += 1
    return results


def unwritten(results):
    """The last row keeps what was in memory."""
    y = torch.empty_like(results[0])
    y[..., :-1] = results[0][..., :-1]
    return (y, *results[1:])


def wrong_cells(results):
    return (*results[:-1], results[-1] * 1.01) if len(results) == 3 else results


class OutOfResources(Exception):
    """As Triton's."""


FAULTS = {
    "compile error": (raising(SyntaxError("at 12:3: unexpected token")), "unexpected token"),
    "no C compiler": (raising(RuntimeError("Failed to find C compiler.")), "C compiler"),
    "resources": (raising(OutOfResources("out of resource: shared memory")), "shared memory"),
    "corner": (corner, "off by"),
    "unwritten": (unwritten, "off by inf"),
}


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    selector.admission = Admission(CONTRACTIONS["assembled"])


@pytest.mark.parametrize("training", [False, True], ids=["forward", "backward"])
def test_one_that_is_right_is_admitted_once(training):
    compiled = Compiled()
    chooser = selector_of(compiled)
    for size in (13, 14, 16):  # of one kind
        for batch in (7, 8):
            assert chooser.choose(problem(8, size, batch=batch, training=training)) is compiled
    assert compiled.calls == 1
    assert chooser.choose(problem(8, 17, training=training)) is compiled
    assert compiled.calls == 2


@pytest.mark.parametrize(("fault", "reason"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("training", [False, True], ids=["forward", "backward"])
def test_a_fault_bans_it_and_the_library_takes_over(fault, reason, training, caplog):
    compiled = Compiled(fault)
    chooser = selector_of(compiled)
    case = problem(8, 14, training=training)
    with caplog.at_level(logging.WARNING):
        for batch in (5, 6, 8):
            assert chooser.choose(replace(case, batch=batch)) is LIBRARY
    assert compiled.calls == 1
    (record,) = caplog.records
    assert reason in record.getMessage()
    assert "back end 'compiled' is not used for 8->8 channels" in record.getMessage()
    refusal = next(p.refusal for p in chooser.predict(case) if p.name == "compiled")
    assert reason in refusal
    with pytest.raises(ValueError, match="back end 'compiled' cannot do this: .*" + reason):
        chooser.choose(case, "compiled")


def test_a_wrong_gradient_of_the_cells_bans_the_backward_pass_alone():
    compiled = Compiled(wrong_cells)
    chooser = selector_of(compiled)
    assert chooser.choose(problem(8)) is compiled
    assert chooser.choose(problem(8, training=True)) is LIBRARY
    assert "gradient of the cells" in chooser.admission.ban(compiled, problem(8, training=True))


class InRows(Compiled):
    """Reads coefficients as if they lay as they are written."""

    def _forward(self, x, alpha, cells, spec):
        in_rows = alpha.as_strided(alpha.shape, torch.empty(alpha.shape).stride())
        return super()._forward(x, in_rows, cells, spec)


def test_coefficients_lie_in_a_trial_as_the_attention_leaves_them():
    assert selector_of(InRows()).choose(problem(8)) is LIBRARY


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_no_fault(dtype):
    compiled = Compiled()
    for training in (False, True):
        case = problem(64, 14, dtype=dtype, cells_dtype=torch.float32, training=training)
        assert selector_of(compiled).choose(case) is compiled
        case = replace(case, cells_dtype=None)
        assert selector_of(compiled).choose(case) is compiled


def test_without_memory_the_trial_comes_later(caplog):
    error = torch.OutOfMemoryError("CUDA out of memory")
    faults = [error, error, None]

    def fault(results):
        if error := faults.pop(0):
            raise error
        return results

    compiled = Compiled(fault)
    chooser = selector_of(compiled)
    for expected in (LIBRARY, LIBRARY, compiled):
        assert chooser.choose(problem(8)) is expected
    assert not caplog.records
    faults += [error] * 3
    for _ in range(5):
        assert chooser.choose(problem(16)) is LIBRARY
    assert compiled.calls == 6
    assert "no memory for its trial" in caplog.text


@pytest.mark.parametrize("times", [2, 3])
def test_a_missing_file_of_a_shared_cache_bans_nothing(times, caplog):
    """Unless it is missing again and again."""
    errors = [FileNotFoundError(2, "No such file or directory", "convolve.cubin")] * times

    def fault(results):
        if errors:
            raise errors.pop()
        return results

    compiled = Compiled(fault)
    assert selector_of(compiled).choose(problem(8)) is (compiled if times < 3 else LIBRARY)
    assert compiled.calls == 3
    assert ("convolve.cubin" in caplog.text) == (times == 3)


def test_during_the_capture_of_a_graph_nothing_is_tried(monkeypatch):
    compiled = Compiled()
    chooser = selector_of(compiled)
    chooser.choose(problem(8))
    monkeypatch.setattr(room, "is_capturing", lambda device: True)
    assert chooser.choose(problem(8)) is compiled  # admitted before
    assert chooser.choose(problem(16)) is LIBRARY
    with pytest.raises(ValueError, match="run the network once before"):
        chooser.choose(problem(16), "compiled")
    assert compiled.calls == 1
    monkeypatch.undo()
    assert chooser.choose(problem(16)) is compiled


def test_a_lost_device_is_said_with_advice(monkeypatch):
    def synchronise(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(room, "_synchronise", synchronise)
    with pytest.raises(DeviceLostError, match=r"illegal memory access.*planner=off") as raised:
        selector_of(Compiled(raising(ValueError("what came first")))).choose(problem(8))
    assert str(raised.value.__cause__) == "what came first"


def test_one_that_fails_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setenv("KW_CACHE_DIR", str(tmp_path))
    compiled = Compiled(corner)
    chooser = selector_of(compiled)
    chooser.mode = "measure"
    assert chooser.choose(problem(8, 4)) is LIBRARY
    assert compiled.calls == 1


def test_a_trial_leaves_no_trace():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert selector_of(Compiled()).choose(problem(8)).name == "compiled"
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()


def test_trials_in_threads_leave_no_trace():
    """As those of several GPUs: each restores what the process had before any of them."""
    entered = threading.Event()

    def second():
        with room._poisoned_memory():
            entered.set()
            time.sleep(0.1)  # beyond the first one's end, if nobody waits

    thread = threading.Thread(target=second)
    with room._poisoned_memory():
        thread.start()
        entered.wait(0.05)
    thread.join()
    assert entered.is_set()
    assert not torch.are_deterministic_algorithms_enabled()


def test_training_goes_on_with_the_library(monkeypatch):
    broken = Compiled(raising(RuntimeError("no kernel image is available")))
    monkeypatch.setitem(CONTRACTIONS, "compiled", broken)
    torch.manual_seed(0)
    layer = nn.Sequential(KWConv2d(6, 8, 3, padding=1, cell_num_ratio=2))
    x = torch.randn(3, 6, 9, 9)

    def step():
        layer.zero_grad()
        y = layer(x)
        y.square().mean().backward()
        return [y.detach(), *(p.grad.clone() for p in layer.parameters())]

    found = step()
    assert broken.calls == 2  # one trial for each pass
    layer[0].set_backend("assembled")
    for ours, theirs in zip(found, step(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", [TritonConv(), TritonOnChip()], ids=lambda b: b.name)
def test_triton_is_tried_on_gpus(backend):
    assert backend.needs_trial(problem(8, device="cuda"))
    assert not backend.needs_trial(problem(8))
