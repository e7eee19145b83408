"""Benchmarks: time and memory of dynamic beside static networks, measured in one run.

``kw benchmark networks`` is the command line; ``docs/benchmarks.md`` says what is counted and shows
what was found.
"""
