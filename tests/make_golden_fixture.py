"""Cut a folder of golden tensors down to the fixture that ``test_goldens.py`` reads.

    python tests/make_golden_fixture.py SOURCE [TARGET]

``SOURCE`` holds ``*.pt`` files computed with the authors' public implementation, each a mapping

- ``case``: ``manager``, the arguments of their warehouse manager, and ``layers``, one mapping
  ``type, i, o, k, s, p, d, g, bias, name`` a layer;
- ``warehouses``: the names of the warehouses, ``state_dict``: the parameters, ``one_hot``: beta;
- ``input``; ``outputs``: ``eval_tau{0.0, 0.3, 1.0}`` after each layer, ``train_tau0.3`` after the
  last; ``grads`` and ``grad_input`` of ``mean(output ** 2)`` in training.

Every file becomes one ``.npz`` without pickles. The parameters and the input are kept to the bit:
each is needed whole to compute anything. They are stored as four planes of bytes, which deflate far
better than floats do. What is only compared with is kept as a :func:`digest`: tensors of up to 512
elements whole, larger ones as every 13th element, with their largest magnitude and one projection
that depends on all elements. 13 divides no size here, so every row and channel is met.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FIXTURE = Path(__file__).parent / "fixtures" / "goldens"
WHOLE, STRIDE = 512, 13
TAUS = (0.0, 0.3, 1.0)


def digest(tensor: Tensor) -> np.ndarray:
    """``[largest magnitude, projection / sqrt(N), elements...]`` in float32.

    The projection is ``sum_i v_i cos(i)`` over all N elements: a change that the sample misses, or
    two elements that change places, show in it.
    """
    flat = tensor.detach().double().flatten()
    weights = torch.arange(len(flat), dtype=torch.float64).cos()
    head = torch.stack([flat.abs().max(), flat @ weights / math.sqrt(len(flat))])
    sample = flat if len(flat) <= WHOLE else flat[::STRIDE]
    return torch.cat([head, sample]).float().numpy()


def pack(tensors: dict[str, Tensor]) -> tuple[np.ndarray, list[list[Any]]]:
    """Floats as four planes of bytes, most alike with most alike; and their names and shapes."""
    layout: list[list[Any]] = [[name, list(t.shape)] for name, t in tensors.items()]
    flat = torch.cat([t.flatten() for t in tensors.values()]).numpy()
    return flat.view(np.uint8).reshape(-1, 4).T.copy(), layout


def unpack(planes: np.ndarray, layout: list[list[Any]]) -> dict[str, Tensor]:
    """The inverse of :func:`pack`."""
    flat = torch.from_numpy(planes.T.copy().view(np.float32).reshape(-1))
    parts = flat.split([math.prod(shape) for _, shape in layout])
    return {name: p.view(shape) for (name, shape), p in zip(layout, parts, strict=True)}


def make(source: Path, target: Path) -> None:
    """Write one file of the fixture."""
    golden = torch.load(source, weights_only=True)
    floats = {k: v for k, v in golden["state_dict"].items() if v.is_floating_point()}
    planes, layout = pack({**floats, "input": golden["input"]})
    about = {
        **golden["case"],
        "warehouses": golden["warehouses"],
        "layout": layout,
        "counters": {k: int(v) for k, v in golden["state_dict"].items() if k not in floats},
    }
    whole = [t for values in golden["outputs"].values() for t in values]
    sizes = {n for t in (*golden["grads"].values(), *whole) for n in t.shape}
    assert all(size % STRIDE for size in sizes), f"{STRIDE} divides one of {sizes}"
    arrays = {"about": np.array(json.dumps(about)), "planes": planes}
    for name, one_hot in golden["one_hot"].items():
        assert set(one_hot.unique().tolist()) <= {0.0, 1.0}
        arrays[f"one_hot/{name}"] = np.packbits(one_hot.numpy().astype(bool))
    for tau in TAUS:
        for i, output in enumerate(golden["outputs"][f"eval_tau{tau}"]):
            arrays[f"eval/{tau}/{i}"] = digest(output)
    arrays["train"] = digest(golden["outputs"]["train_tau0.3"])
    arrays["grad_input"] = digest(golden["grad_input"])
    for name, grad in golden["grads"].items():
        arrays[f"grad/{name}"] = digest(grad)
    np.savez_compressed(target, **arrays)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, nargs="?", default=FIXTURE)
    arguments = parser.parse_args()
    arguments.target.mkdir(parents=True, exist_ok=True)
    for path in sorted(arguments.source.glob("*.pt")):
        out = arguments.target / f"{path.stem}.npz"
        make(path, out)
        print(f"{out} {out.stat().st_size / 1024:.0f} KiB")
