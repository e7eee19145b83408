#!/usr/bin/env python
"""``kw train``, by path."""

from kw.cli import run_tool
from kw.cli.train import main

if __name__ == "__main__":
    run_tool(main)
