"""Many runs, and a table of them: studies, and published tables trained and measured again.

A study's file (:mod:`files`) and a published table (:mod:`published`, smaller by :mod:`scale`) say
which :mod:`runs` there are. :mod:`launch` starts what is not done. :mod:`summary` tabulates a
study, :mod:`report` a published table beside what was measured; :mod:`plots` draws both.
"""

from .files import Study, load_study
from .launch import LAUNCHERS, command_for, run_all, submit, unfinished
from .published import CONFIGS, Reproduction
from .report import RowReport, collect, overview, write_report
from .runs import Run, RunError, State, find_state
from .scale import Scale, read_scale

__all__ = [
    "CONFIGS",
    "LAUNCHERS",
    "Reproduction",
    "RowReport",
    "Run",
    "RunError",
    "Scale",
    "State",
    "Study",
    "collect",
    "command_for",
    "find_state",
    "load_study",
    "overview",
    "read_scale",
    "run_all",
    "submit",
    "unfinished",
    "write_report",
]
