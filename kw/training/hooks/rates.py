"""The rates that a run's back ends are chosen by: one set for all processes, kept with the run."""

from __future__ import annotations

import json
from typing import Any

from ...warehouse import KWLayer
from ...warehouse.ops import selector
from ...warehouse.ops.device import DeviceProfile
from ...warehouse.ops.timing import machine_name
from ..distributed import from_first
from ..logs import logger
from ..trainer import Trainer
from .base import Hook


class RatesHook(Hook):
    """Gives every process the rates of the first one, and a resumed run those that it began with.

    The selector's choice is arithmetic on these rates, so that all processes choose alike, and a
    resumed run as before, though ``kw doctor`` has measured in between. ``rates.json`` in the work
    directory has them. A run that continues on another kind of device takes that device's.
    """

    is_shared = True

    def __init__(self) -> None:
        self._state: dict[str, Any] = {}

    def before_training(self, trainer: Trainer) -> None:
        if not any(isinstance(module, KWLayer) for module in trainer.task.network.modules()):
            self._state = {}
            return
        device = trainer.process.device.type
        machine = machine_name(device)
        if self._state and self._state["machine"] != machine:
            logger.info(
                f"the run continues on {machine}; it began on {self._state['machine']}: back ends "
                "are chosen by other rates"
            )
            self._state = {}
        self._state = from_first(
            self._state or {"machine": machine, "rates": selector.profile(device).to_json()}
        )
        profile = DeviceProfile.from_json(self._state["rates"])
        selector.use_profile(device, profile)
        if trainer.process.is_main:
            (trainer.work_dir / "rates.json").write_text(json.dumps(self._state, indent=1))
            logger.info(f"back ends are chosen by rates that are {profile.origin}")

    def close(self, trainer: Trainer) -> None:
        selector.use_profile(trainer.process.device.type, None)

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = state
