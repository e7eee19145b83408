"""What a detector finds in the test images, drawn beside what is annotated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..config import ConfigError
from ..data import DataError, stop_workers
from ..engine import load_checkpoint, load_network
from ..engine.distributed import find_process
from .annotations import load_annotations
from .config import DetectorConfig
from .data import build_eval_loader
from .detector import build_detector, without_weights
from .drawing import draw_detections, draw_ground_truth
from .sets import trained_classes
from .sheets import contact_sheet, side_by_side

__all__ = ["write_pictures"]


@torch.no_grad()
def write_pictures(
    config: DetectorConfig,
    checkpoint: str | Path,
    out: str | Path,
    images: int = 12,
    score: float = 0.5,
) -> list[Path]:
    """Write one picture an image, predicted left and annotated right, and a sheet of all.

    Args:
        config: detector and data.
        checkpoint: a file that training wrote; its moving average where it has one.
        out: folder for ``<image name>.png`` and ``sheet.png``; made if it is not there.
        images: the first so many test images.
        score: detections below are left out.

    Returns:
        The pictures, the sheet last.

    Raises:
        ConfigError, DataError, CheckpointError: as for :func:`kw.detection.evaluate_checkpoint`.
    """
    if images < 1:
        raise ConfigError(f"--images {images}: expected at least 1")
    state = load_checkpoint(checkpoint)
    device = find_process("none").device
    classes = trained_classes(state, config.run.data, f"checkpoint {checkpoint}")
    detector = build_detector(without_weights(config.model), classes)
    load_network(detector, state.get("ema_state_dict", state["state_dict"]), str(checkpoint))
    detector.to(device).eval()
    data = config.run.data
    truth = load_annotations(Path(data.root, data.val_annotations))
    categories = [c for c in truth["categories"] if c["name"] in classes]
    ids = {category["id"] for category in categories}
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--out {folder}: {error.strerror}") from error
    loader: Any = build_eval_loader(config, classes, 0, 1)
    paths: list[Path] = []
    sheet = []
    for batch in loader:
        for sample in detector.val_step(batch):
            if len(paths) == images:
                break
            info = loader.dataset.dataset.get_data_info(len(paths))
            with Image.open(info["img_path"]) as opened:
                image = opened.convert("RGB")
            objects = [
                each
                for each in truth["annotations"]
                if each["image_id"] == sample.img_id and each["category_id"] in ids
            ]
            annotated = draw_ground_truth(image, objects, categories)
            pair = side_by_side(_draw(image, sample, classes, score), annotated, TITLES)
            paths.append(folder / f"{Path(info['img_path']).stem}.png")
            pair.save(paths[-1])
            sheet.append(pair)
        if len(paths) == images:
            break
    stop_workers(loader)
    paths.append(folder / "sheet.png")
    contact_sheet(sheet, columns=2).save(paths[-1])
    return paths


TITLES = ("predicted", "annotated")


def _draw(image: Image.Image, sample: Any, classes: list[str], score: float) -> Image.Image:
    found = sample.pred_instances
    masks = found.masks.cpu().numpy() if "masks" in found else None
    boxes, scores = found.bboxes.cpu().numpy(), found.scores.cpu().numpy()
    labels = found.labels.cpu().numpy()
    return draw_detections(image, boxes, labels, scores, masks, classes, score_threshold=score)
