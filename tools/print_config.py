#!/usr/bin/env python
"""``kw config``, by path."""

from kw.cli import run_tool
from kw.cli.print_config import main

if __name__ == "__main__":
    run_tool(main)
