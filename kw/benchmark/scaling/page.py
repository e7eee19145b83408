"""The tables of ``docs/scaling.md``, from the results in ``docs/scaling``.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; everything else is prose.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

from ...evaluation import render_table
from ..conditions import BenchmarkError
from .buckets import MIB, ORDERS, Gradient, reduce_in_buckets
from .files import Folder, Processes, Profile, SingleStep
from .links import CLUSTERS, Cluster
from .model import Step, memory_of, scale_ddp, scale_fsdp
from .validation import validate

__all__ = ["GPUS", "TABLES", "projection", "render_page"]

GPUS = (8, 64, 512)
_SHOWN = ("resnet18", "kw_resnet18_1x", "kw_resnet18_4x", "resnet50", "kw_resnet50_4x")
_LARGE = ("kw_resnet18_4x", "kw_resnet50_4x")
_HELD = (*_LARGE, "kw_convnext_tiny_1x")
_BUCKETS = (1, 5, 25, 100)


def render_page(text: str, folder: Folder) -> str:
    """A page with its tables made anew.

    Raises:
        BenchmarkError: a table is unknown or missing, or there is no result for it.
    """
    found = re.findall(r"<!-- table: (\S+) -->", text)
    if sorted(found) != sorted(TABLES):
        raise BenchmarkError(
            f"docs/scaling.md: has the tables {', '.join(found) or 'none'}; expected each of "
            f"{', '.join(TABLES)} once"
        )

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n\n{TABLES[match[2]](folder)}\n\n{match[3]}"

    pattern = r"(<!-- table: (\S+) -->).*?(<!-- end -->)"
    return re.sub(pattern, table, text, flags=re.DOTALL)


def projection(
    profile: Profile, step: Step, cluster: Cluster, counts: Sequence[int], bucket_mb: float = 25
) -> list[list[str]]:
    """One row for each number of GPUs: exposed ms, efficiency, images a second."""
    rows = []
    for count in counts:
        found = scale_ddp(step, profile.measured.gradients, cluster, count, limit=bucket_mb * MIB)
        exposed = f"{1e3 * found.exposed:.2f}"
        rows.append(
            [str(count), exposed, f"{found.efficiency:.1%}", f"{found.images_per_second:.0f}"]
        )
    return rows


def _processes(folder: Folder) -> str:
    header = ["network", "processes", "alone ms", "apart ms", "together ms", "images/s"]
    header += ["efficiency", "of apart", "predicted", "nothing hidden", "error"]
    rows = []
    for result in folder.processes:
        measured = result.measured
        for own in validate(result, _profile(folder, result.model)):
            row = [result.model, str(own.count), f"{1e3 * own.alone:.0f}"]
            row += [_range(measured.apart[own.count]), _range(measured.together[own.count])]
            row.append(f"{own.count * result.images / own.together:.2f}")
            row += [f"{own.alone / own.together:.0%}", f"{own.apart / own.together:.0%}"]
            if own.count > 1:
                row += [f"{own.apart / own.predicted:.0%}", f"{own.apart / own.serial:.0%}"]
                row.append(f"{own.predicted / own.together - 1:+.0%}")
            rows.append(row + ["-"] * (len(header) - len(row)))
    return render_table(header, rows)


def _range(seconds: Sequence[float]) -> str:
    low, middle, high = (1e3 * own for own in (min(seconds), median(seconds), max(seconds)))
    return f"{middle:.0f} ({low:.0f} to {high:.0f})"


def _loopback(folder: Folder) -> str:
    header = ("network", "processes", "buckets MiB", "fitted GB/s", "fitted us a step")
    rows = []
    for result in folder.processes:
        for own in validate(result, _profile(folder, result.model)):
            if own.link is not None:
                buckets = " ".join(f"{s / MIB:.1f}" for s in result.measured.buckets[own.count])
                figures = f"{own.link.bandwidth / 1e9:.2f}", f"{1e6 * own.link.latency:.0f}"
                rows.append([result.model, str(own.count), buckets, *figures])
    return render_table(header, rows)


def _cluster(name: str) -> Callable[[Folder], str]:
    def table(folder: Folder) -> str:
        header = ["network", "gradients MB", "step ms"]
        header += [f"{count}: {what}" for count in GPUS for what in ("exposed ms", "eff.", "img/s")]
        rows = []
        steps = folder.steps if "h100" in name else folder.on_cpu
        for model in (model for model in _SHOWN if model in steps):
            profile, step = _profile(folder, model), steps[model].step
            size = sum(gradient.bytes for gradient in profile.measured.gradients)
            row = [model, f"{size / 1e6:.1f}", f"{1e3 * step.seconds:.1f}"]
            for figures in projection(profile, step, CLUSTERS[name], GPUS):
                row += figures[1:]
            rows.append(row)
        return render_table(header, rows)

    return table


def _bucket_table(folder: Folder) -> str:
    header = ["network", "links", "order", *(f"{size} MiB" for size in _BUCKETS)]
    rows = []
    for model in _LARGE:
        profile, step = _profile(folder, model), _single(folder, model).step
        for name in ("h100-ndr", "h100-ethernet100"):
            for order in ORDERS:
                cells = []
                for size in _BUCKETS:
                    found = reduce_in_buckets(
                        profile.measured.gradients,
                        step.backward,
                        partial(CLUSTERS[name].all_reduce, gpus=64),
                        limit=size * MIB,
                        order=order,
                    )
                    cells.append(f"{1e3 * found.exposed:.2f} ({len(found.buckets)})")
                rows.append([model, name, order, *cells])
    return render_table(header, rows)


def _arrivals(folder: Folder) -> str:
    header = ("network", "cells", "MB", "of all gradients", "first used", "complete")
    rows = []
    for model in _LARGE:
        gradients = _profile(folder, model).measured.gradients
        whole = sum(gradient.bytes for gradient in gradients)
        for own in gradients:
            if own.used is not None:
                share = f"{own.bytes / whole:.1%}"
                when = f"{own.used:.0%} of forward", f"{own.ready:.0%} of backward"
                rows.append([model, own.name, f"{own.bytes / 1e6:.1f}", share, *when])
    return render_table(header, rows)


def _fsdp(folder: Folder) -> str:
    header = ["network", "links", "strategy"]
    header += [f"{count}: {what}" for count in GPUS for what in ("exposed ms", "eff.")]
    rows = []
    for model in _LARGE:
        gradients, step = _profile(folder, model).measured.gradients, _single(folder, model).step
        for name in ("h100-ndr", "h100-ethernet100"):
            cluster = CLUSTERS[name]
            ways = {
                "ddp": [scale_ddp(step, gradients, cluster, n) for n in GPUS],
                "fsdp": [scale_fsdp(step, gradients, cluster, n) for n in GPUS],
                "fsdp, resharded": [
                    scale_fsdp(step, gradients, cluster, n, reshard=True) for n in GPUS
                ],
            }
            for way, found in ways.items():
                cells = [(f"{1e3 * own.exposed:.2f}", f"{own.efficiency:.1%}") for own in found]
                rows.append([model, name, way, *(cell for pair in cells for cell in pair)])
    return render_table(header, rows)


def _memory(folder: Folder) -> str:
    header = ["network", "average", "ddp", *(f"fsdp, {count}" for count in GPUS)]
    header += [f"of it kept, {count}" for count in GPUS]
    rows = []
    for model in _HELD:
        gradients: Sequence[Gradient] = _profile(folder, model).measured.gradients
        for average in (False, True):
            ddp = memory_of(gradients, 8, average=average)
            sharded = [memory_of(gradients, n, average=average, sharded=True) for n in GPUS]
            figures = [ddp.total, *(own.total for own in sharded)]
            figures += [own.total - own.gathered for own in sharded]
            cells = [f"{figure / MIB:.0f}" for figure in figures]
            rows.append([model, "yes" if average else "no", *cells])
    return render_table(header, rows)


def _links(folder: Folder) -> str:
    del folder
    header = ("cluster", "link", "attained GB/s a GPU", "latency us", "sources")
    rows: list[list[str]] = []
    for name, cluster in CLUSTERS.items():
        places = {"in a node": cluster.inside, "between nodes": cluster.between}
        for place, link in places.items():
            if link.source and all(row[-1] != link.source for row in rows):
                figures = f"{link.bandwidth / 1e9:.3g}", f"{1e6 * link.latency:g}"
                rows.append([name, place, *figures, link.source])
    return render_table(header, rows)


def _steps(folder: Folder) -> str:
    header = ("network", "device", "batch", "forward ms", "backward", "optimizer", "images/s", "")
    rows = []
    for model in _SHOWN:
        found = (folder.on_cpu.get(model), _single(folder, model))
        for single in (own for own in found if own is not None):
            how = "predicted, not measured" if single.predicted else "measured"
            rows.append([model, single.device, *_parts(single.step), f"{how}, {single.dtype}"])
    return render_table(header, rows)


def _parts(step: Step) -> list[str]:
    parts = (f"{1e3 * seconds:.2f}" for seconds in (step.forward, step.backward, step.optimizer))
    return [str(step.images), *parts, f"{step.images / step.seconds:.1f}"]


def _provenance(folder: Folder) -> str:
    lines: dict[str, None] = {}
    results: list[Profile | Processes | SingleStep] = [*folder.profiles.values()]
    results += [*folder.processes, *folder.on_cpu.values()]
    for result in results:
        where = result.where
        machine, code = where["machine"], where["code"]
        changed = ", with uncommitted changes" if code["dirty"] else ""
        words = f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores; "
        words += f"torch {where['versions']['torch']}; {where['date'][:10]}; {code['commit']}"
        lines[f"{words}{changed}"] = None
    return "\n".join(f"- {line}" for line in lines)


def _profile(folder: Folder, model: str) -> Profile:
    if model not in folder.profiles:
        raise BenchmarkError(f"no profile of {model}: run tools/scaling.py profile first")
    return folder.profiles[model]


def _single(folder: Folder, model: str) -> SingleStep:
    if model not in folder.steps:
        raise BenchmarkError(f"no step of {model}: run tools/scaling.py predict first")
    return folder.steps[model]


TABLES: dict[str, Callable[[Folder], str]] = {
    "processes": _processes,
    "loopback": _loopback,
    "steps": _steps,
    **{name: _cluster(name) for name in CLUSTERS},
    "arrivals": _arrivals,
    "buckets": _bucket_table,
    "fsdp": _fsdp,
    "memory": _memory,
    "links": _links,
    "provenance": _provenance,
}
"""What makes each table."""
