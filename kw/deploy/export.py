"""Write a trained classifier in a format of :data:`kw.registry.EXPORTERS`, with a model card.

A file is written under a temporary name, compared with PyTorch, and renamed if it agrees. So a file
with the name that was asked for has always been verified.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..registry import EXPORTERS
from .card import write_card
from .classifier import FORMATS, Classifier, load
from .description import Description, ExportError, InputRange
from .graph import DTYPES, Graph, input_range, save_graph, trace
from .onnx_file import needs, write_onnx
from .quantize import quantize
from .runtimes import write_executorch, write_openvino
from .source import Source, without_places
from .verify import (
    RUINED,
    TOLERANCE,
    Difference,
    compare,
    judge_by_float64,
    random_images,
    real_batches,
)
from .weights import cast, write_weights


class Different(ExportError):
    """A written file computes something else than the network, or finds something else."""


@dataclass(frozen=True)
class Options:
    """How to export.

    Attributes:
        precision: of weights and arithmetic: ``"fp32"``, ``"fp16"``, ``"bf16"`` or ``"int8"``.
        batch: the number of images to fix; ``None`` leaves it open.
        fixed_size: take images of ``data.input_size`` only.
    """

    precision: str = "fp32"
    batch: int | None = None
    fixed_size: bool = False


@dataclass(frozen=True)
class Job:
    """What an exporter writes.

    Attributes:
        source: the network.
        inputs: the images that the file takes.
        description: stored in the file.
        path: the file.
        images: real ones, as :meth:`Classifier.read` gives them; may be empty.
        optimize: whether the format's own optimizer may change the graph.
    """

    source: Source
    inputs: InputRange
    description: Description
    path: Path
    images: Sequence[Tensor]
    optimize: bool = True


@dataclass(frozen=True)
class Exporter:
    """A format of exported files; an entry of :data:`kw.registry.EXPORTERS` by its suffix.

    Attributes:
        write: writes a file and returns its path; it may add to the end of the given name.
        precisions: which of ``"fp32"``, ``"fp16"``, ``"bf16"``, ``"int8"`` it can write.
        load: reads a file for its verification: a module in evaluation mode, from normalised images
            to logits. It may be left out for the formats that :func:`kw.load` reads.
        packages: that it needs.
        optimizes: whether the format has an optimizer of its own. A file that differs from the
            network is then written again without it (:attr:`Job.optimize`).
        fixed: whether files have one batch (1 unless :attr:`Options.batch` says more) and one size.
    """

    write: Callable[[Job], Path]
    precisions: tuple[str, ...] = ("fp32",)
    load: Callable[[Path], nn.Module] | None = None
    packages: tuple[str, ...] = ()
    optimizes: bool = False
    fixed: bool = False


@dataclass(frozen=True)
class Written:
    """A file that was written and verified.

    Attributes:
        path: the file; safetensors have a hash in their name.
        card: its model card, if it was wanted.
        random: its difference from PyTorch in float32, on noise.
        real: the same on real images, where there were any.
        input: what images it takes.
        seconds: that writing and verifying took.
        notes: what a user should know, a sentence each.
    """

    path: Path
    card: Path | None
    random: Difference
    real: Difference | None
    input: InputRange
    seconds: float
    notes: tuple[str, ...] = ()


def check_target(path: Path, options: Options) -> None:
    """Refuse what cannot be written, before anything is done.

    Raises:
        ExportError: an unknown format, or one that cannot be read back; a precision that the format
            does not have; a missing package.
    """
    exporter = EXPORTERS.get(path.suffix)
    if exporter is None:
        raise ExportError(
            f"{path}: expected a name that ends with {', '.join(EXPORTERS)}; found "
            f"{path.suffix or 'none of them'!r}"
        )
    if options.precision not in exporter.precisions:
        raise ExportError(
            f"{path}: {path.suffix} files are written in {', '.join(exporter.precisions)}, not in "
            f"{options.precision}"
        )
    if exporter.load is None and path.suffix not in FORMATS:
        raise ExportError(
            f"{path}: the exporter of {path.suffix} files has no load, and kw.load does not read "
            "them, so that they could not be verified; register Exporter(write, load=...)"
        )
    for package in exporter.packages:
        needs(package)


def export(
    source: Source,
    target: Path,
    options: Options,
    images: Sequence[Tensor] = (),
    *,
    with_card: bool = True,
) -> Written:
    """Write a network in the format of :data:`kw.registry.EXPORTERS` that the target's name ends
    with, and its model card beside it.

    Args:
        source: the network.
        target: the file.
        options: how.
        images: real ones, as :meth:`Classifier.read` gives them, to verify with; int8 is
            calibrated on them.
        with_card: False leaves the card out.

    Raises:
        ExportError: it cannot be written, or the file differs from the network.
    """
    check_target(target, options)
    if options.precision == "int8" and not images:
        raise ExportError(
            f"{target}: int8 is calibrated on real images; name a folder of some with --images"
        )
    if options.batch is not None and 0 < len(images) < options.batch:
        raise ExportError(
            f"{target}: {len(images)} real images do not fill a batch of {options.batch}: give "
            "more, or a smaller --batch"
        )
    begin = time.perf_counter()
    config = source.description.config
    inputs, reason = input_range(source.network, config.model, config.data.shape)
    notes: tuple[str, ...] = ()
    if reason and not options.fixed_size:
        notes = (f"the file takes images of {inputs.words} only: {reason}",)
    exporter, batch = EXPORTERS[target.suffix], options.batch
    if exporter.fixed:
        batch = batch or 1
        notes = (f"{target.suffix} files have one shape: {batch} images of {inputs.words}",)
    least = None if options.fixed_size or exporter.fixed else inputs.least
    inputs = replace(inputs, least=least, batch=batch, precision=options.precision)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial{target.suffix}")
    description = replace(source.description, input=inputs, config=without_places(config))
    job = Job(source, inputs, description, partial, images)
    try:
        try:
            written = exporter.write(job)
            random, real = _verify(source, _read(job, written), inputs, images, target)
        except Different:
            if not exporter.optimizes:
                raise
            # onnxscript 0.7.2 has rules that change results, at a fixed batch of two for one.
            written = exporter.write(replace(job, optimize=False))
            random, real = _verify(source, _read(job, written), inputs, images, target)
            notes += ("onnxscript's optimizer changes the result: written without it",)
        # A hash may follow the stem.
        final = target.with_name(target.stem + written.name.removeprefix(partial.stem))
        if (beside := partial.with_suffix(".bin")).exists():  # OpenVINO's weights
            os.replace(beside, target.with_suffix(".bin"))
        os.replace(written, final)
    finally:
        for left in target.parent.glob(f"{escape(partial.stem)}*"):
            left.unlink()
    seconds = time.perf_counter() - begin
    notes += tuple(
        f"PyTorch's own float32 is {found.rounding:.1e} from float64 on {kind} images, the file "
        f"{found.exact:.1e}: this network magnifies rounding"
        for kind, found in (("random", random), ("real", real))
        if found is not None and found.rounding is not None
    )
    card = write_card(final, source, inputs, random, real) if with_card else None
    return Written(final, card, random, real, inputs, seconds, notes)


def _write_weights(job: Job) -> Path:
    state = cast(job.source.network.state_dict(), DTYPES[job.inputs.precision])
    return write_weights(state, job.description, job.path)


def _write_graph(job: Job) -> Path:
    graph = Graph(job.source.network, DTYPES[job.inputs.precision])
    save_graph(trace(graph, job.inputs), job.description, job.path)
    return job.path


def _write_onnx(job: Job) -> Path:
    return _write_onnx_for("onnx", job, DTYPES.get(job.inputs.precision, torch.float32))


def _write_onnx_for(runtime: str, job: Job, dtype: torch.dtype = torch.float32) -> Path:
    graph, is_int8 = Graph(job.source.network, dtype), job.inputs.precision == "int8"
    # OpenVINO 2026.4.1 computes dynamic layers in float32 wrongly beside quantized ones.
    quantizes_cells = is_int8 and runtime == "openvino"
    program = trace(graph, job.inputs, "int8" if quantizes_cells else runtime)
    write_onnx(program, job.description, job.path, job.optimize)
    if is_int8:
        images = _normalised(job.source, job.images)
        quantize(job.path, job.description, images, None if quantizes_cells else graph)
    return job.path


def _write_openvino(job: Job) -> Path:
    # Its PyTorch front end has no operator for the loops of an open batch; its ONNX one has.
    graph = _write_onnx_for("openvino", replace(job, path=job.path.with_suffix(".onnx")))
    try:
        return write_openvino(graph, job.description, job.path)
    finally:
        graph.unlink()


def _write_executorch(job: Job) -> Path:
    program = trace(Graph(job.source.network), job.inputs, "executorch")
    return write_executorch(program, job.description, job.path)


EXPORTERS[".onnx"] = Exporter(
    _write_onnx,
    ("fp32", "fp16", "int8"),  # onnxruntime computes no bfloat16 on CPUs
    packages=("onnx", "onnxscript", "onnxruntime"),
    optimizes=True,
)
EXPORTERS[".xml"] = Exporter(
    _write_openvino,
    ("fp32", "fp16", "int8"),
    packages=("openvino", "onnx", "onnxscript", "onnxruntime"),
    optimizes=True,
)
EXPORTERS[".pte"] = Exporter(_write_executorch, packages=("executorch",), fixed=True)
EXPORTERS[".pt2"] = Exporter(_write_graph, ("fp32", "fp16", "bf16"))
EXPORTERS[".safetensors"] = Exporter(_write_weights, ("fp32", "fp16", "bf16"))


def _read(job: Job, path: Path) -> Classifier:
    exporter = EXPORTERS[job.path.suffix]
    if exporter.load is None:
        written = load(path)
        assert isinstance(written, Classifier)
        return written
    return Classifier(exporter.load(path), job.description, exported=True)


def _verify(
    source: Source,
    classifier: Classifier,
    inputs: InputRange,
    images: Sequence[Tensor],
    target: Path,
) -> tuple[Difference, Difference | None]:
    """The written file against the network.

    Raises:
        Different: they differ by more than :data:`TOLERANCE`, where both compute in float32,
            and by more than float32's rounding explains; or, in less precision, by more than
            :data:`RUINED`.
    """
    kinds = {"random": list(random_images(inputs))}
    if images:
        kinds["real"] = list(real_batches(_normalised(source, images), inputs))
    found: dict[str, Difference] = {}
    for kind, batches in kinds.items():
        difference = compare(source.network, classifier, batches)
        if inputs.precision == "fp32" and difference.largest > TOLERANCE:
            difference = judge_by_float64(source.network, classifier, batches, difference)
            if not difference.is_rounding:
                raise Different(
                    f"{target}: logits differ from PyTorch's by {difference.largest:.2g} of the "
                    f"largest on {kind} images; expected at most {TOLERANCE:g}. Nothing was written"
                )
        if inputs.precision != "fp32" and difference.largest > RUINED:
            raise Different(
                f"{target}: in {inputs.precision} logits differ from PyTorch's by "
                f"{difference.largest:.2g} of the largest on {kind} images, and "
                f"{difference.same} of {difference.images} images get its class: the file is "
                "wrong. Nothing was written; take another precision or format, or one shape "
                "(--batch 1 --fixed-size)"
            )
        found[kind] = difference
    return found["random"], found.get("real")


def _normalised(source: Source, images: Sequence[Tensor]) -> list[Tensor]:
    classifier = Classifier(nn.Identity(), source.description)
    return list(classifier.normalise(torch.stack(list(images))))


def read_some(source: Source, files: Iterator[Path], count: int) -> list[Tensor]:
    """The first images that can be read, ``[C, H, W]``, preprocessed as in evaluation."""
    classifier = Classifier(nn.Identity(), source.description)
    found: list[Tensor] = []
    for file in files:
        if len(found) == count:
            break
        try:
            found.append(classifier.read(file))
        except UserError:
            continue
    return found
