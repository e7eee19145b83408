"""Bring a model of the Hugging Face Hub into a folder, for use without the hub.

kw pull user/kw_resnet18_1x kw_resnet18_1x
kw pull user/kw_resnet18_1x@v2 kw_resnet18_1x
kw predict kw_resnet18_1x photos/

The folder is one for kw predict, test and export, and for kw.load. A detector's config.py is a
program, which the first use of the folder runs: it is brought with --allow-code alone, to be read
before that. Other programs and pickles are never brought (docs/hub.md).
"""

import shutil
from pathlib import Path

from ..hub import DATA, PROGRAM, WEIGHTS, HubError, fetch, split_name
from .tool import ToolParser, output_folder


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("name", metavar="USER/MODEL", help="@REVISION: a branch, tag or commit")
    parser.add_argument("folder", type=output_folder, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--allow-code", action="store_true", help=f"bring {PROGRAM} too")
    args = parser.parse_args()
    folder: Path = args.folder
    if folder.is_dir() and any(folder.iterdir()):
        raise HubError(f"{folder}: is not empty; choose another folder, or empty this one")
    wanted = (*DATA, PROGRAM) if args.allow_code else DATA
    cached, ours = fetch(args.name, wanted)
    found = [name for name in wanted if (cached / name).is_file()]
    if WEIGHTS not in found:
        raise HubError(f"{split_name(args.name)[0]}: has no {WEIGHTS}; nothing was written")
    folder.mkdir(parents=True, exist_ok=True)
    for name in found:
        shutil.copyfile(cached / name, folder / name)
    # The cache's folder is named by the commit.
    print(f"wrote {folder}: {', '.join(found)} of commit {cached.name}")
    if ours.get("task") == "detection" and not args.allow_code:
        print(
            f"{PROGRAM}, which a detector needs, is a program: --allow-code brings it, to be read"
        )
