#!/usr/bin/env python
"""``kw inspect costs``, by path."""

from kw.cli import run_tool
from kw.cli.analyze import main

if __name__ == "__main__":
    run_tool(main)
