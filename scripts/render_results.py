#!/usr/bin/env python
"""Write the tables of studies into docs/results.md, from their summaries.

python scripts/render_results.py            # write
python scripts/render_results.py --check    # exit with 1 where the page is not up to date
"""

import sys
from pathlib import Path

from kw.cli import ToolParser, run_tool
from kw.evaluation import ReportError
from kw.study.summary import read_summary, render_page

DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where stale")
    parser.add_argument(
        "--root", type=Path, default=DOCS, metavar="DIR", help="folder of results.md and results/"
    )
    args = parser.parse_args()
    page, folder = args.root / "results.md", args.root / "results"
    if not page.is_file():
        raise ReportError(f"--root {args.root}: expected a folder with results.md and results/")
    summaries = [(path.stem, read_summary(path)) for path in sorted(folder.glob("*.json"))]
    before = page.read_text(encoding="utf-8")
    try:
        text = render_page(before, summaries)
    except ReportError as error:
        raise ReportError(f"{page}: {error}") from error
    if text != before and args.check:
        print(f"not up to date: {page}; run python scripts/render_results.py", file=sys.stderr)
        sys.exit(1)
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_tool(main)
