"""Pictures of the test images: detections beside annotations."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from PIL import Image

from ..config import ConfigError
from ..data import BadImageError, DataError
from ..errors import OutOfMemory, one_line, say, writing
from ..objects.drawing import contact_sheet, draw_annotations, side_by_side
from .annotations import ids_of, load_annotations
from .sets import check_test_annotations, trained_classes

if TYPE_CHECKING:
    from .config import DetectorConfig

TITLES = ("predicted", "annotated")
_SHEET_WIDTH = 640  # of a pair of pictures on the sheet, pixels: a thousand pairs fit in memory


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
        out: folder for the pictures, which have the names of their images
            (:func:`picture_names`), and for ``sheet.png``.
        images: number of pictures, of the first test images that can be read and drawn; a message
            names the others.
        score: detections below this score are left out.

    Returns:
        The pictures, the sheet last.

    Raises:
        ConfigError, DataError, CheckpointError: as for :func:`kw.detection.evaluate_checkpoint`.
    """
    from .predictor import Predictor  # brings in mmdetection, which the names need not

    if images < 1:
        raise ConfigError(f"--images {images}: expected at least 1")
    data = config.run.data
    truth = load_annotations(Path(data.root, data.val_annotations))
    predictor = Predictor(config, checkpoint)
    trained = {"meta": {"classes": predictor.classes}}
    classes = trained_classes(trained, data, f"checkpoint {checkpoint}")
    if data.check:
        check_test_annotations(data, predictor.has_masks, classes).raise_for_errors()
    names_of = dict(zip(ids_of(classes, truth, data.val_annotations), classes, strict=True))
    objects = defaultdict(list)
    for each in truth["annotations"]:
        if each["category_id"] in names_of:
            # Masks that the detector does not find are not checked either.
            shown = each if predictor.has_masks else {**each, "segmentation": None}
            objects[each["image_id"]].append(shown)
    files = [Path(data.root, data.val_images, image["file_name"]) for image in truth["images"]]
    names = picture_names([image["file_name"] for image in truth["images"]])
    refuse_overwriting(out, names, files, [Path(data.root, data.val_images)])
    folder = Path(out)
    paths: list[Path] = []
    sheet = []
    for image, file, name in zip(truth["images"], files, names, strict=True):
        if len(paths) == images:
            break
        try:
            picture, found = predictor.read(file), predictor.predict(file, score)
        except (BadImageError, OutOfMemory) as error:
            say(str(error))
            continue
        try:
            annotated = draw_annotations(picture, objects[image["id"]], names_of)
        except (KeyError, TypeError, ValueError) as error:
            say(f"{file}: its annotations do not fit it ({one_line(error)})")
            continue
        pair = side_by_side(predictor.draw(picture, found), annotated, TITLES)
        paths.append(folder / name)
        save_picture(pair, paths[-1])
        pair.thumbnail((_SHEET_WIDTH, _SHEET_WIDTH))
        sheet.append(pair)
    if not sheet:
        raise DataError(f"{data.val_annotations}: none of its images can be read and drawn")
    paths.append(folder / "sheet.png")
    save_picture(contact_sheet(sheet), paths[-1])
    return paths


def picture_names(files: Sequence[str]) -> list[str]:
    """A different name for the picture of each image file, also on disks that ignore case.

    ``cam0/1.jpg`` becomes ``cam0/1.png``. If two files would get the same name, ``.png`` is
    appended to their own names, and a number to names that are still equal. ``..`` and the root of
    a path are left out.
    """
    paths = [_below(file) for file in files]
    count = Counter(str(path.with_suffix(".png")).lower() for path in paths)
    taken = {"sheet.png"}
    names = []
    for path in paths:
        name, number = str(path.with_suffix(".png")), 1
        if count[name.lower()] > 1 or name.lower() in taken:
            name = f"{path}.png"
        while name.lower() in taken:
            number += 1
            name = f"{path}.{number}.png"
        taken.add(name.lower())
        names.append(name)
    return names


def _below(file: str) -> PurePosixPath:
    path = PurePosixPath(file)
    parts = [part for part in path.parts if part not in ("..", path.anchor)]
    return PurePosixPath(*parts) if parts else PurePosixPath("image")


def refuse_overwriting(
    out: str | Path, names: Iterable[str], files: Iterable[Path], folders: Iterable[Path]
) -> None:
    """Refuse to draw the pictures ``names`` of ``out`` over the images, or into a folder that is
    searched for images.

    Raises:
        DataError: a picture would be one of the images, or in one of the folders.
    """
    target = Path(out).resolve()
    pictures = [target / name for name in names]
    for folder in filter(Path.is_dir, folders):
        inside = [each for each in (target, *pictures) if each.is_relative_to(folder.resolve())]
        if inside:
            what = out if inside[0] == target else inside[0]
            raise DataError(f"{what} lies in {folder}, which holds the images: choose another")
    images = {file.resolve() for file in files}
    if written := sorted(images.intersection(pictures)):
        raise DataError(f"{written[0]} is one of the images: choose another folder")


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture, in a new folder if necessary; a DataError says why it cannot be."""
    with writing(path, DataError):
        picture.save(path)
