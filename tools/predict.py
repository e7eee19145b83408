#!/usr/bin/env python
"""``kw predict``, by path."""

from kw.cli import run_tool
from kw.cli.predict import main

if __name__ == "__main__":
    run_tool(main)
