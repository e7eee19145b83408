"""The memory of a training step beyond parameters, gradients and optimizer state, in exact bytes.

PyTorch's profiler records every block that PyTorch's allocators give and take back, on CPU and
CUDA; the sum of the blocks that are alive follows. The peak of the third recorded step counts, so
that buffers which earlier steps keep count too. Parameters, buffers and the batch exist before the
first event; gradients and the optimizer's state are left out by their addresses, known at the end.

Each network is measured in its own process, so that caches of other networks have no effect.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from .cases import Source
from .conditions import Conditions
from .steps import TrainingStep, build_step

STEPS = 3
# glibc then gives freed tensors back to the system at once, so that the size of the process, which
# checks the profiler's figure, follows what is alive. It is slower, which does not matter here.
_RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
_WINDOW = "kw.benchmark: the step that counts"


class Event(NamedTuple):
    """A block that is given (``bytes`` above 0) or taken back."""

    time: float
    address: int
    bytes: int


@dataclass(frozen=True)
class Memory:
    """What a training step holds, in bytes."""

    parameters: int
    gradients: int  # their gradients
    optimizer: int
    beyond: int  # the largest sum of everything else that a step allocates
    # the same peak by another measure, gradients and state included: on CUDA the allocator's own
    # peak, elsewhere the growth of the process on Linux, else 0. Nothing is computed from it
    check: int


def measure_apart(source: Source, backend: str, conditions: Conditions) -> Memory | str:
    """:func:`measure_here` in a new process."""
    with (
        _environment(_RETURN_FREED),
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
    ):
        try:
            return pool.submit(measure_here, source, backend, conditions).result()
        except BrokenProcessPool:
            return "its process was ended by the system, which does so when memory runs out"


def measure_step(step: TrainingStep) -> Memory:
    """Follow the first steps of a network's training."""
    device = step.inputs.device
    before = _process_bytes("VmRSS")
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(STEPS - 1):
            step.run()
        with record_function(_WINDOW):
            step.run(clear=False)
        if device.type == "cuda":
            torch.cuda.synchronize()
    if device.type == "cuda":
        check = torch.cuda.max_memory_allocated() - before
    else:
        check = _process_bytes("VmHWM") - before
    parameters = [p for p in step.network.parameters() if p.requires_grad]
    gradients = [p.grad for p in parameters if p.grad is not None]
    states = [
        value
        for state in step.optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.device == device
    ]
    start, events = _read_trace(profiler, device)
    return Memory(
        parameters=sum(p.nbytes for p in step.network.parameters()),
        gradients=sum(g.nbytes for g in gradients),
        optimizer=sum(s.nbytes for s in states),
        beyond=peak_beyond(events, start, _kept(gradients + states)),
        check=check,
    )


def peak_beyond(events: Iterable[Event], start: float, kept: Mapping[int, int]) -> int:
    """The largest sum of blocks alive at once.

    Args:
        events: all since nothing was alive, in order of time.
        start: only moments from then on count.
        kept: blocks that are alive after the last event and hold what does not count: by address,
            how many bytes of the last block there count all the same.

    Returns:
        Bytes.
    """
    events = list(events)
    last = {event.address: i for i, event in enumerate(events) if event.bytes > 0}
    alive: dict[int, int] = {}
    total = peak = 0
    for i, event in enumerate(events):
        if event.time >= start:
            peak = max(peak, total)  # what earlier steps left, before this event
        if event.bytes > 0:
            counted = event.bytes
            if event.address in kept and last[event.address] == i:
                counted = kept[event.address]
            alive[event.address] = counted
            total += counted
        else:
            total -= alive.pop(event.address, 0)  # 0: it was there before the first event
    return max(peak, total)


def measure_here(source: Source, backend: str, conditions: Conditions) -> Memory | str:
    """Follow the first training steps of a network; or in words, that there is too little memory.

    Raises:
        ValueError: the back end cannot do one of the layers.
    """
    torch.set_num_threads(conditions.threads)
    try:
        step = build_step(source, backend, conditions)
        assert isinstance(step, TrainingStep)
        return measure_step(step)
    except torch.OutOfMemoryError:
        return "out of memory"


def _kept(tensors: Iterable[Tensor]) -> dict[int, int]:
    """For every block that holds some of the tensors, the bytes that hold none."""
    left: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        left[address] = left.get(address, storage.nbytes()) - tensor.nbytes
    return left


def _read_trace(profiler: profile, device: torch.device) -> tuple[float, list[Event]]:
    """When the step that counts begins, and the allocations on a device."""
    kind = {"cpu": 0, "cuda": 1}[device.type]  # c10::DeviceType, as the trace has it
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        trace: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    # On CUDA the device's own record of the annotation would come later; the host allocates.
    start = min(float(entry["ts"]) for entry in trace if entry["name"] == _WINDOW)
    events = [
        Event(float(entry["ts"]), int(entry["args"]["Addr"]), int(entry["args"]["Bytes"]))
        for entry in trace
        if entry["name"] == "[memory]" and int(entry["args"]["Device Type"]) == kind
    ]
    if not events:
        raise RuntimeError(f"PyTorch's profiler recorded no allocations on {device}")
    return start, sorted(events, key=lambda event: event.time)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment variables of processes started meanwhile."""
    before = {key: os.environ.get(key) for key in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def _process_bytes(key: str) -> int:
    """Resident memory of this process, now or at most."""
    status = Path("/proc/self/status")
    found = re.search(rf"{key}:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return 1024 * int(found[1]) if found else 0
