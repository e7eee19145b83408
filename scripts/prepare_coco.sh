#!/usr/bin/env bash
# Unpack the official COCO 2017 archives into one folder, and check that it is complete.
set -euo pipefail

program=$(basename "$0")

train_images=${COCO_TRAIN_IMAGES:-118287}
val_images=${COCO_VAL_IMAGES:-5000}
categories=${COCO_CATEGORIES:-80}

usage() {
    cat <<TEXT
usage: $program SOURCE_DIR TARGET_DIR
       $program --check TARGET_DIR

Unpacks, from SOURCE_DIR,
    train2017.zip                   (19 GB)
    val2017.zip                     (816 MB)
    annotations_trainval2017.zip    (253 MB; only the two instances files are taken)
into TARGET_DIR/train2017/*.jpg, TARGET_DIR/val2017/*.jpg and
TARGET_DIR/annotations/instances_{train,val}2017.json, then checks that every image that the
annotations name is there, no id is named twice, and the counts are right. The archives are left
alone; every file's checksum is compared with the archive's. A run that was interrupted is continued
by the same command: train2017 and val2017 get their names only when they are complete, and what was
unpacked of them before is not unpacked again.

    --check   check TARGET_DIR only

This takes Python 3.8 or newer without further packages; PYTHON names the interpreter (default:
.venv/bin/python beside this script's folder, else python3). Boxes and masks are checked by
tools/check_coco.py.

Expected counts can be changed through the environment, for subsets:
    COCO_TRAIN_IMAGES=$train_images
    COCO_VAL_IMAGES=$val_images
    COCO_CATEGORIES=$categories

Exit status: 0 done and complete; 2 something is missing or wrong, as the message says.
TEXT
}

die() {
    printf '%s: %s\n' "$program" "$*" >&2
    exit 2
}

mode=prepare
case ${1:-} in
-h | --help)
    usage
    exit 0
    ;;
--check)
    mode=check
    shift
    [ $# -eq 1 ] || die "--check takes TARGET_DIR; see $program --help"
    ;;
-*) die "unknown option $1; see $program --help" ;;
*) [ $# -eq 2 ] || die "expected SOURCE_DIR and TARGET_DIR; see $program --help" ;;
esac

beside=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin/python
[ -x "$beside" ] || beside=python3
python=${PYTHON:-$beside}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null ||
    die "$python is not Python 3.8 or newer: set PYTHON"

"$python" - "$train_images" "$val_images" "$categories" "$mode" "$@" <<'CODE' || exit 2
import collections
import json
import os
import shutil
import subprocess
import sys
import zipfile
import zlib

train_images, val_images, categories = map(int, sys.argv[1:4])
mode, source, target = sys.argv[4], sys.argv[5], sys.argv[-1].rstrip("/") or "/"
IMAGES = {"val2017": val_images, "train2017": train_images}
ANNOTATIONS = "annotations_trainval2017.zip"
INSTANCES = [f"instances_{split}.json" for split in IMAGES]


def die(message):
    sys.exit(f"prepare_coco.sh: {message}")


def some(values):
    more = f" and {len(values) - 5} more" if len(values) > 5 else ""
    return ", ".join(map(str, values[:5])) + more


def check_count(file, what, found, expected):
    if found != expected:
        die(f"{file} has {found} {what}, expected {expected}")


def check_ids(file, what, rows):
    counts = collections.Counter(row["id"] for row in rows)
    if twice := [each for each, count in counts.items() if count > 1]:
        die(f"{file} names {what} ids twice: {some(twice)}")
    return set(counts)


def check(split):
    """Check the annotations and images of a split."""
    folder = os.path.join(target, split)
    if not os.path.isdir(folder):
        die(f"no folder {folder}: expected train2017/, val2017/ and annotations/ in {target}")
    file = os.path.join(target, "annotations", f"instances_{split}.json")
    try:
        with open(file, "rb") as stream:
            content = json.load(stream)
        check_count(file, "categories", len(content["categories"]), categories)
        check_count(file, "images", len(content["images"]), IMAGES[split])
        check_ids(file, "category", content["categories"])
        ids = check_ids(file, "image", content["images"])
        check_ids(file, "annotation", content["annotations"])
        strays = sorted({row["image_id"] for row in content["annotations"]} - ids)
        named = [row["file_name"] for row in content["images"]]
    except OSError as error:
        die(f"no file {file}: {error.strerror}")
    except (ValueError, KeyError, TypeError) as error:
        die(f"{file} is not an annotation file, or not whole: {error!r}")
    if strays:
        die(f"{file} has annotations of images that it does not list: {some(strays)}")
    with os.scandir(folder) as entries:
        sizes = {entry.name: entry.stat().st_size for entry in entries}
    if missing := [name for name in named if name not in sizes]:
        die(f"{folder} lacks {len(missing)} images that {file} names: {some(missing)}")
    if empty := [name for name in named if sizes[name] == 0]:
        die(f"{folder} has {len(empty)} empty images: {some(empty)}")
    objects = f"{len(content['annotations'])} objects of {len(content['categories'])} categories"
    print(f"{folder}: {len(named)} images, {objects}")


def unpack(name, inside, folder, only=()):
    """Unpack what is in a folder of an archive, of it only some files if they are named. Files that
    are there in full are skipped."""
    archive = os.path.join(source, name)
    hint = "is the archive complete?"
    try:
        with zipfile.ZipFile(archive) as members:
            wanted = {
                os.path.basename(info.filename): info
                for info in members.infolist()
                if os.path.dirname(info.filename) == inside and not info.is_dir()
                and (not only or os.path.basename(info.filename) in only)
            }
            lacking = set(only) - set(wanted)
            if lacking or not wanted:
                names = ", ".join(sorted(lacking)) or "images"
                die(f"{archive} has no {names} in {inside}/: {hint}")
            os.makedirs(folder, exist_ok=True)
            for number, (file, info) in enumerate(sorted(wanted.items()), start=1):
                path = os.path.join(folder, file)
                if os.path.isfile(path) and os.path.getsize(path) == info.file_size:
                    continue
                # A file gets its name when it is whole and its checksum is right, which zipfile
                # compares at the end.
                with members.open(info) as packed, open(path + ".partial", "wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked, 1 << 20)
                os.replace(path + ".partial", path)
                if number % 10000 == 0:
                    print(f"{inside}: {number} of {len(wanted)} files", flush=True)
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        die(f"cannot unpack {archive}: {error}: {hint}")


def unpack_images(split):
    """The folder gets its name when all images are there."""
    partial = os.path.join(target, f".{split}.partial")
    print(f"{split}: unpacking", flush=True)
    unpack(f"{split}.zip", split, partial)
    found = sum(name.endswith(".jpg") for name in os.listdir(partial))
    if found != IMAGES[split]:
        archive = os.path.join(source, f"{split}.zip")
        die(f"{archive} has {found} images, expected {IMAGES[split]}: is the archive complete?")
    os.rename(partial, os.path.join(target, split))


def check_space(needed):
    """Refuse to start what cannot end."""
    # JPEGs do not compress; text shrinks to a third.
    need = 0
    for name in needed:
        need += os.path.getsize(os.path.join(source, name)) * (3 if name == ANNOTATIONS else 1)
        folder = os.path.join(target, f".{name[:-4]}.partial")
        if os.path.isdir(folder):  # what an interrupted run unpacked takes no space again
            need -= sum(entry.stat().st_size for entry in os.scandir(folder))
    need += need // 50  # a file takes whole blocks of the disk, 2 KB more than its size
    free = subprocess.check_output(["df", "-Pk", target], text=True).splitlines()[1].split()[3]
    if int(free) < need >> 10:
        die(f"{target} has {int(free) >> 10} MB free, unpacking takes {need >> 20} MB")


def prepare():
    if not os.path.isdir(source):
        die(f"SOURCE_DIR {source} is not a folder")
    splits = [split for split in IMAGES if not os.path.isdir(os.path.join(target, split))]
    needed = [f"{split}.zip" for split in splits]
    annotations = os.path.join(target, "annotations")
    if not all(os.path.isfile(os.path.join(annotations, name)) for name in INSTANCES):
        needed.append(ANNOTATIONS)
    there = sorted(os.listdir(source))
    if lacking := [name for name in needed if name not in there]:
        die(
            f"{source} lacks {' '.join(lacking)}; it has: {' '.join(there[:5])}. "
            "The archives are listed at https://cocodataset.org/#download"
        )
    try:
        os.makedirs(target, exist_ok=True)
    except OSError as error:
        die(f"cannot make {target}: {error.strerror}")
    check_space(needed)
    if ANNOTATIONS in needed:
        unpack(ANNOTATIONS, "annotations", annotations, INSTANCES)
    for split in splits:
        unpack_images(split)


if mode == "prepare":
    prepare()
for split in reversed(IMAGES):
    check(split)
CODE
