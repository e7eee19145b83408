"""What a detector finds in the test images, drawn beside what is annotated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from PIL import Image

from ..config import ConfigError
from ..data import BadImageError, DataError
from ..errors import say
from .annotations import load_annotations
from .config import DetectorConfig
from .drawing import draw_ground_truth
from .predictor import Predictor
from .sets import trained_classes
from .sheets import contact_sheet, side_by_side

__all__ = ["picture_names", "save_picture", "write_pictures"]

TITLES = ("predicted", "annotated")


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
        out: folder for the pictures, named as the images are (see :func:`picture_names`), and
            ``sheet.png``; made if it is not there.
        images: the first so many test images that can be read; others are said.
        score: detections below are left out.

    Returns:
        The pictures, the sheet last.

    Raises:
        ConfigError, DataError, CheckpointError: as for :func:`kw.detection.evaluate_checkpoint`.
    """
    if images < 1:
        raise ConfigError(f"--images {images}: expected at least 1")
    data = config.run.data
    truth = load_annotations(Path(data.root, data.val_annotations))
    predictor = Predictor(config, checkpoint)
    trained = {"meta": {"classes": predictor.classes}}
    classes = trained_classes(trained, data, f"checkpoint {checkpoint}", truth)
    categories = [c for c in truth["categories"] if c["name"] in classes]
    ids = {category["id"] for category in categories}
    names = picture_names([image["file_name"] for image in truth["images"]])
    folder = Path(out)
    paths: list[Path] = []
    sheet = []
    for image, name in zip(truth["images"], names, strict=True):
        if len(paths) == images:
            break
        file = Path(data.root, data.val_images, image["file_name"])
        try:
            picture = predictor.read(file)
        except BadImageError as error:
            say(str(error))
            continue
        objects = [
            each
            for each in truth["annotations"]
            if each["image_id"] == image["id"] and each["category_id"] in ids
        ]
        drawn = predictor.draw(file, predictor.predict(file, score))
        pair = side_by_side(drawn, draw_ground_truth(picture, objects, categories), TITLES)
        paths.append(folder / name)
        save_picture(pair, paths[-1])
        sheet.append(pair)
    if not sheet:
        raise DataError(f"{data.val_annotations}: none of its images can be read")
    paths.append(folder / "sheet.png")
    save_picture(contact_sheet(sheet, columns=2), paths[-1])
    return paths


def picture_names(files: Sequence[str]) -> list[str]:
    """Names of pictures for image files, none twice, below a folder.

    ``cam0/1.jpg`` becomes ``cam0/1.png``; where two files would get one name, both keep theirs and
    get ``.png`` behind it. ``..`` and the root of a path are left out.
    """
    safe = [_below(file) for file in files]
    taken = Counter(str(path.with_suffix(".png")).lower() for path in safe)
    named = []
    for path in safe:
        short = path.with_suffix(".png")
        is_free = taken[str(short).lower()] == 1 and str(short) != "sheet.png"
        named.append(str(short if is_free else path) + ("" if is_free else ".png"))
    return named


def _below(file: str) -> PurePosixPath:
    path = PurePosixPath(file)
    parts = [part for part in path.parts if part not in ("..", path.anchor)]
    return PurePosixPath(*parts)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture, in a folder that is made if need be.

    Raises:
        DataError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
