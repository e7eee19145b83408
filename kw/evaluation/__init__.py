"""Exact metrics, and reports of finished runs."""

from .accuracy import Accuracy
from .paper import SOURCES, Figure, PaperRow, PaperTable, paper_tables
from .report import ReportError, Run, read_run, render_table, summary_table
from .tables import read_metafile, render_readme, render_tables

__all__ = [
    "SOURCES",
    "Accuracy",
    "Figure",
    "PaperRow",
    "PaperTable",
    "ReportError",
    "Run",
    "paper_tables",
    "read_metafile",
    "read_run",
    "render_readme",
    "render_table",
    "render_tables",
    "summary_table",
]
