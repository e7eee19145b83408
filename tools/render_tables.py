#!/usr/bin/env python
"""Write the tables of models into the families' READMEs, from their metafiles.

python tools/render_tables.py            # write
python tools/render_tables.py --check    # exit with 1 where a README is not up to date
"""

import argparse
import sys
from pathlib import Path

from kw.evaluation import render_readme

FAMILIES = Path(__file__).parents[1] / "configs/imagenet"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail where stale")
    parser.add_argument(
        "--root", type=Path, default=FAMILIES, metavar="DIR", help="folder of the families"
    )
    args = parser.parse_args()
    stale = []
    try:
        for metafile in sorted(args.root.glob("*/metafile.yml")):
            readme = metafile.with_name("README.md")
            text = render_readme(readme)
            if text != readme.read_text():
                stale.append(str(readme))
                if not args.check:
                    readme.write_text(text)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if args.check and stale:
        print(
            f"not up to date: {', '.join(stale)}; run python tools/render_tables.py",
            file=sys.stderr,
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
