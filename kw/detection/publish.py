"""A detector's run as a repository of the Hugging Face Hub.

Its ``config.py``, a program, is written anew: what a reader needs to build the detector, nothing of
this machine. ``kw pull --allow-code`` alone brings it back.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ..deploy.card import page, table
from ..deploy.description import DETECTION
from ..deploy.graph import DTYPES
from ..deploy.source import figures_of
from ..deploy.weights import FORMAT, cast
from ..hub import PROGRAM, RESULTS, WEIGHTS, split_name
from ..training.checkpoint import load_checkpoint
from ..training.trained import choose_weights, trained_file
from ..warehouse import find_warehouses
from .predictor import load


def write_detector(
    run: str | Path, folder: Path, plan: Any, has_results: bool
) -> tuple[dict[str, Any], str, list[str]]:
    """Write a detector's weights and configuration for a :class:`kw.deploy.publish.Plan`, and read
    both back.

    Returns:
        Its config.json, its card, which says whether the folder has results, and notes.
    """
    file = trained_file(run)
    chosen, state = choose_weights(load_checkpoint(file), file, plan.weights)
    trained = load(run)
    tensors = {
        k: v.clone().contiguous() for k, v in cast(dict(state), DTYPES[plan.precision]).items()
    }
    figures = figures_of(trained.meta, chosen)
    about = {"of": chosen, "epoch": trained.meta.get("epoch"), "metrics": figures}
    parts = {"classes": trained.classes, "weights": about}
    header = {name: json.dumps(part, ensure_ascii=False) for name, part in parts.items()}
    header |= {"task": DETECTION, **FORMAT}
    save_file(tensors, folder / WEIGHTS, header)
    (folder / PROGRAM).write_text(trained.config.to_python(places=False), encoding="utf-8")
    detector = load(folder).detector  # refuses weights that do not fit
    warehouses = find_warehouses(detector)
    cells = sum(warehouse.partition.cells for warehouse in warehouses)
    rows: dict[str, object] = {
        "detector (mmdetection)": str(trained.config.model["type"]),
        "parameters": f"{sum(p.numel() for p in detector.parameters()):,}",
        "warehouses": f"{len(warehouses)}, {cells} cells",
        "weights": "moving average" if chosen == "ema" else "the model's own",
        "categories": ", ".join(trained.classes),
        "results": f"`{RESULTS}`" if has_results else "none; measure them: kw test",
    }
    repository, title = split_name(plan.name)[0], split_name(plan.name)[0].rpartition("/")[2]
    use = f"""\
`{PROGRAM}` is a program, which runs when the detector is loaded: read it first.

    kw pull {repository} FOLDER --allow-code
    kw predict FOLDER photos/"""
    text = page(title, WEIGHTS, {"Detector": table(rows), "Use": use})
    own = {"task": "detection", "weights": chosen}
    imports = (trained.config.custom_imports or {}).get("imports", [])
    modules = [imports] if isinstance(imports, str) else imports
    notes = [f"{PROGRAM} imports {', '.join(modules)}, which readers need too"] if modules else []
    return {"label_names": trained.classes, "kernelwarehouse": own}, text, notes
