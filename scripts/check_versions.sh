#!/usr/bin/env bash
# Install the package with chosen versions of its requirements in fresh environments; run the tests.
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
    cat <<TEXT
usage: $(basename "$0") lowest|tested|newest|nightly [PYTHON]...

    lowest    of each requirement the lowest version that setup.cfg allows, extras' too
    tested    the versions of constraints.txt
    newest    the newest versions that setup.cfg allows
    nightly   the same, with last night's torch and torchvision

PYTHON is an interpreter, e.g. python3.10 (default: python3.10 to python3.13, those that are found;
of lowest, the first of them). An environment takes up to 9 GB and is removed at the end.

    TORCH_INDEX   a package index to take torch and torchvision from first, e.g.
                  https://download.pytorch.org/whl/cpu, whose files are small
    TESTS         files to run (default: all that are not slow)
TEXT
    exit $(($# == 0 ? 2 : 0))
fi

versions=$1
shift
pythons=("$@")
if [[ $# -eq 0 ]]; then
    for python in python3.1{0..3}; do
        "$python" --version >/dev/null 2>&1 && pythons+=("$python")
    done
    if [[ ${#pythons[@]} -eq 0 ]]; then
        echo "$(basename "$0"): no python3.10 to python3.13 here: name an interpreter" >&2
        exit 2
    fi
    [[ $versions == lowest ]] && pythons=("${pythons[@]:0:1}")
fi
read -ra tests <<<"${TESTS:-tests}"

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
limits=$folder/constraints.txt
index=(${TORCH_INDEX:+--index-url "$TORCH_INDEX"})
case $versions in
    lowest) sed -n '/^install_requires/,/^docs/s/^ *\([a-z_-]*\)>=\([0-9.]*\).*/\1==\2/p' setup.cfg >"$limits" ;;
    tested) cp constraints.txt "$limits" ;;
    newest) : >"$limits" ;;
    nightly)
        : >"$limits"
        index=(--pre --index-url https://download.pytorch.org/whl/nightly/cpu)
        ;;
    *)
        echo "$(basename "$0"): $versions: expected lowest, tested, newest or nightly" >&2
        exit 2
        ;;
esac

for python in "${pythons[@]}"; do
    echo "== $versions, $("$python" --version)"
    "$python" -m venv "$folder/env"
    pip=("$folder/env/bin/python" -m pip install --quiet --no-cache-dir --constraint "$limits")
    [[ ${#index[@]} -eq 0 ]] || "${pip[@]}" "${index[@]}" torch torchvision
    "${pip[@]}" ".[demo,detection,export,jpeg,tiff]" pytest pytest-xdist
    "$folder/env/bin/python" -m pip list --format freeze |
        grep -Ei '^(torch|torchvision|timm|numpy|pillow|PyYAML)=='
    "$folder/env/bin/python" -m pytest -q --numprocesses 2 --dist worksteal "${tests[@]}"
    rm -rf "$folder/env"
done
