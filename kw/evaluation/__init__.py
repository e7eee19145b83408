"""Exact metrics, and reports of finished runs."""

from .accuracy import Accuracy, headline
from .report import Run, plot_runs, read_run, render_table, summary_table

__all__ = [
    "Accuracy",
    "Run",
    "headline",
    "plot_runs",
    "read_run",
    "render_table",
    "summary_table",
]
