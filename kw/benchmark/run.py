"""One run: build the networks of a case, measure them under the same conditions."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone

import torch

from ..torch_private import clear_compiled
from . import memory as memory_of
from .cases import STATIC, Case, Variant, check_backends
from .conditions import BenchmarkError, Conditions, device_slug
from .machine import describe_code, describe_machine, describe_versions
from .results import Measured, Result
from .steps import PARTS, Step, build_step
from .timing import Slow, interleave, warm_up


def run_case(
    case: Case,
    conditions: Conditions,
    backends: Sequence[str] = ("auto",),
    *,
    subject: str | None = None,
) -> Result:
    """Measure a case's static network, its grouped form and other back ends, interleaved; prints a
    line for every network.

    Args:
        case: what is measured.
        conditions: the same for all.
        backends: besides ``"grouped"``, which is always measured.
        subject: in the result's name instead of the case's own.

    Returns:
        The result. A network that runs out of memory or is too slow, and a back end that cannot do
        a layer, stand in it without figures.

    Raises:
        BenchmarkError: an unknown back end; no GPU; the only back end asked for cannot do a layer;
            the static network cannot be measured.
    """
    check_backends(backends)
    if conditions.device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("device is 'cuda', but PyTorch sees no GPU here; use 'cpu'")
    threads = torch.get_num_threads()
    torch.set_num_threads(conditions.threads)
    result = Result(
        name=conditions.file_name(subject or case.subject, device_slug(conditions.device)),
        family=case.family,
        conditions=conditions,
        networks=[],
        machine=describe_machine(conditions.device),
        versions=describe_versions(conditions.device),
        code=describe_code(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    variants = case.variants(backends)
    try:
        if conditions.mode == "memory":
            _measure_memory(variants, result)
        else:
            _measure_time(variants, result)
    finally:
        torch.set_num_threads(threads)
        if conditions.compile:
            clear_compiled()
        _release(conditions)
    if result.static.problem is not None:
        raise BenchmarkError(
            f"{result.static.model}, the static network: {result.static.problem}; there is nothing "
            "to compare with"
        )
    if len(backends) == 1:
        for network in result.networks:
            if network.backend == backends[0] and (network.problem or "").startswith("unavailable"):
                raise BenchmarkError(f"{network.label}: {network.problem}")
    return result


def _begin(variant: Variant, result: Result) -> Measured:
    measured = Measured(variant.model, variant.backend)
    print(f"{result.name}: {measured.label}", flush=True)
    result.networks.append(measured)
    return measured


def _measure_memory(variants: Sequence[Variant], result: Result) -> None:
    for variant in variants:
        measured = _begin(variant, result)
        try:
            found = memory_of.measure_apart(variant.source, variant.backend, result.conditions)
        except (ValueError, AssertionError, RuntimeError) as error:
            found = _refusal(variant, error)
        if isinstance(found, str):
            measured.problem = found
            if variant.backend == STATIC:
                return
        else:
            measured.memory = asdict(found)


def _measure_time(variants: Sequence[Variant], result: Result) -> None:
    conditions = result.conditions
    ready: list[tuple[Step, Measured]] = []
    for variant in variants:
        measured = _begin(variant, result)
        try:
            step = build_step(variant.source, variant.backend, conditions)
            measured.iterations = warm_up(step)
            ready.append((step, measured))
        except torch.OutOfMemoryError:
            measured.problem = "out of memory"
        except Slow as error:
            measured.problem = f"too slow: {error}"
        except (ValueError, AssertionError, RuntimeError) as error:
            measured.problem = _refusal(variant, error)
        if measured.problem is not None:
            print(f"  {measured.problem}", flush=True)
            if variant.backend == STATIC:
                return
            step = None  # type: ignore[assignment]  # its memory, before the next is built
            _release(conditions)
    print(f"{result.name}: {conditions.rounds} rounds", flush=True)
    steps = [(step, measured.iterations) for step, measured in ready]
    found = interleave(steps, conditions.rounds)
    for (_, measured), rounds in zip(ready, found, strict=True):
        parts = PARTS[conditions.mode]
        measured.seconds = {
            part: [round(times[i], 9) for times in rounds] for i, part in enumerate(parts)
        }


def _refusal(variant: Variant, error: Exception) -> str:
    """In words, that a network is not measured; or the error again, if it is a bug."""
    # A back end that refuses raises ValueError; other errors of dynamic networks are bugs.
    # An input that the static network refuses, with any error, is the user's mistake.
    if variant.backend != STATIC and not isinstance(error, ValueError):
        raise error
    return f"unavailable: {error}"


def _release(conditions: Conditions) -> None:
    gc.collect()
    if conditions.device == "cuda":
        torch.cuda.empty_cache()
