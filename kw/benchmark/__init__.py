"""Benchmarks: time and memory of dynamic beside static networks, measured in one run.

``tools/benchmark.py`` is the command line; ``docs/benchmarks.md`` says what is counted and shows
what was found.
"""

from .cases import (
    BenchmarkError,
    Case,
    LayerSource,
    NetworkSource,
    check_backends,
    load_cases,
    parse_layer,
)
from .conditions import DTYPES, MODES, Conditions
from .page import render_page, table_of
from .results import Result, read_results, write_result
from .run import run_case

__all__ = [
    "DTYPES",
    "MODES",
    "BenchmarkError",
    "Case",
    "Conditions",
    "LayerSource",
    "NetworkSource",
    "Result",
    "check_backends",
    "load_cases",
    "parse_layer",
    "read_results",
    "render_page",
    "run_case",
    "table_of",
    "write_result",
]
