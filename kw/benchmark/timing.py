"""Interleaved timing: static, grouped, back end, static, ... so that drift affects all equally.

A round runs every network once, for as many iterations as fill a short time, and gives one mean
time for each part of it. Ratios are taken within rounds.
"""

from __future__ import annotations

import gc
import math
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:  # kw doctor needs no trainer
    from .steps import Step

# A CPU network takes longer for one iteration; what takes milliseconds is repeated.
ROUND_SECONDS = 0.1
MAX_ITERATIONS = 50
# A network that takes longer for an iteration is left out.
LIMIT_SECONDS = 60.0
WARM_UP = 3


class Slow(RuntimeError):
    """A network that takes longer than :data:`LIMIT_SECONDS` for an iteration."""


def now(on_gpu: bool) -> Any:
    """A moment on the host's clock, or on the GPU's, which is not waited for."""
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: Any, end: Any) -> float:
    """Seconds between two moments of :func:`now`, which a GPU must have come to."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def time_step(step: Step, iterations: int) -> list[float]:
    """Run a step several times.

    The host waits for a GPU before the first iteration and after the last one, never between.

    Returns:
        Seconds of its parts (:data:`kw.benchmark.steps.PARTS`), means over the iterations; on a GPU
        by its own clock.
    """
    on_gpu = step.inputs.is_cuda
    marks: list[list[Any]] = []
    if on_gpu:
        torch.cuda.synchronize()
    for _ in range(iterations):
        marks.append([now(on_gpu)])
        step.run(lambda: marks[-1].append(now(on_gpu)))
    if on_gpu:
        torch.cuda.synchronize()
    spans = [[between(a, b) for a, b in pairwise(own)] for own in marks]
    means = [sum(part) / iterations for part in zip(*spans, strict=True)]
    return means if len(means) == 1 else [*means, sum(means)]


def warm_up(step: Step) -> int:
    """Run a step a few times, so that allocators, caches and compilers are ready.

    Returns:
        How many iterations fill a round.

    Raises:
        Slow: an iteration takes too long.
    """
    for _ in range(WARM_UP - 1):
        time_step(step, 1)
    last = time_step(step, 1)[-1]
    if last > LIMIT_SECONDS:
        raise Slow(f"{last:.0f} s an iteration; the limit is {LIMIT_SECONDS:.0f} s")
    return iterations_for(last)


def iterations_for(seconds: float) -> int:
    """How many iterations of so many seconds fill a round."""
    return min(max(math.ceil(ROUND_SECONDS / max(seconds, 1e-9)), 1), MAX_ITERATIONS)


def interleave(steps: list[tuple[Step, int]], rounds: int) -> list[list[list[float]]]:
    """Time all steps in every round.

    Args:
        steps: with their iterations in a round, in the order in which a round runs them.
        rounds: how often.

    Returns:
        For every step and round the seconds of its parts.
    """
    found: list[list[list[float]]] = [[] for _ in steps]
    was_enabled = gc.isenabled()
    try:
        for _ in range(rounds):
            gc.collect()
            gc.disable()
            for times, (step, iterations) in zip(found, steps, strict=True):
                times.append(time_step(step, iterations))
            gc.enable()
    finally:
        (gc.enable if was_enabled else gc.disable)()
    return found
