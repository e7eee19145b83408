#!/usr/bin/env bash
# Unpack the official COCO 2017 archives into one folder, and check that it is complete.
set -euo pipefail
export LC_ALL=C

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

# Set once by main.
source=
target=
python=

# Check the annotations and images of split $1, $2 images expected; the code prints what is wrong.
check_split() {
    [ -d "$target/$1" ] ||
        die "no folder $target/$1: expected train2017/, val2017/ and annotations/ in $target"
    "$python" - "$target" "$1" "$2" "$categories" <<'CODE' || exit 2
import json
import os
import sys

target, split, images, categories = sys.argv[1:]
folder = os.path.join(target, split)
file = os.path.join(target, "annotations", f"instances_{split}.json")


def die(message):
    sys.exit(f"prepare_coco.sh: {message}")


def some(values):
    more = f" and {len(values) - 5} more" if len(values) > 5 else ""
    return ", ".join(map(str, values[:5])) + more


def check_count(what, found, expected):
    if found != int(expected):
        die(f"{file} has {found} {what}, expected {expected}")


def check_ids(what, rows):
    seen, twice = set(), []
    for row in rows:
        if row["id"] in seen:
            twice.append(row["id"])
        seen.add(row["id"])
    if twice:
        die(f"{file} names {what} ids twice: {some(twice)}")
    return seen


try:
    with open(file, "rb") as stream:
        content = json.load(stream)
    check_count("categories", len(content["categories"]), categories)
    check_count("images", len(content["images"]), images)
    check_ids("category", content["categories"])
    ids = check_ids("image", content["images"])
    check_ids("annotation", content["annotations"])
    strays = sorted({row["image_id"] for row in content["annotations"]} - ids)
    named = [row["file_name"] for row in content["images"]]
except OSError as error:
    die(f"no file {file}: {error.strerror}")
except (ValueError, KeyError, TypeError) as error:
    die(f"{file} is not an annotation file, or not whole: {error!r}")
if strays:
    die(f"{file} has annotations of images that it does not list: {some(strays)}")
with os.scandir(folder) as entries:
    there = {entry.name: entry for entry in entries if not entry.name.startswith(".")}
missing = [name for name in named if name not in there]
if missing:
    die(f"{folder} lacks {len(missing)} images that {file} names: {some(missing)}")
empty = [name for name in named if there[name].stat().st_size == 0]
if empty:
    die(f"{folder} has {len(empty)} empty images: {some(empty)}")
objects = len(content["annotations"])
print(f"{folder}: {len(named)} images, {objects} objects of {len(content['categories'])} categories")
CODE
}

check() {
    check_split train2017 "$train_images"
    check_split val2017 "$val_images"
}

# Unpack archive $1 into folder $2: the members in folder $3 of the archive, or if $4 is given, of
# those only the files that it lists. Files that are there in full are skipped.
unpack() {
    "$python" - "$source/$1" "$2" "$3" "${4:-}" <<'CODE' || exit 2
import os
import shutil
import sys
import zipfile
import zlib

archive, folder, inside, only = sys.argv[1:]
hint = "is the archive complete?"
try:
    with zipfile.ZipFile(archive) as members:
        wanted = {
            os.path.basename(info.filename): info
            for info in members.infolist()
            if os.path.dirname(info.filename) == inside and not info.is_dir()
            and (not only or os.path.basename(info.filename) in only.split())
        }
        lacking = set(only.split()) - set(wanted)
        if lacking or not wanted:
            names = ", ".join(sorted(lacking)) or "images"
            sys.exit(f"prepare_coco.sh: {archive} has no {names} in {inside}/: {hint}")
        os.makedirs(folder, exist_ok=True)
        for number, (name, info) in enumerate(sorted(wanted.items()), start=1):
            path = os.path.join(folder, name)
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
    sys.exit(f"prepare_coco.sh: cannot unpack {archive}: {error}: {hint}")
CODE
}

# Unpack the images of split $1, $2 expected; the folder gets its name when all are there.
unpack_images() {
    local split=$1 images=$2 partial="$target/.$1.partial" found
    if [ -d "$target/$split" ]; then
        return
    fi
    printf '%s: unpacking\n' "$split"
    unpack "$split.zip" "$partial" "$split"
    found=$(find "$partial" -type f -name '*.jpg' | awk 'END { print NR }')
    [ "$found" -eq "$images" ] ||
        die "$source/$split.zip has $found images, expected $images: is the archive complete?"
    mv "$partial" "$target/$split"
}

kilobytes() {
    local bytes
    bytes=$(wc -c <"$1")
    echo $((bytes / 1024))
}

# Refuse to start what cannot end: $1 = kilobytes to unpack.
check_space() {
    local need=$1 free
    # JPEGs do not compress; a file takes whole blocks of the disk, 2 KB more than its size.
    need=$((need + need / 50))
    free=$(df -Pk "$target" | awk 'NR == 2 { print $4 }')
    [ "$free" -ge "$need" ] ||
        die "$target has $((free / 1024)) MB free, unpacking takes $((need / 1024)) MB"
}

find_python() {
    local beside
    beside=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin/python
    python=${PYTHON:-}
    if [ -z "$python" ]; then
        python=python3
        [ ! -x "$beside" ] || python=$beside
    fi
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null ||
        die "$python is not Python 3.8 or newer: set PYTHON"
}

prepare() {
    local name split unpacked need=0 lacking=() needed=()
    local instances="instances_train2017.json instances_val2017.json"
    [ -d "$source" ] || die "SOURCE_DIR $source is not a folder"
    for split in train2017 val2017; do
        [ -d "$target/$split" ] || needed+=("$split.zip")
    done
    for name in $instances; do
        [ -f "$target/annotations/$name" ] || unpacked=no
    done
    [ -z "${unpacked:-}" ] || needed+=(annotations_trainval2017.zip)
    for name in ${needed[@]+"${needed[@]}"}; do
        [ -f "$source/$name" ] || lacking+=("$name")
    done
    [ ${#lacking[@]} -eq 0 ] ||
        die "$source lacks ${lacking[*]}; it has: $(find "$source" -maxdepth 1 -type f \
            -exec basename {} \; | sort | head -n 5 | xargs)." \
            "The archives are listed at https://cocodataset.org/#download"
    mkdir -p "$target" || die "cannot make $target"
    for name in ${needed[@]+"${needed[@]}"}; do
        # What an interrupted run unpacked takes no space again.
        split=${name%.zip}
        need=$((need + $(kilobytes "$source/$name")))
        [ ! -d "$target/.$split.partial" ] ||
            need=$((need - $(du -sk "$target/.$split.partial" | cut -f1)))
        # Text shrinks to a third.
        [ "$name" != annotations_trainval2017.zip ] ||
            need=$((need + 2 * $(kilobytes "$source/$name")))
    done
    check_space "$need"
    if [ -n "${unpacked:-}" ]; then
        unpack annotations_trainval2017.zip "$target/annotations" annotations "$instances"
    fi
    unpack_images val2017 "$val_images"
    unpack_images train2017 "$train_images"
    check
}

mode=prepare
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help)
        usage
        exit 0
        ;;
    --check) mode=check ;;
    -*) die "unknown option $1; see $program --help" ;;
    *) break ;;
    esac
    shift
done

if [ "$mode" = check ]; then
    [ $# -eq 1 ] || die "--check takes TARGET_DIR; see $program --help"
    target=${1%/}
    find_python
    check
else
    [ $# -eq 2 ] || die "expected SOURCE_DIR and TARGET_DIR; see $program --help"
    source=${1%/}
    target=${2%/}
    find_python
    prepare
fi
