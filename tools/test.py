#!/usr/bin/env python
"""``kw test``, by path."""

from kw.cli import run_tool
from kw.cli.test import main

if __name__ == "__main__":
    run_tool(main)
