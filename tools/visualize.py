#!/usr/bin/env python
"""``kw visualize``, by path."""

from kw.cli import run_tool
from kw.cli.visualize import main

if __name__ == "__main__":
    run_tool(main)
