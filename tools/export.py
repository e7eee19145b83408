#!/usr/bin/env python
"""``kw export``, by path."""

from kw.cli import run_tool
from kw.cli.export import main

if __name__ == "__main__":
    run_tool(main)
