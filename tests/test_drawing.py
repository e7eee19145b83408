"""Pictures of detections: drawn where they should be, on any image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kw.objects import drawing
from kw.objects.drawing import (
    class_colour,
    contact_sheet,
    draw_annotations,
    draw_objects,
    side_by_side,
)
from kw.objects.run_lengths import segmentation_mask

GREY = 90
CLASSES = {2: "cat", 7: "dog"}


def blank(height: int = 360, width: int = 480) -> Image.Image:
    return Image.new("RGB", (width, height), (GREY, GREY, GREY))


def changed(picture: Image.Image) -> np.ndarray:
    """Where a picture differs from the blank one."""
    return (np.asarray(picture) != GREY).any(2)


def pixel(picture: Image.Image, x: int, y: int) -> tuple[int, ...]:
    return tuple(np.asarray(picture)[y, x].tolist())


def test_boxes_stand_where_they_should() -> None:
    picture = draw_objects(blank(), [[20, 30, 50, 55]], [1], ["dog"])
    for x, y in ((20, 40), (49, 40), (30, 54), (49, 54), (20, 54)):
        assert pixel(picture, x, y) == class_colour(1)
    for x, y in ((19, 40), (50, 40), (30, 55), (22, 40), (47, 40), (30, 52), (30, 45)):
        assert pixel(picture, x, y) == (GREY, GREY, GREY)
    rows = changed(picture).any(1).nonzero()[0]
    assert 10 < rows[0] < 18  # the label, above the box
    assert rows[-1] == 54


def test_small_images_are_enlarged() -> None:
    picture = draw_objects(blank(60, 80), [[20, 30, 50, 55]], [1], ["dog"])
    assert picture.size == (480, 360)
    assert changed(picture)[250].nonzero()[0].tolist() == [120, 121, 298, 299]
    assert draw_objects(blank(10, 2000), [], [], []).size == (2000, 10)


def test_masks_are_translucent() -> None:
    mask = np.zeros((1, 360, 480), bool)
    mask[0, 20:50, 30:60] = True
    mask[0, 30:40, 40:50] = False
    picture = draw_objects(blank(), [[0, 300, 9, 309]], [0], [""], mask)
    colour = class_colour(0)
    assert pixel(picture, 45, 35) == pixel(picture, 29, 45) == (GREY, GREY, GREY)
    inside = np.array(pixel(picture, 34, 45))
    assert pixel(picture, 30, 20) == pixel(picture, 59, 49) == tuple(inside)
    assert (np.minimum(colour, GREY) <= inside).all()
    assert (inside <= np.maximum(colour, GREY)).all()
    assert 0 < abs(int(inside[0]) - GREY) < abs(colour[0] - GREY)


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (64, 64), (37, 900), (500, 700)])
def test_any_image_with_any_boxes(size: tuple[int, int]) -> None:
    height, width = size
    image = blank(height, width)
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
    picture = draw_objects(image, boxes, range(len(boxes)), ["name"] * len(boxes), masks)
    assert picture.mode == "RGB"
    assert picture.width % width == picture.height % height == 0
    assert max(picture.size) >= 480
    assert not changed(image).any()


def test_boxes_out_of_sight_leave_no_trace() -> None:
    boxes = [[600, 10, 630, 20], [-40, 10, -20, 20], [10, -30, 20, -9], [10, 370, 20, 399]]
    assert not changed(draw_objects(blank(), boxes, [0] * 4, ["x"] * 4)).any()
    # Of a box that is cut, the edges beyond the image are not drawn at its border.
    picture = draw_objects(blank(), [[-20, 300, 40, 390]], [1], ["x"])
    assert not changed(picture)[320:350, :38].any()
    assert changed(picture)[301:, 39].all()


def test_nothing_to_draw() -> None:
    assert not changed(draw_objects(blank(), np.zeros((0, 4)), [], [], [])).any()
    assert not changed(draw_annotations(blank(), [], CLASSES)).any()


def test_tensors_are_taken() -> None:
    torch = pytest.importorskip("torch")
    boxes, labels, mask = [[5.0, 6, 20, 30]], [2], np.ones((1, 360, 480), bool)
    plain = draw_objects(blank(), boxes, labels, ["x"], mask)
    tensors = draw_objects(
        blank(), torch.tensor(boxes), torch.tensor(labels), ["x"], torch.as_tensor(mask)
    )
    assert plain.tobytes() == tensors.tobytes()


def test_labels_are_inside_and_keep_off_one_another() -> None:
    def label(text: str) -> bytes:
        return draw_objects(blank(), [[20, 30, 50, 55]], [1], [text]).tobytes()

    assert len({label("dog"), label("cat"), label("dog 0.50"), label("dog 0.51")}) == 4
    # Two boxes in one place have two labels in two places.
    twice = draw_objects(blank(), [[80, 100, 200, 180]] * 2, [0, 1], ["dog", "cat"])
    first, second = (
        (np.asarray(twice) == class_colour(place)).all(2)[:140, 84:196].sum() for place in range(2)
    )
    assert min(first, second) > 100
    # Labels of boxes at the borders are as wide and high as one in the middle.
    full = changed(draw_objects(blank(), [[200, 200, 201, 201]], [0], ["category"])).sum()
    for box in ([479, 0, 480, 1], [0, 0, 1, 1], [479, 359, 480, 360]):
        drawn = changed(draw_objects(blank(), [box], [0], ["category"])).sum()
        assert full - 9 <= drawn <= full  # the box may lie below its label
    # A label too wide for the image begins at its left edge.
    wide = draw_objects(blank(), [[460, 130, 479, 150]], [0], ["x" * 99])
    assert changed(wide)[:, 0].any()


def test_ground_truth_of_coco() -> None:
    counts = [40 * 360 + 30, 10, 350, 10]
    square = {"size": [360, 480], "counts": [*counts, 360 * 480 - sum(counts)]}
    dog = {"bbox": [30, 20, 30, 35], "category_id": 7, "iscrowd": 0}
    plain = draw_annotations(blank(), [dog], CLASSES)
    assert pixel(plain, 30, 40) == pixel(plain, 59, 50) == class_colour(1)
    masked = draw_annotations(blank(), [{**dog, "segmentation": square}], CLASSES)
    differs = (np.asarray(masked) != np.asarray(plain)).any(2)
    assert differs[30:40, 40:42].all()
    assert differs.sum() == 20
    crowd = draw_annotations(blank(), [{**dog, "iscrowd": 1}], CLASSES)
    assert changed(crowd).sum() > changed(plain).sum()  # the name is longer
    with pytest.raises(ValueError, match="1 is not in list"):
        draw_annotations(blank(), [{**dog, "category_id": 1}], CLASSES)


@pytest.mark.parametrize(
    "settings",
    [
        {"labels": [1, 2]},
        {"texts": ["x", "y"]},
        {"masks": np.ones((2, 360, 480), bool)},
        {"boxes": [[0, 0, np.nan, 1]]},
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any]) -> None:
    arguments = {"boxes": [[0, 0, 5, 5]], "labels": [0], "texts": ["x"], **settings}
    with pytest.raises(ValueError, match=r"shorter|longer|not finite"):
        draw_objects(blank(), **arguments)


def test_colours_of_classes_differ() -> None:
    colours = [class_colour(label) for label in range(200)]
    assert len(set(colours)) == 200
    first = np.array(colours[:10], int)
    distances = np.abs(first[:, None] - first[None]).sum(2) + 999 * np.eye(10, dtype=int)
    assert distances.min() > 90


def test_names_of_other_scripts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pillow's own font has ASCII alone; without another, squares are drawn, with a message."""
    found = Path(pytest.importorskip("matplotlib").get_data_path()) / "fonts/ttf/DejaVuSans.ttf"

    def drawn(*texts: str) -> list[bytes]:
        boxes = [[100, 100, 200, 200]]
        return [draw_objects(blank(), boxes, [0], [text]).tobytes() for text in texts]

    for fonts, unlike in ((["none.ttf"], False), (["none.ttf", str(found)], True)):
        monkeypatch.setattr(drawing, "_FONTS", fonts)
        drawing._with_all.cache_clear()
        for one, other in (("\u0448", "\u0449"), ("caf\u00e9", "caf\u00e8")):
            assert (len({*drawn(one, other)}) == 2) == unlike
        assert capsys.readouterr().err.count("names are drawn with squares") == (not unlike)
    drawing._with_all.cache_clear()
    assert drawn("cat", "dog 7%") == drawn("cat", "dog 7%")
    assert drawing._with_all.cache_info().misses == 1


def test_sheets() -> None:
    left, right = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (20, 50))
    pair = side_by_side(left, right, ("", ""), gap=10)
    bar = pair.height - 50
    assert pair.width == 70
    assert [pixel(pair, x, bar + 20) for x in (39, 45, 50)] == [(255, 0, 0), (255,) * 3, (0,) * 3]
    assert pixel(pair, 5, bar + 40) == (255, 255, 255)
    titled = side_by_side(left, right, ("a long title", "b"))
    assert titled.width > pair.width
    assert np.asarray(titled)[:bar].min() < 60
    assert pixel(titled, 0, bar) == (255, 0, 0)  # the title is above the picture, not on it

    sheet = contact_sheet([left, right, left, right, left], columns=2, gap=4)
    assert sheet.size == (2 * 44 + 4, 3 * 54 + 4)
    assert pixel(sheet, 4, 4) == pixel(sheet, 5, 4 + 54) == (255, 0, 0)
    assert pixel(sheet, 50, 140) == (255, 255, 255)
    assert contact_sheet([left], columns=4, gap=0).size == (40, 30)


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
