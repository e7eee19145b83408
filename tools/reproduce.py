#!/usr/bin/env python
"""``kw study reproduce``, by path."""

from kw.cli import run_tool
from kw.cli.reproduce import main

if __name__ == "__main__":
    run_tool(main)
