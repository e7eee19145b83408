#!/usr/bin/env python
"""Write the tables of models into the families' READMEs, from their metafiles.

python scripts/render_tables.py            # write
python scripts/render_tables.py --check    # exit with 1 where a README is not up to date
"""

import sys
from pathlib import Path

from kw.cli import ToolParser, run_tool
from kw.evaluation import ReportError, render_readme

FAMILIES = Path(__file__).parents[1] / "configs/imagenet"


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where stale")
    parser.add_argument(
        "--root", type=Path, default=FAMILIES, metavar="DIR", help="folder of the families"
    )
    args = parser.parse_args()
    stale = []
    metafiles = sorted(args.root.glob("*/metafile.yml"))
    if not metafiles:
        raise ReportError(f"--root {args.root}: expected a folder of families, */metafile.yml")
    for metafile in metafiles:
        readme = metafile.with_name("README.md")
        text = render_readme(readme)
        if text != readme.read_text(encoding="utf-8"):
            stale.append(str(readme))
            if not args.check:
                readme.write_text(text, encoding="utf-8")
    if args.check and stale:
        print(
            f"not up to date: {', '.join(stale)}; run python scripts/render_tables.py",
            file=sys.stderr,
        )
        sys.exit(1)


if __name__ == "__main__":
    run_tool(main)
