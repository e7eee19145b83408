"""What a hook is: code that a run calls around its updates and epochs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..task import Metrics
from ..trainer import Trainer


class Hook:
    """Subclass it and write the methods that are needed; hooks are called in their order.

    All processes call all hooks at the same places, so that hooks may communicate.

    Attributes:
        is_shared: the state is the same in all processes, so that a run that goes on with another
            number of them has it too.
    """

    is_shared = False

    def before_training(self, trainer: Trainer) -> None:
        """Once, after a checkpoint to go on from is loaded."""

    def before_epoch(self, trainer: Trainer) -> None:
        """``trainer.epoch`` epochs are done; of a resumed epoch, some updates as well."""

    def after_update(self, trainer: Trainer, losses: Mapping[str, Tensor]) -> None:
        """``trainer.update`` updates are done, this one included.

        Args:
            trainer: the run.
            losses: scalars on the device, means over this process's micro-batches. Reading one
                makes the host wait for the device.
        """

    def after_evaluation(self, trainer: Trainer, metrics: Metrics) -> None:
        """No checkpoint has these figures yet; a resumed run may begin with an evaluation."""

    def after_epoch(self, trainer: Trainer, metrics: Metrics | None) -> None:
        """The epoch's checkpoint, where there is one, is being written.

        Args:
            trainer: the run.
            metrics: of the epoch's evaluation; None where it had none.
        """

    def after_training(self, trainer: Trainer) -> None:
        """Once, when all epochs are done."""

    def close(self, trainer: Trainer) -> None:
        """Once, at the end of the run, also where it ends with an error."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, of this process: tensors and plain types."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; called before :meth:`before_training`."""
