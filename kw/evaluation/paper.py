"""The published tables: figures with their sources, and the configurations that train their rows.

The data are ``paper_tables.yaml`` beside this module, whose head describes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ..errors import valid_names
from .report import ReportError

PAPER_TABLES = Path(__file__).with_name("paper_tables.yaml")
SOURCES = {
    "repo": "authors' results page",
    "abstract": "the papers' abstracts",
    "reprint": "reprinted in a later paper",
    "paper": "the method's own paper",
    "recalled": "unconfirmed",
}


@dataclass(frozen=True)
class Figure:
    """A figure that tables compare.

    Attributes:
        key: in ``paper_tables.yaml``.
        title: as a column.
        result: its key in a run's ``results.json``; empty where no training measures it.
        scale: from the unit of ``results.json`` to the table's.
        digits: decimals that are published.
    """

    key: str
    title: str
    result: str
    scale: float
    digits: int


FIGURES = {
    "classification": (
        Figure("top1", "top-1", "top1", 1, 2),
        Figure("top5", "top-5", "top5", 1, 2),
    ),
    "detection": (
        Figure("box_ap", "box AP", "bbox_mAP", 100, 1),
        Figure("mask_ap", "mask AP", "segm_mAP", 100, 1),
    ),
    "latency": (Figure("ms", "ms", "", 1, 2), Figure("memory_mb", "MiB", "", 1, 0)),
}


@dataclass(frozen=True)
class PaperRow:
    """A row of a published table; the attributes are the file's keys.

    Attributes:
        model: its name.
        source: a key of :data:`SOURCES`.
        config: file below ``configs/``; None where there is none: the row is published only.
        weights: ``table/model`` of the classifier that a detector starts from.
        same_run: ``table/model`` of the row that is the same training.
        note: a remark.
        figures: what is published, by key; ``params_m`` among them where it is.
    """

    model: str
    source: str
    config: str | None = None
    weights: str | None = None
    same_run: str | None = None
    note: str | None = None
    figures: Mapping[str, float] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class PaperTable:
    """A published table.

    Attributes:
        name: its key in the file.
        title: its title.
        kind: a key of :data:`FIGURES`.
        rows: in the paper's order.
        data: ``name``, ``train_images``, ``val_images`` of the set that the figures are from.
    """

    name: str
    title: str
    kind: str
    rows: tuple[PaperRow, ...]
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def figures(self) -> tuple[Figure, ...]:
        """What is compared."""
        return FIGURES[self.kind]

    def row(self, model: str) -> PaperRow:
        """The row of a model.

        Raises:
            ReportError: the table has none.
        """
        return _find(model, {row.model: row for row in self.rows}, f"table {self.name!r}: row")


class _Tables(dict[str, PaperTable]):
    """The tables by name; a wrong name is answered with the nearest."""

    def __missing__(self, name: str) -> Any:
        return _find(name, self, "table")


@cache
def paper_tables() -> Mapping[str, PaperTable]:
    """The published tables by name; a name that is none raises :class:`ReportError`."""
    return read_tables(PAPER_TABLES)


def read_tables(path: Path) -> Mapping[str, PaperTable]:
    """The tables of a file.

    Raises:
        ReportError: a key is unknown or missing, or a row refers to one that is not there.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        tables = _Tables({name: _table(name, table) for name, table in content.items()})
        for table in tables.values():
            for row in table.rows:
                for reference in filter(None, (row.weights, row.same_run)):
                    other, _, model = reference.partition("/")
                    tables[other].row(model)
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, AttributeError, KeyError) as error:
        raise ReportError(f"{path}: not a file of tables: {error!r}") from error
    except ReportError as error:
        raise ReportError(f"{path}: {error}") from error
    return tables


def _table(name: str, content: dict[str, Any]) -> PaperTable:
    rest = dict(content)
    kind = rest.pop("figures")
    figures = _find(kind, FIGURES, f"{name}: figures")
    rows = tuple(_row(name, row, figures) for row in rest.pop("rows"))
    if len({row.model for row in rows}) < len(rows):
        raise ReportError(f"{name}: two rows of one model")
    return PaperTable(name, rest.pop("title"), kind, rows, **rest)


def _row(table: str, content: dict[str, Any], figures: tuple[Figure, ...]) -> PaperRow:
    texts = ("model", "source", "config", "weights", "same_run", "note")
    numbers = ("params_m", *(figure.key for figure in figures))
    kinds = dict.fromkeys(texts, (str,)) | dict.fromkeys(numbers, (int, float))
    where = f"{table}, model {content.get('model')!r}"
    for key, value in content.items():
        expected = _find(key, kinds, f"{where}: key")
        if value is not None and type(value) not in expected:
            raise ReportError(f"{where}: {key} = {value!r}: expected {expected[-1].__name__}")
    if content.get("source") not in SOURCES:
        raise ReportError(
            f"{where}: source is {content.get('source')!r}, expected one of "
            f"{', '.join(map(repr, SOURCES))}"
        )
    given = {key: content[key] for key in numbers if content.get(key) is not None}
    return PaperRow(**{key: content.get(key) for key in texts}, figures=given)  # type: ignore


def _find(name: str, known: Mapping[str, Any], what: str) -> Any:
    if name not in known:
        raise ReportError(f"{what} {name!r}: there is none of that name{valid_names(name, known)}")
    return known[name]
