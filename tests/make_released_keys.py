"""Pack the key lists of the authors' released checkpoints into the fixture that tests read.

    python tests/make_released_keys.py SOURCE [TARGET]

``SOURCE`` holds one ``CONFIG.json`` for each configuration that they released (github.com/OSVAI/
KernelWarehouse; 15 KernelWarehouse networks and 5 static ones), written with their public code:
``parameters``, their number; ``warehouse_names``, in the order in which the cells are numbered;
``state``, the shape of every tensor by its name, in the order of their ``state_dict()``. The
fixture is all of them in one file, xz-compressed JSON.
"""

from __future__ import annotations

import argparse
import json
import lzma
from pathlib import Path

FIXTURE = Path(__file__).parent / "fixtures" / "released_keys.json.xz"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, nargs="?", default=FIXTURE)
    arguments = parser.parse_args()
    keys = {}
    for path in sorted(arguments.source.glob("*.json")):
        content = json.loads(path.read_text())
        keys[path.stem] = {k: content[k] for k in ("parameters", "warehouse_names", "state")}
    packed = lzma.compress(json.dumps(keys, separators=(",", ":")).encode(), preset=9)
    arguments.target.write_bytes(packed)
    print(f"{arguments.target} {len(keys)} configurations, {len(packed) / 1024:.1f} KiB")


if __name__ == "__main__":
    main()
