"""Benchmarks: what the dynamic network costs beside the static one, measured in one run.

``tools/benchmark.py`` is the command line; ``docs/benchmarks.md`` says what is counted and shows
what was found.
"""

from .cases import BenchmarkError, Case, LayerSource, NetworkSource, load_cases, parse_layer
from .conditions import DTYPES, MODES, Conditions
from .page import render_page, table_of
from .results import Result, read_results, write_result
from .run import run_case
from .standard import StandardRun, standard_runs

__all__ = [
    "DTYPES",
    "MODES",
    "BenchmarkError",
    "Case",
    "Conditions",
    "LayerSource",
    "NetworkSource",
    "Result",
    "StandardRun",
    "load_cases",
    "parse_layer",
    "read_results",
    "render_page",
    "run_case",
    "standard_runs",
    "table_of",
    "write_result",
]
