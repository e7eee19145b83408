"""The trainings of a table: where each lives, and with which settings."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..config import ConfigError, load_config, to_dict, to_yaml
from ..config.names import configs
from ..errors import UserError
from ..evaluation import PaperRow, PaperTable
from .scale import Scale, as_option, epochs_scaled, flat, given_keys

__all__ = ["CONFIGS", "Reproduction", "Run", "config_path", "read_settings"]

CONFIGS = configs()
_WEIGHTS = "model.backbone.weights"


@dataclass(frozen=True)
class Run:
    """One training: a row with a seed.

    Attributes:
        row: of the table that is reproduced.
        seed: added to the configuration's own.
        home: folder of the table that the run belongs to: another table's for a row that is the
            same training as one of its.
        name: of its work directory.
    """

    row: PaperRow
    seed: int
    home: Path
    name: str

    @property
    def work_dir(self) -> Path:
        """What ``tools/train.py`` writes into."""
        return self.home / self.name

    @property
    def config(self) -> Path:
        """The resolved configuration that is trained."""
        return self.home / "launch" / "configs" / f"{self.name}{Path(self.row.config or '').suffix}"

    def file(self, suffix: str) -> Path:
        """What launching leaves: ``log``, ``lock``, ``json`` (how it ended)."""
        return self.home / "launch" / f"{self.name}.{suffix}"


@dataclass(frozen=True)
class Reproduction:
    """A table, at a scale, in a folder.

    Attributes:
        table: the published one.
        scale: how its recipes are scaled.
        root: folder of all tables.
        seeds: runs of every row.
        options: ``--cfg-options`` for all of them.
    """

    table: PaperTable
    scale: Scale
    root: Path
    seeds: int = 1
    options: tuple[str, ...] = ()

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
        names = [row.model for row in self.table.rows]
        for pattern in patterns:
            if not any(fnmatch(name, pattern) for name in names):
                raise ConfigError(
                    f"--rows {pattern}: table {self.table.name} has no such row; there are: "
                    f"{', '.join(names)}"
                )
        return [
            row
            for row in self.table.rows
            if not patterns or any(fnmatch(row.model, pattern) for pattern in patterns)
        ]

    def runs(self, row: PaperRow) -> list[Run]:
        """The runs of a row; none where it has no configuration, or is not a training."""
        if row.config is None or self.table.kind == "latency":
            return []
        return [self._run(row, seed) for seed in range(self.seeds)]

    def all_runs(self, row: PaperRow) -> list[Run]:
        """The runs of a row, and those of further seeds that are there already."""
        runs = self.runs(row)
        seed = len(runs)
        while runs and (more := self._run(row, seed)).work_dir.is_dir():
            runs.append(more)
            seed += 1
        return runs

    def _run(self, row: PaperRow, seed: int) -> Run:
        home, name = self.folder, row.model
        if row.same_run is not None:
            table, _, name = row.same_run.partition("/")
            home = self.base / table
        return Run(row, seed, home, f"{name}-seed{seed}" if seed else name)

    def waits_for(self, run: Run) -> Path | None:
        """The checkpoint that a run starts from and that is not there yet."""
        if run.row.weights is None or self._replaces_weights(run.row):
            return None
        weights = self._weights(run.row)
        return None if weights.is_file() else weights

    def _weights(self, row: PaperRow) -> Path:
        return self.base.absolute() / str(row.weights) / "best.pth"

    def _replaces_weights(self, row: PaperRow) -> bool:
        settings = self.scale.settings(self.table.kind, {})
        return _WEIGHTS in settings or _WEIGHTS in given_keys(self.options)

    def prepare_data(self) -> Path | None:
        """Generate the scale's data set where ``--cfg-options`` names none.

        Returns:
            Its folder; None where the data are not generated.

        Raises:
            UserError: it cannot be written, or scikit-learn, which has the digits, is missing.
        """
        kind = self.scale.data(self.table.kind)
        if kind is None or "data.root" in given_keys(self.options):
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

    def resolve(self, run: Run, data: Path | None = None) -> str:
        """The configuration of a run as text, every setting in it.

        Settings come from the row's shipped file, the scale and ``--cfg-options``, in this order.

        Args:
            run: one of this table's.
            data: what :meth:`prepare_data` gave.

        Raises:
            ConfigError: they do not fit together; the message names the row.
        """
        shipped = config_path(run.row)
        own = flat(read_settings(shipped))
        given = given_keys(self.options)
        settings = self.scale.settings(self.table.kind, own)
        epochs = int(_number(given.get("epochs")) or settings.get("epochs", own["epochs"]))
        settings = {**epochs_scaled(own, epochs), **settings}
        if run.row.weights is not None and not self._replaces_weights(run.row):
            settings[_WEIGHTS] = str(self._weights(run.row))
        root = Path(given["data.root"].strip("'\" ")) if "data.root" in given else data
        # Launchers start in other folders.
        root = Path(root or own["data.root"]).expanduser().absolute()
        counts = self.scale.rules and self.table.kind == "classification"
        if counts and "model.num_classes" not in {**settings, **given}:
            settings["model.num_classes"] = _count_classes(root)
        chosen = [as_option(key, value) for key, value in settings.items() if key not in given]
        chosen += [*self.options, as_option("data.root", str(root))]
        if run.seed:
            first = _number(given.get("seed"))
            chosen.append(as_option("seed", (own["seed"] if first is None else first) + run.seed))
        try:
            with warnings.catch_warnings():
                # What an option of all rows has no effect on.
                warnings.simplefilter("ignore", UserWarning)
                return _text(shipped, chosen)
        except ConfigError as error:
            raise ConfigError(
                *(f"row {run.row.model}: {line}" for line in error.problems)
            ) from error


def config_path(row: PaperRow) -> Path:
    """The shipped configuration of a row that has one."""
    return CONFIGS / str(row.config)


def read_settings(path: Path) -> dict[str, Any]:
    """A configuration as nested mappings, every setting in it.

    Raises:
        ConfigError: it is wrong, or a detector's and mmdetection is missing.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        if path.suffix != ".py":
            return to_dict(load_config(path, check_model_name=False))
        config = _load_detector(path, [])
        parts = {
            name: getattr(config, name) for name in ("model", "train_pipeline", "test_pipeline")
        }
        return {**dataclasses.asdict(config.run), **parts}


def _text(path: Path, options: list[str]) -> str:
    if path.suffix != ".py":
        return to_yaml(load_config(path, options, check_model_name=False))
    return str(_load_detector(path, options).to_python())


def _load_detector(path: Path, options: list[str]) -> Any:
    try:
        from ..detection import load_detector_config
    except ImportError as error:
        raise ConfigError(f"{path}: a detector's configuration: {error}") from error
    return load_detector_config(path, options)


def _number(text: str | None) -> int | None:
    """An option's value where it is a whole number; what else it is, is told elsewhere."""
    return int(text) if text is not None and text.strip().isdecimal() else None


def _count_classes(root: Path) -> int:
    """Folders of ``root/train``."""
    found = [f for f in (root / "train").glob("*") if f.is_dir()]
    if not found:
        raise ConfigError(f"data.root {root}: expected a folder train/ with one folder per class")
    return len(found)
