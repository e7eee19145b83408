#!/usr/bin/env python
"""``kw inspect annotations``, by path."""

from kw.cli import run_tool
from kw.cli.check_coco import main

if __name__ == "__main__":
    run_tool(main)
