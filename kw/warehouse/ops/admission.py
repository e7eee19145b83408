"""Back ends that compile kernels are tried before their first use (:mod:`.trials`)."""

from __future__ import annotations

from dataclasses import replace

import torch

from .contraction import Contraction, Problem
from .device import current_gpu
from .timing import draw_operands
from .trials import Trials, attempt, difference, fault, tolerance

OUTPUT = "output"
GRADIENTS = ("gradient of the input", "gradient of the coefficients", "gradient of the cells")


class Admission:
    """Outcomes of trials, by back end, kind of problem and device.

    Problems of one kind differ in the number of samples and the size of the input by less than a
    factor of two; kernels and their tiles hardly depend on more.
    """

    def __init__(self, library: Contraction) -> None:
        self._library = library
        self._trials = Trials()

    def ban(self, contraction: Contraction, problem: Problem) -> str | None:
        """Why a trial has banned the back end for such problems; ``None`` if none has."""
        return self._trials.ban(_kind(contraction, problem))

    def admits(self, contraction: Contraction, problem: Problem) -> bool | None:
        """Whether the back end may be used, tried now if it has to be; as :meth:`Trials.admits`.

        Raises:
            DeviceLostError: the trial left the device unusable.
        """
        if not contraction.needs_trial(problem):
            return True
        return self._trials.admits(
            _kind(contraction, problem),
            problem.device,
            lambda: _try(contraction, self._library, problem),
            f"back end {contraction.name!r}",
            lambda: _describe(problem),
        )


def bucket(count: int) -> int:
    """The next power of two."""
    return 1 << max(count - 1, 0).bit_length()


def deviations(
    contraction: Contraction, library: Contraction, problem: Problem, exact: torch.dtype
) -> dict[str, float]:
    """Run a back end on random operands and compare a few samples with the results of a library,
    which computes in the type ``exact``.

    Returns:
        For the output, or for every gradient, the largest difference relative to the largest value;
        infinite for what was not written.

    Raises:
        DeviceLostError: the device cannot be used any more.
        Exception: what a compiler, a driver or a library raises.
    """
    operands = draw_operands(problem)
    samples = sorted({0, problem.batch // 2, problem.batch - 1})
    others = [i for i in range(problem.batch) if i not in samples]
    operands.grad[others] = 0  # the compared samples alone make the cells' gradient
    found = attempt(
        lambda: operands.run(contraction),
        problem.device,
        f"back end {contraction.name!r}, for {_describe(problem)},",
        f"--cfg-options contraction.planner=off, or kw.set_backend(model, {library.name!r})",
    )
    few = operands.of_samples(samples).to(exact)
    names = GRADIENTS if problem.training else (OUTPUT,)
    return {
        name: difference(ours if name == GRADIENTS[-1] else ours[samples], theirs)
        for name, ours, theirs in zip(names, found, few.run(library), strict=True)
    }


def _try(contraction: Contraction, library: Contraction, problem: Problem) -> str | None:
    """Reason not to use the back end; ``None`` if it computes what the library computes."""
    exact = torch.promote_types(problem.dtype, torch.float32)
    found = deviations(contraction, library, problem, exact)
    return fault(found, tolerance(problem.dtype, problem.device))


def _kind(contraction: Contraction, problem: Problem) -> tuple[str, Problem, int]:
    size = tuple(map(bucket, problem.size))
    like = replace(problem, batch=bucket(problem.batch), size=size)
    return contraction.name, like, current_gpu(problem.device)


def _describe(problem: Problem) -> str:
    spec = problem.spec
    kernel = "x".join(map(str, spec.partition.kernel))
    size = "x".join(map(str, problem.size))
    phase = "backward" if problem.training else "forward"
    dtype = str(problem.dtype).removeprefix("torch.")
    return (
        f"{spec.in_channels}->{spec.out_channels} channels, kernel {kernel}, {size} positions, "
        f"{problem.cells} cells, batch {problem.batch}, {dtype}, {phase}"
    )
