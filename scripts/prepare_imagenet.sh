#!/usr/bin/env bash
# Lay out the official ILSVRC2012 archives as the folders that data.root expects, and check them.
set -euo pipefail
export LC_ALL=C # sort and comm must agree on one order

program=$(basename "$0")
train_name=ILSVRC2012_img_train.tar
val_name=ILSVRC2012_img_val.tar
devkit_name=ILSVRC2012_devkit_t12.tar.gz

classes=${IMAGENET_CLASSES:-1000}
train_images=${IMAGENET_TRAIN_IMAGES:-1281167}
val_images=${IMAGENET_VAL_IMAGES:-50000}
train_range=${IMAGENET_TRAIN_PER_CLASS:-732-1300}
val_range=${IMAGENET_VAL_PER_CLASS:-50-50}

usage() {
    cat <<TEXT
usage: $program [--md5] SOURCE_DIR TARGET_DIR
       $program --check TARGET_DIR

Extracts, from SOURCE_DIR,
    $train_name    (138 GB)
    $val_name      (6.3 GB)
    $devkit_name   (2.5 MB: which class each validation image has)
into TARGET_DIR/train/<wnid>/*.JPEG and TARGET_DIR/val/<wnid>/*.JPEG, then checks the counts.
The archives are left alone. A run that was interrupted is continued by the same command: a class
folder gets its name only when it is complete.

    --check   check the counts of TARGET_DIR only
    --md5     compare the archives' MD5 sums with the published ones first (reads 145 GB)

Reading the devkit takes Python with torchvision and scipy; PYTHON names the interpreter
(default: .venv/bin/python beside this script's folder, else python3).

Expected counts can be changed through the environment, for subsets:
    IMAGENET_CLASSES=$classes
    IMAGENET_TRAIN_IMAGES=$train_images  IMAGENET_TRAIN_PER_CLASS=$train_range
    IMAGENET_VAL_IMAGES=$val_images      IMAGENET_VAL_PER_CLASS=$val_range

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

# Print "wnid images" for every class folder of split $1, sorted.
count_classes() {
    (cd "$target/$1" && find -L . -path './.*' -prune -o -type f -name '*.JPEG' -print) |
        awk -F/ '{ images[$2]++ } END { for (wnid in images) print wnid, images[wnid] }' | sort
}

# Check split $1: $2 images in all, $3 = least-most images per class.
check_split() {
    local split=$1 images=$2 least=${3%-*} most=${3#*-} counts found_classes found_images odd
    [ -d "$target/$split" ] || die "no folder $target/$split: expected train/ and val/ in $target"
    counts=$(count_classes "$split")
    found_classes=$(printf '%s' "$counts" | awk 'END { print NR }')
    found_images=$(printf '%s' "$counts" | awk '{ n += $2 } END { print n + 0 }')
    odd=$(printf '%s' "$counts" | awk -v least="$least" -v most="$most" \
        '($2 < least || $2 > most) && n++ < 5 { printf "%s%s (%d)", sep, $1, $2; sep = ", " }')
    [ "$found_classes" -eq "$classes" ] ||
        die "$target/$split has $found_classes classes with images, expected $classes"
    [ -z "$odd" ] ||
        die "$target/$split: classes with other than $3 images: $odd;" \
            "delete their folders and extract again"
    [ "$found_images" -eq "$images" ] ||
        die "$target/$split has $found_images images, expected $images"
    printf '%s: %s classes, %s images\n' "$target/$split" "$found_classes" "$found_images"
}

check() {
    local unpaired
    check_split train "$train_images" "$train_range"
    check_split val "$val_images" "$val_range"
    unpaired=$(comm -3 <(count_classes train | cut -d' ' -f1) <(count_classes val | cut -d' ' -f1))
    [ -z "$unpaired" ] ||
        die "classes in only one of train/ and val/ of $target: $(printf '%s' "$unpaired" | xargs)"
}

# Extract the class archives within the training archive that have no folder yet.
extract_train() {
    local archive="$source/$train_name" member wnid partial images number=0
    mkdir -p "$target/train"
    while IFS= read -r member; do
        wnid=$(basename "$member" .tar)
        number=$((number + 1))
        [ -d "$target/train/$wnid" ] && continue
        partial="$target/train/.$wnid.partial"
        rm -rf "$partial"
        mkdir "$partial"
        tar -xOf "$archive" "$member" | tar -xf - -C "$partial" ||
            die "cannot extract $member from $archive: is the archive complete? (--md5 tells)"
        # tar takes an archive that ends between two images for a whole one.
        images=$(find "$partial" -type f -name '*.JPEG' | awk 'END { print NR }')
        [ "$images" -ge "${train_range%-*}" ] ||
            die "$member in $archive has $images images, expected $train_range:" \
                "is the archive complete?"
        mv "$partial" "$target/train/$wnid"
        [ $((number % 50)) -ne 0 ] || printf 'train: %d of %d classes\n' "$number" "$classes"
    done <<<"$1"
}

# Print one line per class: its wnid, then the names of its validation images.
list_val_classes() {
    "$python" - "$source/$devkit_name" <<'CODE'
import collections
import os
import sys
import tempfile

from torchvision.datasets import imagenet

devkit = os.path.abspath(sys.argv[1])
name = os.path.basename(devkit)
# The sum is compared by --md5, for all three archives alike.
imagenet.ARCHIVE_META["devkit"] = (name, None)
# torchvision writes what it reads beside the archive, where there may be no right to write.
with tempfile.TemporaryDirectory() as folder:
    os.symlink(devkit, os.path.join(folder, name))
    imagenet.parse_devkit_archive(folder)
    wnids = imagenet.load_meta_file(folder)[1]
images = collections.defaultdict(list)
for number, wnid in enumerate(wnids, start=1):
    images[str(wnid)].append(f"ILSVRC2012_val_{number:08d}.JPEG")
for wnid in sorted(images):
    print(wnid, *images[wnid])
CODE
}

# Extract the validation images and sort them into class folders; val/ appears when all are there.
extract_val() {
    local archive="$source/$val_name" partial="$target/.val.partial" lists row
    lists=$(list_val_classes) || die "cannot read the validation classes from $source/$devkit_name"
    rm -rf "$partial"
    mkdir -p "$partial/images" "$partial/val"
    tar -xf "$archive" -C "$partial/images" ||
        die "cannot extract $archive: is the archive complete? (--md5 tells)"
    while read -ra row; do
        mkdir "$partial/val/${row[0]}"
        (cd "$partial/images" && mv "${row[@]:1}" "../val/${row[0]}/") ||
            die "$archive lacks images that $devkit_name lists for class ${row[0]}"
    done <<<"$lists"
    mv "$partial/val" "$target/val"
    rm -rf "$partial"
}

check_md5() {
    "$python" - "$source" <<'CODE' || die "an archive in $source is not the published one"
import sys

from torchvision.datasets.imagenet import ARCHIVE_META
from torchvision.datasets.utils import calculate_md5

wrong = False
for name, expected in ARCHIVE_META.values():
    found = calculate_md5(f"{sys.argv[1]}/{name}", chunk_size=2**24)
    print(f"{name}: MD5 {found}, expected {expected}", file=sys.stderr)
    wrong |= found != expected
sys.exit(wrong)
CODE
}

kilobytes() {
    local bytes
    bytes=$(wc -c <"$1")
    echo $((bytes / 1024))
}

# Refuse to start what cannot end: $1 = kilobytes to extract.
check_space() {
    local need=$1 free
    # A file takes whole blocks of the disk, 2 KB more than its size on average: under 2% here.
    need=$((need + need / 50))
    free=$(df -Pk "$target" | awk 'NR == 2 { print $4 }')
    [ "$free" -ge "$need" ] ||
        die "$target has $((free / 1024)) MB free, extracting takes $((need / 1024)) MB"
}

find_python() {
    local beside
    beside=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin/python
    python=${PYTHON:-}
    if [ -z "$python" ]; then
        python=python3
        [ ! -x "$beside" ] || python=$beside
    fi
    "$python" -c 'from importlib.util import find_spec as find
raise SystemExit(not (find("scipy") and find("torchvision")))' 2>/dev/null ||
        die "$python has not both torchvision and scipy: install them, or set PYTHON"
}

prepare() {
    local name members missing=0 member need=0 archives=()
    [ -d "$source" ] || die "SOURCE_DIR $source is not a folder"
    for name in "$train_name" "$val_name" "$devkit_name"; do
        [ -f "$source/$name" ] || archives+=("$name")
    done
    [ ${#archives[@]} -eq 0 ] ||
        die "$source lacks ${archives[*]}; it has: $(find "$source" -maxdepth 1 -type f \
            -exec basename {} \; | sort | head -n 5 | xargs)." \
            "The archives come from https://image-net.org/download-images (registration needed)"
    mkdir -p "$target" || die "cannot make $target"
    if [ -n "$md5" ] || [ ! -d "$target/val" ]; then
        find_python
    fi
    [ -z "$md5" ] || check_md5

    members=$(tar -tf "$source/$train_name" | grep '\.tar$') ||
        die "$source/$train_name does not list as an archive of class archives"
    [ "$(wc -l <<<"$members")" -eq "$classes" ] ||
        die "$source/$train_name holds $(wc -l <<<"$members") class archives, expected $classes"
    for member in $members; do
        [ -d "$target/train/$(basename "$member" .tar)" ] || missing=$((missing + 1))
    done
    need=$(($(kilobytes "$source/$train_name") * missing / classes))
    [ -d "$target/val" ] || need=$((need + $(kilobytes "$source/$val_name")))
    check_space "$need"

    printf 'train: %d of %d classes to extract\n' "$missing" "$classes"
    extract_train "$members"
    if [ ! -d "$target/val" ]; then
        printf 'val: extracting\n'
        extract_val
    fi
    check
}

mode=prepare
md5=
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help)
        usage
        exit 0
        ;;
    --check) mode=check ;;
    --md5) md5=yes ;;
    -*) die "unknown option $1; see $program --help" ;;
    *) break ;;
    esac
    shift
done

if [ "$mode" = check ]; then
    [ $# -eq 1 ] || die "--check takes TARGET_DIR; see $program --help"
    target=${1%/}
    check
else
    [ $# -eq 2 ] || die "expected SOURCE_DIR and TARGET_DIR; see $program --help"
    source=${1%/}
    target=${2%/}
    prepare
fi
