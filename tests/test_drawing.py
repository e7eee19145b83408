"""Pictures of detections: drawn where they should be, on any image."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFont

from kw.detection import sheets
from kw.detection.drawing import (
    class_colour,
    contact_sheet,
    draw_detections,
    draw_ground_truth,
    side_by_side,
    to_rgb,
)
from kw.detection.segments import segmentation_mask

GREY = 90
CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 2, "name": "cat"}]


def blank(height: int = 60, width: int = 80) -> np.ndarray:
    return np.full((height, width, 3), GREY, np.uint8)


def changed(picture: Image.Image) -> np.ndarray:
    """Where a picture differs from the blank one."""
    return (np.asarray(picture) != GREY).any(2)


def pixel(picture: Image.Image, x: int, y: int) -> tuple[int, ...]:
    return tuple(np.asarray(picture)[y, x].tolist())


def test_boxes_stand_where_they_should() -> None:
    picture = draw_detections(blank(), [[20, 30, 50, 55]], [1], scale=1)
    for x, y in ((20, 40), (49, 40), (30, 54), (49, 54), (20, 54)):
        assert pixel(picture, x, y) == class_colour(1)
    for x, y in ((19, 40), (50, 40), (30, 55), (21, 40), (48, 40), (30, 53), (30, 45)):
        assert pixel(picture, x, y) == (GREY, GREY, GREY)
    rows = changed(picture).any(1).nonzero()[0]
    assert 10 < rows[0] < 18  # the label, above the box
    assert rows[-1] == 54


def test_enlarged_boxes_stand_where_they_should() -> None:
    picture = draw_detections(blank(), [[20, 30, 50, 55]], [1], scale=10)
    assert picture.size == (800, 600)
    columns = changed(picture)[400].nonzero()[0]
    assert columns.tolist() == [200, 201, 498, 499]
    assert draw_detections(blank(), [], []).size == (480, 360)
    assert draw_detections(blank(10, 2000), [], []).size == (2000, 10)


def test_masks_are_translucent_with_an_outline() -> None:
    mask = np.zeros((1, 60, 80), bool)
    mask[0, 20:50, 30:60] = True
    mask[0, 30:40, 40:50] = False
    picture = draw_detections(blank(), [[0, 0, 0, 0]], [0], masks=mask, scale=1)
    colour = class_colour(0)
    assert pixel(picture, 30, 45) == pixel(picture, 59, 20) == colour
    assert pixel(picture, 39, 35) == colour  # around the hole as well
    assert pixel(picture, 45, 35) == pixel(picture, 29, 45) == (GREY, GREY, GREY)
    inside = np.array(pixel(picture, 34, 45))
    assert (np.minimum(colour, GREY) <= inside).all()
    assert (inside <= np.maximum(colour, GREY)).all()
    assert 0 < abs(int(inside[0]) - GREY) < abs(colour[0] - GREY)


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (64, 64), (37, 900), (500, 700)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "I;16", "F"])
def test_any_image_with_any_boxes(size: tuple[int, int], mode: str) -> None:
    height, width = size
    if mode in ("I;16", "F"):
        image = Image.new(mode, (width, height))
    else:
        image = Image.fromarray(blank(height, width)).convert(mode)
    before = image.tobytes()
    boxes = [
        [0, 0, width, height],
        [-50, -50, 2, 2],
        [width - 2, height - 1, width + 40, height + 9],
        [-9e9, -9e9, 9e9, 9e9],
        [1, 1, 1, 1],
        [3, 3, 2, 2],  # corners of a network that has learnt nothing
        [width + 30, 0, width + 60, 5],
    ]
    masks = np.random.RandomState(0).rand(len(boxes), height, width) < 0.5
    picture = draw_detections(image, boxes, range(len(boxes)), np.linspace(0, 1, 7), masks)
    assert picture.mode == "RGB"
    assert picture.width % width == picture.height % height == 0
    assert max(picture.size) >= 480
    assert image.tobytes() == before


def test_boxes_out_of_sight_leave_no_trace() -> None:
    boxes = [[100, 10, 130, 20], [-40, 10, -20, 20], [10, -30, 20, -9], [10, 70, 20, 99]]
    assert not changed(draw_detections(blank(), boxes, [0] * 4, scale=1)).any()
    # Of a box that is cut, the edges beyond the image are not drawn at its border.
    picture = draw_detections(blank(), [[-20, 30, 40, 90]], [1], scale=1)
    assert not changed(picture)[31:50, :39].any()
    assert changed(picture)[31:, 39].all()


def test_input_is_not_modified() -> None:
    image = blank()
    mask = np.ones((1, 60, 80), np.uint8)
    box = np.array([[1.0, 2, 30, 40]])
    for scale in (1, 3):
        draw_detections(image, box, [0], [0.5], mask, scale=scale)
    assert (image == GREY).all()
    assert mask.all()
    assert box.tolist() == [[1, 2, 30, 40]]
    picture = Image.fromarray(image)
    to_rgb(picture).putpixel((0, 0), (0, 0, 0))
    assert pixel(picture, 0, 0) == (GREY, GREY, GREY)


def test_nothing_to_draw() -> None:
    empty: dict[str, Any] = {"scores": [], "masks": np.zeros((0, 60, 80)), "scale": 1}
    assert not changed(draw_detections(blank(), np.zeros((0, 4)), [], **empty)).any()
    assert not changed(draw_ground_truth(blank(), [], CATEGORIES, scale=1)).any()
    faint = draw_detections(
        blank(), [[5, 5, 20, 20]], [0], [0.2], score_threshold=0.3, scale=1, masks=None
    )
    assert not changed(faint).any()


def test_tensors_are_taken() -> None:
    torch = pytest.importorskip("torch")
    arguments = [[[5.0, 6, 20, 30]], [2], [0.75], np.ones((1, 60, 80), bool)]
    plain = draw_detections(blank(), *arguments)
    tensors = draw_detections(blank(), *(torch.as_tensor(value) for value in arguments))
    assert plain.tobytes() == tensors.tobytes()


def test_labels_name_class_and_score_and_keep_off_one_another() -> None:
    def label(**settings: Any) -> np.ndarray:
        return np.asarray(draw_detections(blank(), [[20, 30, 50, 55]], [1], scale=1, **settings))

    names = ["cat", "dog"]
    assert (label(classes=names) != label()).any()
    assert (label(classes=names, scores=[0.5]) != label(classes=names, scores=[0.51])).any()
    # Two boxes in one place have two labels in two places.
    twice = draw_detections(blank(), [[20, 25, 50, 45]] * 2, [0, 1], scale=4)
    first, second = ((np.asarray(twice) == class_colour(place)).all(2).sum() for place in range(2))
    assert min(first, second) > 100
    # A label too wide for the image begins at its left edge.
    wide = draw_detections(blank(), [[60, 30, 79, 50]], [0], classes=["x" * 99], scale=1)
    assert changed(wide)[:, 0].any()


def test_ground_truth_of_coco() -> None:
    square = {"size": [60, 80], "counts": [30 * 60 + 20, 10, 50, 10, 60 * 48 - 30 + 10]}
    square["counts"][-1] = 60 * 80 - sum(square["counts"][:-1])
    dog = {"bbox": [30, 20, 30, 35], "category_id": 7, "iscrowd": 0}
    plain = draw_ground_truth(blank(), [dog], CATEGORIES, scale=1)
    # Classes are in the order of the ids, whatever the file's: the dog is the second.
    assert pixel(plain, 30, 40) == pixel(plain, 59, 50) == class_colour(1)
    masked = draw_ground_truth(blank(), [{**dog, "segmentation": square}], CATEGORIES, scale=1)
    assert pixel(masked, 31, 25) == class_colour(1)
    shown = draw_ground_truth(
        blank(), [{**dog, "segmentation": square}], CATEGORIES, masks=False, scale=1
    )
    assert shown.tobytes() == plain.tobytes()
    crowd = draw_ground_truth(blank(), [{**dog, "iscrowd": 1}], CATEGORIES, scale=1)
    edge = changed(crowd)[20:55, 30]
    assert edge.any()
    assert not edge.all()
    with pytest.raises(KeyError):
        draw_ground_truth(blank(), [{**dog, "category_id": 1}], CATEGORIES)


def test_crowds_are_hatched() -> None:
    mask = np.ones((1, 60, 80), bool)
    boxes = [[0, 0, 80, 60]]
    whole = changed(draw_detections(blank(), boxes, [0], masks=mask, scale=1))
    hatched = changed(draw_detections(blank(), boxes, [0], masks=mask, scale=1, crowd=[1]))
    assert whole.all()
    assert 0.1 < hatched[20:, 20:].mean() < 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": [1, 2]}, r"labels are \[2\] for 1 boxes"),
        ({"scores": [1.0, 2.0]}, r"scores are \[2\] for 1 boxes"),
        ({"masks": np.ones((1, 5, 5))}, r"masks are \[1, 5, 5\] for an image of 60 x 80"),
        ({"boxes": [[0, 0, np.nan, 1]]}, "not finite"),
        ({"image": np.zeros((60, 80, 3))}, r"uint8 .*, not float64 \[60, 80, 3\]"),
        ({"image": np.zeros((3, 60, 80), np.uint8)}, r"not uint8 \[3, 60, 80\]"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], message: str) -> None:
    arguments = {"image": blank(), "boxes": [[0, 0, 5, 5]], "labels": [0], **settings}
    with pytest.raises(ValueError, match=message):
        draw_detections(**arguments)


def test_colours_of_classes_differ() -> None:
    colours = [class_colour(label) for label in range(200)]
    assert len(set(colours)) == 200
    first = np.array(colours[:10], int)
    distances = np.abs(first[:, None] - first[None]).sum(2) + 999 * np.eye(10, dtype=int)
    assert distances.min() > 90


def test_sheets() -> None:
    left, right = Image.new("RGB", (40, 30), "red"), Image.new("L", (20, 50))
    pair = side_by_side(left, right, ("", ""), gap=10)
    assert pair.size == (70, 50)
    assert [pixel(pair, x, 20) for x in (39, 45, 50)] == [(255, 0, 0), (255,) * 3, (0,) * 3]
    assert pixel(pair, 5, 40) == (255, 255, 255)
    titled = side_by_side(left, right, ("a long title", "b"))
    assert titled.height > 60
    assert titled.width > pair.width
    assert np.asarray(titled)[:12].min() < 60

    sheet = contact_sheet([left, right, left, right, left], columns=2, gap=4)
    assert sheet.size == (2 * 44 + 4, 3 * 54 + 4)
    assert pixel(sheet, 4, 4) == pixel(sheet, 5, 4 + 54) == (255, 0, 0)
    assert pixel(sheet, 50, 140) == (255, 255, 255)
    assert contact_sheet([left], columns=4, gap=0).size == (40, 30)
    with pytest.raises(ValueError, match="not 0 and 4"):
        contact_sheet([])


def test_without_freetype(monkeypatch: pytest.MonkeyPatch) -> None:
    bitmap = ImageFont.load_default_imagefont()

    def load_default(size: float | None = None) -> Any:
        if size is not None:
            raise ImportError("The _imagingft C module is not installed")
        return bitmap

    monkeypatch.setattr(ImageFont, "load_default", load_default)
    sheets.load_font.cache_clear()
    try:
        assert changed(draw_detections(blank(), [[9, 30, 50, 55]], [1], [0.5], scale=1)).any()
    finally:
        sheets.load_font.cache_clear()


def test_segmentations_of_every_form() -> None:
    polygons = [[10, 5, 30, 5, 30, 25, 10, 25], [40, 10, 50, 10, 50, 30, 40, 30]]
    mask = segmentation_mask(polygons, 60, 80)
    assert mask.shape == (60, 80)
    assert mask[6:24, 11:29].all()
    assert mask[12:29, 41:49].all()
    assert not mask[:, 32:39].any()
    assert not segmentation_mask([[1, 2, 3, 4]], 60, 80).any()
    wanted = "run lengths of size .* are not those of an image of height 60 and width 80"
    for counts in ([5], "0", "~"):
        with pytest.raises(ValueError, match=wanted):
            segmentation_mask({"size": [60, 80], "counts": counts}, 60, 80)
    with pytest.raises(ValueError, match="a list or a mapping"):
        segmentation_mask("polygon", 60, 80)


def test_segmentations_agree_with_pycocotools() -> None:
    api = pytest.importorskip("pycocotools.mask")
    noise = np.random.RandomState(0).rand(60, 80) < 0.3
    coded = api.encode(np.asfortranarray(noise.astype(np.uint8)))
    text = {**coded, "counts": coded["counts"].decode()}
    assert (segmentation_mask(coded, 60, 80) == noise).all()
    assert (segmentation_mask(text, 60, 80) == noise).all()
    polygon = [10.3, 5.2, 33.9, 9.7, 20.5, 44.1]
    exact = api.decode(api.frPyObjects([polygon], 60, 80)[0])
    assert (segmentation_mask([polygon], 60, 80) != exact).sum() < 60


def test_nothing_of_mmdetection_is_imported() -> None:
    """Pictures need Pillow and NumPy: they are drawn where mmdetection is not installed."""
    program = (
        "import sys\n"
        "for name in ('mmdet', 'mmcv', 'cv2', 'matplotlib', 'pycocotools', 'faster_coco_eval'):\n"
        "    sys.modules[name] = None\n"
        "import importlib.util\n"
        "importlib.util.find_spec = lambda name, package=None: None\n"
        "from kw.detection.drawing import draw_detections\n"
        "from PIL import Image\n"
        "draw_detections(Image.new('RGB', (9, 9)), [[1, 1, 5, 5]], [0], [0.5])\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
