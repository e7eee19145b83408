"""Published tables, trained and measured again: ``tools/reproduce.py``.

Reading order: :mod:`runs` (which trainings a table has), :mod:`scale` (the same, smaller),
:mod:`state` (what became of them), :mod:`launch`, :mod:`collect`, and the report's forms,
:mod:`text` and :mod:`page`.
"""

from .collect import RowReport, TableReport, collect
from .launch import LAUNCHERS, command_for, run_all, submit, unfinished
from .report import overview, write_report
from .runs import CONFIGS, Reproduction, Run
from .scale import Scale, read_scale
from .state import RunError, State

__all__ = [
    "CONFIGS",
    "LAUNCHERS",
    "Reproduction",
    "RowReport",
    "Run",
    "RunError",
    "Scale",
    "State",
    "TableReport",
    "collect",
    "command_for",
    "overview",
    "read_scale",
    "run_all",
    "submit",
    "unfinished",
    "write_report",
]
