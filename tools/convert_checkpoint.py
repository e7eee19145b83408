#!/usr/bin/env python
"""``kw convert released``, by path."""

from kw.cli import run_tool
from kw.cli.convert_checkpoint import main

if __name__ == "__main__":
    run_tool(main)
