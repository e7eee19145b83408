"""Scaling: what an update takes on N GPUs, from a measured step, gradient bytes and link speeds.

``tools/scaling.py`` is the command line; ``docs/scaling.md`` has the formula and what was found.
"""
