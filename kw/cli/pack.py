"""Pack a data set into one file that is read fast: images made smaller, or their pixels.

kw pack data/imagenet imagenet-256.zip                       # JPEG, shorter side 256
kw pack data/imagenet imagenet-256-raw.zip --format raw      # pixels
kw pack shards set.zip --dataset webdataset --format keep    # files as they are
kw train CONFIG --cfg-options data.root=imagenet-256.zip
kw pack --check imagenet-256.zip
"""

from pathlib import Path

from ..config.data_schema import DataConfig
from ..config.loading import read_option
from ..data.listing import list_split
from ..data.packing import FORMATS, Packing, check_packed, pack
from ..data.reading import DataError
from ..registry import DATASETS
from .tool import ToolParser, number


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("root", nargs="?", help="the data set, as data.root names it")
    parser.add_argument("out", nargs="?", type=Path, help="the file to write, NAME.zip")
    parser.add_argument("--check", type=Path, metavar="FILE", help="check a packed set's checksums")
    parser.add_argument("--dataset", choices=DATASETS, default="folder")
    parser.add_argument("--dataset-args", default="{}", metavar="YAML", help="{key: value}")
    parser.add_argument("--splits", nargs="+", default=["train", "val"], help="train val")
    parser.add_argument(
        "--format", choices=FORMATS, default="jpeg", help="jpeg; raw: pixels; keep: files as is"
    )
    parser.add_argument(
        "--side", type=number(int, 1, 65500), default=256, help="shorter side, pixels; 256"
    )
    parser.add_argument(
        "--quality", type=number(int, 1, 100), default=90, help="of JPEG, default 90"
    )
    parser.add_argument(
        "--exif", choices=("apply", "ignore"), default="apply", help="turn images as EXIF data say"
    )
    parser.add_argument("--workers", type=number(int, 0, 512), default=4, help="processes, 4")
    args = parser.parse_args()
    if args.check is not None:
        wrong = check_packed(args.check)
        if wrong is not None:
            raise DataError(f"{args.check}: {wrong} is damaged")
        print(f"{args.check}: all checksums are right")
        return
    if args.root is None or args.out is None:
        parser.error("expected ROOT and OUT, or --check FILE")
    if args.out.suffix != ".zip":
        parser.error(f"{args.out}: expected a name that ends with .zip")
    given = read_option(f"dataset_args={args.dataset_args}").plain()
    data = DataConfig(root=args.root, dataset=args.dataset, **given)
    listings = {split: list_split(data, split) for split in args.splits}
    packing = Packing(args.format, args.side, args.quality, args.exif == "apply")
    bad = pack(listings, Path(args.root), args.out, packing, args.workers)
    counts = ", ".join(f"{len(each.files)} {split}" for split, each in listings.items())
    size = args.out.stat().st_size / 2**20
    unread = f", {bad} of those written now stored as they are" if bad else ""
    print(f"{args.out}: {counts} images{unread}, {size:,.1f} MiB")
