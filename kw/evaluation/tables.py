"""Tables of a family's models, generated from its ``metafile.yml`` into its ``README.md``.

A metafile holds what is known of the models in ``configs/imagenet/<family>``::

    tables:
      - title: ImageNet, 300 epochs
        models:
          - name: kw_resnet50_4x            # in the papers' tables
            config: kw_resnet50_4x.yaml     # beside the metafile
            parameters: 102015144
            macs: 4089184256                # an image of 224 x 224; see _HEADER
            macs_assembly: 8141422592
            published: {params_m: 102.02, top1: 81.05, top5: 95.21, source: repo}
            measured: null                  # or {top1: ..., top5: ..., note: ...}

Published figures that nobody could check are shown as such, never as a target met.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .report import ReportError, render_table

__all__ = ["BEGIN", "END", "read_metafile", "render_readme", "render_tables"]

BEGIN = "<!-- tables: begin; generated from metafile.yml by tools/render_tables.py -->"
END = "<!-- tables: end -->"
SOURCES = {
    "repo": "authors' results page",
    "reprint": "reprinted in a later paper",
    "recalled": "unconfirmed",
}
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
_MODEL_KEYS = {"name", "config", "parameters", "macs", "macs_assembly", "published", "measured"}
_PUBLISHED_KEYS = {"params_m", "top1", "top5", "source"}


def read_metafile(path: Path) -> list[dict[str, Any]]:
    """The tables of a metafile: ``[{title, models: [...]}]``.

    Raises:
        ReportError: a key is missing or unknown, a source is unknown, or a configuration that it
            names does not exist; the message names file, model and key.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ReportError(f"{path}: not valid: {error}") from error
    _expect_keys(content, {"tables"}, str(path))
    _expect_list(content["tables"], f"{path}: tables")
    for table in content["tables"]:
        _expect_keys(table, {"title", "models"}, f"{path}, a table")
        _expect_list(table["models"], f"{path}, {table['title']!r}: models")
        for model in table["models"]:
            name = model.get("name") if isinstance(model, Mapping) else model
            where = f"{path}, {table['title']!r}, model {name!r}"
            _expect_keys(model, _MODEL_KEYS, where)
            published, measured = model["published"], model["measured"]
            _expect_keys(published, _PUBLISHED_KEYS, f"{where}: published")
            if published["source"] not in SOURCES:
                raise ReportError(
                    f"{where}: published.source is {published['source']!r}, expected one of "
                    f"{', '.join(map(repr, SOURCES))}"
                )
            if measured is not None:
                _expect_keys(measured, {"top1", "top5", "note"}, f"{where}: measured")
            if not (path.parent / str(model["config"])).is_file():
                raise ReportError(f"{where}: config {model['config']!r} is not beside the metafile")
    return content["tables"]


def _expect_keys(mapping: Any, keys: set[str], where: str) -> None:
    found = set(mapping) if isinstance(mapping, Mapping) else {repr(mapping)}
    if found != keys:
        missing, unknown = sorted(keys - found), sorted(found - keys)
        raise ReportError(f"{where}: missing {missing}, unknown {unknown}; expected {sorted(keys)}")


def _expect_list(value: Any, where: str) -> None:
    if not isinstance(value, list):
        raise ReportError(f"{where}: expected a list, found {value!r}")


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
        f"{published['params_m']:.2f}M",
        f"{published['top1']:.2f} / {published['top5']:.2f}",
        SOURCES[published["source"]],
        "-" if measured is None else f"{measured['top1']:.2f} / {measured['top5']:.2f}",
    )


def render_readme(readme: Path) -> str:
    """A README's text with its tables made anew from the metafile beside it.

    Raises:
        ReportError: the marks between which the tables stand are missing, or the metafile is wrong.
    """
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ReportError(
            f"{readme}: expected once, in this order, the lines {BEGIN!r} and {END!r}"
        )
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    metafile = readme.with_name("metafile.yml")
    try:
        tables = render_tables(read_metafile(metafile))
    except (TypeError, ValueError) as error:  # a figure that is no number
        if isinstance(error, ReportError):
            raise
        raise ReportError(f"{metafile}: expected numbers as figures: {error}") from error
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"
