"""Tables of a family's models, generated from its ``metafile.yml`` into its ``README.md``.

A metafile holds what is known of the models in ``configs/imagenet/<family>``::

    tables:
      - table: imagenet_300ep               # of paper_tables.yaml, which has the published figures
        models:
          - name: kw_resnet50_4x            # its row, with the configuration
            parameters: 102015144
            macs: 4089184256                # an image of 224 x 224; see _HEADER
            macs_assembly: 8141422592
            measured: null                  # or {top1: ..., top5: ..., note: ...}

Published figures that nobody could check are shown as such, never as a target met.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .paper import SOURCES, paper_tables
from .report import ReportError, around, render_table

BEGIN = "<!-- tables: begin; generated from metafile.yml by scripts/render_tables.py -->"
END = "<!-- tables: end -->"
_HEADER = (
    "Model",
    "Parameters",
    "Multiply-adds",
    "of kernel assembly",
    "Published parameters",
    "Published top-1 / top-5",
    "Source",
    "Measured top-1 / top-5",
)
_MODEL_KEYS = {"name", "parameters", "macs", "macs_assembly", "measured"}


def read_metafile(path: Path) -> list[dict[str, Any]]:
    """The tables of a metafile with what is published of them.

    Returns:
        ``[{table, title, models: [...]}]``; a model has the keys of the file, ``config``, a path
        beside the metafile, and ``published``, a :class:`kw.evaluation.PaperRow`.

    Raises:
        ReportError: a key is missing or unknown, or there is no such table or row, or its
            configuration is not there; the message names file, model and key.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return [_read_table(path.parent, table) for table in content["tables"]]
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError, AttributeError) as error:
        raise ReportError(f"{path}: not a file of tables: {error!r}") from error
    except ReportError as error:
        raise ReportError(f"{path}: {error}") from error


def _read_table(folder: Path, table: Any) -> dict[str, Any]:
    _expect_keys(table, {"table", "models"}, "a table")
    paper = paper_tables()[table["table"]]
    models = []
    for model in table["models"]:
        where = f"{paper.name!r}, model {model.get('name')!r}"
        _expect_keys(model, _MODEL_KEYS, where)
        if model["measured"] is not None:
            _expect_keys(model["measured"], {"top1", "top5", "note"}, f"{where}: measured")
        published = paper.row(str(model["name"]))
        config = str(published.config).removeprefix(f"imagenet/{folder.name}/")
        if not (folder / config).is_file():
            raise ReportError(f"{where}: {config!r} is not beside the metafile")
        models.append({**model, "config": config, "published": published})
    return {"table": paper.name, "title": paper.title, "models": models}


def _expect_keys(mapping: Mapping[str, Any], keys: set[str], where: str) -> None:
    if mapping.keys() != keys:
        missing, unknown = sorted(keys - mapping.keys()), sorted(mapping.keys() - keys)
        raise ReportError(f"{where}: missing {missing}, unknown {unknown}; expected {sorted(keys)}")


def render_tables(tables: list[dict[str, Any]]) -> str:
    """The tables as Markdown, each under its title."""
    parts = []
    for table in tables:
        rows = [_row(model) for model in table["models"]]
        parts.append(f"### {table['title']}\n\n{render_table(_HEADER, rows)}")
    return "\n\n".join(parts)


def _row(model: Mapping[str, Any]) -> tuple[str, ...]:
    published, measured = model["published"], model["measured"]
    assembly = model["macs_assembly"]
    return (
        f"[{model['name']}]({model['config']})",
        f"{model['parameters'] / 1e6:.2f}M",
        f"{model['macs'] / 1e9:.2f}G",
        f"{assembly / 1e9:.2f}G" if assembly else "-",
        f"{params:.2f}M" if (params := published.figures.get("params_m")) else "-",
        _accuracy(published.figures),
        SOURCES[published.source],
        "-" if measured is None else _accuracy(measured),
    )


def _accuracy(figures: Mapping[str, float]) -> str:
    """Top-1 and top-5; a dash for what is not public."""
    shown = [f"{figures[key]:.2f}" if key in figures else "-" for key in ("top1", "top5")]
    return " / ".join(shown)


def render_readme(readme: Path) -> str:
    """A README's text with its tables made anew from the metafile beside it.

    Raises:
        ReportError: the marks between which the tables stand are missing, or the metafile is wrong.
    """
    metafile = readme.with_name("metafile.yml")
    try:
        before, after = around(readme.read_text(encoding="utf-8"), BEGIN, END)
    except ReportError as error:
        raise ReportError(f"{readme}: {error}") from error
    tables = read_metafile(metafile)
    try:
        return f"{before}\n\n{render_tables(tables)}\n\n{after}"
    except (TypeError, ValueError) as error:
        raise ReportError(f"{metafile}: expected numbers as figures: {error}") from error
