#!/usr/bin/env python
"""``kw benchmark networks``, by path."""

from kw.cli import run_tool
from kw.cli.benchmark import main

if __name__ == "__main__":
    run_tool(main)
