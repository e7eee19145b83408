"""A published table as runs: the rows of ``paper_tables.yaml``, at full or at a smaller scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..config.loading import read_option
from ..config.names import configs
from ..config.tree import flat_settings
from ..data.walk import is_hidden
from ..errors import UserError
from ..evaluation import PaperRow, PaperTable
from .runs import Run
from .scale import Scale, epochs_scaled
from .settings import as_option, read_settings

CONFIGS = configs()
_WEIGHTS = "model.backbone.weights"


@dataclass(frozen=True)
class Reproduction:
    """A table, at a scale, in a folder."""

    table: PaperTable
    scale: Scale
    root: Path  # folder of all tables
    seeds: int = 1  # runs of every row
    options: tuple[str, ...] = ()  # --cfg-options for all of them

    @property
    def base(self) -> Path:
        """Folder of the tables of this scale."""
        return self.root if self.scale.name == "full" else self.root / self.scale.name

    @property
    def folder(self) -> Path:
        """Folder of this table."""
        return self.base / self.table.name

    def rows(self, patterns: Sequence[str] = ()) -> list[PaperRow]:
        """The rows whose names match one of the patterns; all without any.

        Raises:
            ConfigError: a pattern matches none.
        """
        chosen = []
        for pattern in patterns or ["*"]:
            found = [row for row in self.table.rows if fnmatch(row.model, pattern)]
            if not found:
                names = ", ".join(row.model for row in self.table.rows)
                raise ConfigError(
                    f"--rows {pattern}: table {self.table.name} has no such row; there are: {names}"
                )
            chosen += found
        return [row for row in self.table.rows if row in chosen]

    def runs(self, row: PaperRow, *, more: bool = False) -> list[Run]:
        """The runs of a row; none where it has no configuration, or is not a training.

        With ``more`` also further seeds, of which there are work directories.
        """
        if row.config is None or self.table.kind == "latency":
            return []
        runs = [self._run(row, seed) for seed in range(self.seeds)]
        while more and (further := self._run(row, len(runs))).work_dir.is_dir():
            runs.append(further)
        return runs

    def _run(self, row: PaperRow, seed: int) -> Run:
        home, name = self.folder, row.model
        if row.same_run is not None:
            table, _, name = row.same_run.partition("/")
            home = self.base / table
        name = f"{name}-seed{seed}" if seed else name
        needs = None
        scaled = self.scale.settings({"task": self.table.kind})
        if row.weights is not None and _WEIGHTS not in {**scaled, **self._given}:
            needs = self.base.absolute() / row.weights / "best.pth"
        return Run(row.model, seed, home, name, CONFIGS / str(row.config), needs=needs)

    @property
    def _given(self) -> dict[str, Any]:
        """The settings of the options by dotted key."""
        trees = (flat_settings(read_option(option).plain()) for option in self.options)
        return {key: value for tree in trees for key, value in tree.items()}

    def prepare_data(self) -> Path | None:
        """Generate the scale's data set where ``--cfg-options`` names none.

        Returns:
            Its folder; None where the data are not generated.

        Raises:
            UserError: it cannot be written, or scikit-learn, which has the digits, is missing.
        """
        kind = self.scale.data(self.table.kind)
        if kind is None or "data.root" in self._given:
            return None
        target = self.base / "data" / kind
        try:
            if kind == "digits":
                from ..data.digits import write_digits

                write_digits(target)
            elif kind == "digit_scenes":
                from ..data.digit_scenes import write_digit_scenes

                write_digit_scenes(target, train=40, val=16)
            else:
                raise ConfigError(
                    f"scale {self.scale.name}: data {kind!r}: expected digits or digit_scenes"
                )
        except ImportError as error:
            raise UserError(str(error)) from error
        return target

    def resolve(self, run: Run, data: Path | None = None) -> Run:
        """A run with its options: the scale's settings, then ``--cfg-options``.

        ``data`` is what :meth:`prepare_data` gave.

        Raises:
            ConfigError: they do not fit together; the message names the row.
        """
        own, given = flat_settings(read_settings(run.config)), self._given
        settings = self.scale.settings({**own, "task": self.table.kind})
        epochs = {**own, **settings, **given}["epochs"]
        if type(epochs) is int and epochs > 0:  # what else it is, is told below
            settings = {**epochs_scaled(own, epochs), **settings}
        if run.needs is not None:
            settings[_WEIGHTS] = str(run.needs)
        # Launchers start in other folders.
        root = Path(str(given.get("data.root") or data or own["data.root"])).expanduser().absolute()
        counts = self.scale.rules and self.table.kind == "classification"
        if counts and "model.num_classes" not in {**settings, **given}:
            settings["model.num_classes"] = _count_classes(root)
        chosen = [as_option(key, value) for key, value in settings.items() if key not in given]
        chosen += [*self.options, as_option("data.root", str(root))]
        first = {**own, **given}["seed"]
        if run.seed and type(first) is int:
            chosen.append(as_option("seed", first + run.seed))
        try:
            read_settings(run.config, chosen)
        except ConfigError as error:
            raise ConfigError(*(f"row {run.row}: {line}" for line in error.problems)) from error
        return replace(run, options=tuple(chosen))


def _count_classes(root: Path) -> int:
    """Folders of ``root/train`` that training takes for classes."""
    found = [f for f in (root / "train").glob("*") if f.is_dir() and not is_hidden(f.name)]
    if not found:
        raise ConfigError(f"data.root {root}: expected a folder train/ with one folder per class")
    return len(found)
