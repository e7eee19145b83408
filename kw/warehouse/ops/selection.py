"""The selector: chooses the back end of a layer from its shapes, types and device.

A cost model predicts each back end's time from its multiply-adds, the bytes it moves and the calls
it makes, and the fastest is used. The model is arithmetic on shapes: no synchronisation with the
device, and equal machines make equal choices. Where prediction is not enough, ``measure`` times
the likely ones once per shape and keeps the result in a file that all processes of the machine
read.

Forward and backward pass are chosen separately, since they share only the layer's inputs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ...errors import valid_names
from .admission import Admission, bucket
from .calibration import device_profile
from .contraction import Contraction, Problem
from .device import DeviceProfile, current_gpu, is_capturing
from .precision import allows_tf32
from .timing import TimingCache, time_contraction

MODES = ("model", "measure", "off")
_MOST_CHOICES = 1 << 16
"""Choices that are remembered: of a network of 50 layers, for hundreds of sizes of images."""
_CANDIDATES = 3.0
"""Back ends predicted within this factor of the fastest are timed."""


@dataclass(frozen=True)
class Prediction:
    """The selector's prediction for one back end and one problem.

    Attributes:
        name: the back end.
        seconds: predicted time; ``None`` where the problem is unsupported.
        refusal: reason it is unsupported, or an empty string.
    """

    name: str
    seconds: float | None
    refusal: str = ""


class Selector:
    """Chooses among back ends; one instance per process.

    Args:
        contractions: back ends by name, the preferred first where predictions are equal.
        fallback: the back end of mode ``"off"``; it must support every problem.

    Attributes:
        mode: ``"model"`` predicts; ``"measure"`` times the likely ones at a shape's first use;
            ``"off"`` always takes ``fallback``.
    """

    def __init__(self, contractions: Mapping[str, Contraction], fallback: str) -> None:
        self.contractions = contractions
        self.fallback = fallback
        self.timings = TimingCache()
        self.admission = Admission(contractions[fallback])
        self._mode = "model"
        self._recorders: list[list[tuple[Problem, str]]] = []
        self._profiles: dict[str, DeviceProfile] = {}
        self._chosen: dict[tuple[Problem, int, bool], Contraction] = {}

    @property
    def mode(self) -> str:
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        if mode not in MODES:
            raise ValueError(f"planner mode {mode!r} is unknown{valid_names(mode, MODES)}")
        self._mode = mode
        self._chosen.clear()

    def profile(self, device: str) -> DeviceProfile:
        """The rates that choices for a type of device are computed from."""
        return self._profiles.get(device) or device_profile(device)

    def use_profile(self, device: str, profile: DeviceProfile | None) -> None:
        """Compute choices from these rates from now on, such as those of another process; ``None``
        goes back to this machine's."""
        self._profiles.pop(device, None)
        if profile is not None:
            self._profiles[device] = profile
        self._chosen.clear()

    def check(self, problem: Problem, backend: str) -> Contraction:
        """The named back end, which has to support the problem.

        Raises:
            ValueError: it does not, or a trial has banned it; the message says why.
        """
        contraction = self.contractions[backend]
        reason = contraction.refusal(problem) or self.admission.ban(contraction, problem)
        if reason:
            raise ValueError(f"back end {backend!r} cannot do this: {reason}")
        return contraction

    def choose(self, problem: Problem, backend: str = "auto") -> Contraction:
        """The back end for a problem: the one named, or the selector's choice for ``"auto"``.

        One that compiles kernels is tried first (:class:`Admission`).

        Raises:
            ValueError: the named back end does not support the problem or fails its trial; the
                message says why.
            DeviceLostError: a trial left the device unusable.
        """
        if backend != "auto":
            contraction = self.check(problem, backend)
            admitted = self.admission.admits(contraction, problem)
            if admitted is None:
                raise ValueError(
                    f"back end {backend!r} cannot be tried now, during the capture of a CUDA graph "
                    "or without free memory: run the network once before"
                )
            if not admitted:
                self.check(problem, backend)  # says why
            self._record(problem, backend)
            return contraction
        # What can change within a process: CPU threads, the current GPU, rounding to TF32.
        cpu = problem.device == "cpu"
        where = torch.get_num_threads() if cpu else current_gpu(problem.device)
        key = (problem, where, allows_tf32(problem.device))
        chosen = self._chosen.get(key)
        if chosen is None:
            name, is_final = self._plan(problem)
            chosen = self.contractions[name]
            if is_final:
                if len(self._chosen) >= _MOST_CHOICES:
                    self._chosen.clear()
                self._chosen[key] = chosen
        self._record(problem, chosen.name)
        return chosen

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[tuple[Problem, str]]]:
        """A list to which every problem is added with its back end while the context lasts."""
        recorder: list[tuple[Problem, str]] = []
        self._recorders.append(recorder)
        try:
            yield recorder
        finally:
            self._recorders.remove(recorder)

    def _record(self, problem: Problem, name: str) -> None:
        for recorder in self._recorders:
            recorder.append((problem, name))

    def predict(self, problem: Problem, profile: DeviceProfile | None = None) -> list[Prediction]:
        """Every back end's predicted time for the problem's pass, fastest first, unsupported ones
        last; on this device unless a profile is given."""
        profile = profile or self.profile(problem.device)
        predictions = [self._predict(name, problem, profile) for name in self.contractions]
        return sorted(predictions, key=lambda p: (p.seconds is None, p.seconds or 0.0))

    def _predict(self, name: str, problem: Problem, profile: DeviceProfile) -> Prediction:
        contraction = self.contractions[name]
        dtype = str(problem.dtype).removeprefix("torch.")
        reason = (
            contraction.refusal(problem)
            or self.admission.ban(contraction, problem)
            or profile.bans.get(f"{name} {dtype}")
        )
        if reason is None and contraction.needs_measurement and name not in profile.factors:
            reason = "is chosen only where `kw doctor` has measured it"
        if reason:
            return Prediction(name, None, reason)

        def predicted(part: Problem) -> float:
            share = contraction.efficiency.get(problem.device, 1.0)
            return profile.seconds(contraction.cost(part), problem.dtype, share)

        seconds = predicted(problem)
        if problem.training:  # backward pass = both passes - forward pass
            seconds = max(seconds - predicted(replace(problem, training=False)), 0.0)
        return Prediction(name, seconds * profile.factors.get(name, (1.0, 1.0))[problem.training])

    def _plan(self, problem: Problem) -> tuple[str, bool]:
        """The back end, and whether it stays the choice: one that could not be tried yet may be
        better."""
        if self.mode == "off":
            return self.fallback, True
        possible = [(p.seconds, p.name) for p in self.predict(problem) if p.seconds is not None]
        likely: list[str] = []
        is_final = True
        for seconds, name in possible:
            if likely and (self.mode == "model" or seconds > possible[0][0] * _CANDIDATES):
                break
            admitted = self.admission.admits(self.contractions[name], problem)
            if admitted:
                likely.append(name)
            is_final = is_final and admitted is not None
        likely = likely or [self.fallback]  # `kw doctor` may have found fault with all of them
        # Timing waits for the device.
        if len(likely) == 1 or is_capturing(problem.device):
            return likely[0], is_final
        return self._measure(replace(problem, batch=bucket(problem.batch)), likely), is_final

    def _measure(self, problem: Problem, names: Sequence[str]) -> str:
        def measure() -> dict[str, float]:
            contractions = {name: self.contractions[name] for name in names}
            return time_contraction(contractions, problem)

        times = self.timings.get(problem, measure)  # another process may have had other candidates
        return min(names, key=lambda name: times.get(name, math.inf))
