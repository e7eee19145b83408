"""What the check of an annotated set finds, one fault at a time."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kw.config.run_schema import BadImagesConfig
from kw.data import DataError
from kw.detection.annotations import (
    category_ids,
    check_annotations,
    load_annotations,
)
from kw.detection.findings import KINDS, Report
from kw.detection.schema import CocoDataConfig

Content = dict[str, Any]
Fault = Callable[[Content, Path], None]
WIDTH, HEIGHT = 60, 40


def sound() -> Content:
    """Five images of three categories, an object each, one of them a crowd; nothing is wrong."""
    annotations = []
    for i in range(4):
        left, top, right, bottom = 5 + i, 6, 25 + i, 20
        annotations.append(
            {
                "id": 10 + i,
                "image_id": 1 + i,
                "category_id": (9, 3, 7, 3)[i],
                "bbox": [left, top, right - left, bottom - top],
                "area": (right - left) * (bottom - top),
                "iscrowd": 0,
                "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
            }
        )
    runs = {"size": [HEIGHT, WIDTH], "counts": [400, 800, WIDTH * HEIGHT - 1200]}
    crowd = {"image_id": 5, "category_id": 9, "bbox": [10, 0, 20, 40], "iscrowd": 1}
    annotations.append({"id": 14, "area": 800, "segmentation": runs, **crowd})
    return {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT}
            for i in range(1, 6)
        ],
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in ((9, "cat"), (3, "dog"), (7, "eel"))],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The images of the sound set; each has pixels of its own."""
    (tmp_path / "images").mkdir()
    for i in range(1, 6):
        pixels = np.random.default_rng(i).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    return tmp_path


def check(content: Content, folder: Path, **options: Any) -> Report:
    file = folder / "annotations.json"
    file.write_text(json.dumps(content))
    return check_annotations(file, folder / "images", **options)


def found(report: Report) -> dict[str, int]:
    return {finding.kind: finding.count for finding in report.findings}


def test_a_sound_set(folder: Path) -> None:
    report = check(sound(), folder, classes=["cat", "dog", "eel"], read_images=True)
    assert report.findings == ()
    assert report.categories == ("dog", "eel", "cat")  # in the order of their ids
    assert (report.images, report.objects) == (5, 5)
    assert "5 images, 5 objects of 3 categories\n  nothing is wrong" in report.render()
    file = folder / "annotations.json"
    assert list(category_ids(load_annotations(file), str(file))) == ["dog", "eel", "cat"]
    report.raise_for_errors()


def test_a_file_is_read_once_while_its_content_is_in_use(folder: Path) -> None:
    file = folder / "annotations.json"
    file.write_text(json.dumps(sound()))
    held = load_annotations(file)
    assert check_annotations(str(file), folder / "images").objects == 5
    assert load_annotations(file) is held
    file.write_text(json.dumps({**sound(), "annotations": []}))
    assert load_annotations(file)["annotations"] == []


def change(table: str, place: int, **values: Any) -> Fault:
    """A fault: a row with other values; a value of None takes the key away."""

    def apply(content: Content, _: Path) -> None:
        row = content[table][place]
        row.update(values)
        for key in [key for key in values if values[key] is None]:
            del row[key]

    return apply


def image(**values: Any) -> Fault:
    return change("images", 1, **values)


def thing(**values: Any) -> Fault:
    return change("annotations", 1, **values)


def category(**values: Any) -> Fault:
    return change("categories", 1, **values)


def again(table: str, **values: Any) -> Fault:
    """A fault: the second row once more, with other values."""
    return lambda content, _: content[table].append({**copy.deepcopy(content[table][1]), **values})


def move(dx: float, dy: float) -> Fault:
    """A fault: the second object, box and polygon, somewhere else."""

    def apply(content: Content, _: Path) -> None:
        row = content["annotations"][1]
        row["bbox"] = [row["bbox"][0] + dx, row["bbox"][1] + dy, *row["bbox"][2:]]
        row["segmentation"] = [
            [value + (dx, dy)[i % 2] for i, value in enumerate(row["segmentation"][0])]
        ]

    return apply


def crowd(**values: Any) -> Fault:
    """A fault in the run lengths of the crowd."""
    return lambda content, _: content["annotations"][4]["segmentation"].update(values)


def file(name: str, make: Callable[[Path], object]) -> Fault:
    """A fault of an image's file."""
    return lambda _, folder: make(folder / "images" / name) and None


def turned(size: tuple[int, int], orientation: int) -> Callable[[Path], object]:
    def save(path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", size).save(path, exif=exif)

    return save


def corners(content: Content, _: Path) -> None:
    for i, row in enumerate(content["annotations"] * 3):
        x, y, w, h = 20 + i % 5, 15, 20, 20
        content["annotations"] += [{**row, "id": 100 + i, "bbox": [x, y, x + w, y + h]}]
        row["bbox"] = [x, y, x + w, y + h]


def every(**values: Any) -> Fault:
    """A fault of all objects; those of polygons are no crowds before."""

    def apply(content: Content, _: Path) -> None:
        runs = content["annotations"][4]["segmentation"]
        for row in content["annotations"]:
            row.update({"iscrowd": 0, "segmentation": runs, "bbox": [10, 0, 20, 40], "area": 800})
            row.update(values)

    return apply


def fractions(content: Content, _: Path) -> None:
    for row in content["annotations"]:
        x, y, w, h = row["bbox"]
        row["bbox"] = [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT]
        row["area"] = row["bbox"][2] * row["bbox"][3]
        row["segmentation"] = [[0, 0, 0.5, 0, 0.5, 0.5]]
        row["iscrowd"] = 0


def thin(content: Content, _: Path) -> None:
    polygon = [[6, 6, 6.5, 6, 6.5, 20, 6, 20]]
    content["annotations"][1].update(bbox=[6, 6, 0.5, 14], area=7, segmentation=polygon)


def float_tiff(path: Path) -> None:
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.float32)).save(path, "tiff")


def dogs(content: Content, _: Path) -> None:
    content["categories"].append({"id": 4, "name": "dog"})
    content["annotations"][3]["category_id"] = 4


SQUARE = [5, 5, 25, 5, 25, 25, 5, 25]
# kind of finding, fault, a part of its example; other kinds that it entails
FAULTS: list[tuple[Any, ...]] = [
    ("no-images", lambda content, _: content["images"].clear(), "", {"unknown-image"}),
    (
        "no-objects",
        lambda content, _: content["annotations"].clear(),
        "",
        {"image-empty", "category-unused"},
    ),
    ("missing-key", image(width=None), "image 2 lacks width"),
    ("missing-key", image(id=None), "image number 2 in the file lacks id", {"unknown-image"}),
    ("missing-key", thing(bbox=None, area=None), "11 lacks bbox, area"),
    ("missing-key", category(name=None), "category 3 lacks name"),
    ("bad-value", image(id="2"), "id is '2', not an integer", {"unknown-image"}),
    ("bad-value", image(height=0), "height is 0, not a positive integer"),
    ("bad-value", image(file_name=7), "file_name is 7"),
    ("bad-value", thing(id=True), "id is True"),
    ("bad-value", thing(image_id="2"), "image_id is '2'", {"image-empty"}),
    ("bad-value", thing(area="big"), "area is 'big', not a number"),
    ("bad-value", thing(iscrowd=2), "iscrowd is 2, not 0 or 1"),
    ("bad-value", category(name=5), "name is 5, not text"),
    ("image-id-twice", again("images", file_name="5.png"), "image 2", {"file-name-twice"}),
    ("annotation-id-twice", again("annotations"), "annotation 11"),
    ("category-id-twice", again("categories", name="fox"), "category 3"),
    (
        "category-name-twice",
        dogs,
        "categories 3 and 4 are both 'dog'",
    ),
    ("category-double", again("categories", id=4), "dog (category 4)"),
    ("category-name-empty", category(name=" "), "category 3"),
    ("unknown-image", thing(image_id=77), "annotation 11: image_id 77", {"image-empty"}),
    ("unknown-category", thing(category_id=1), "annotation 11: category_id 1"),
    ("image-missing", file("2.png", os.remove), "2.png (image 2)"),
    ("image-missing", image(file_name="no/2.png"), "no/2.png (image 2)"),
    ("image-unreadable", image(file_name="a\0b"), "not a file's name"),
    ("missing-key", change("categories", 1, name=None), "category 3 lacks name"),
    ("bad-value", category(id=[3]), "id is [3], not an integer", {"unknown-category"}),
    ("bad-value", thing(ignore="0"), "ignore is '0', not 0 or 1"),
    ("box-format", thing(bbox=[1, 2, 10**400, 4]), "bbox [1, 2, 1000"),
    ("polygon-broken", thing(segmentation=[[1, 2, 10**400, 4, 5, 6]]), "not a finite number"),
    ("image-unreadable", file("2.png", lambda path: path.write_bytes(b"no image")), "2.png"),
    (
        "image-size",
        image(width=HEIGHT, height=WIDTH),
        "is 60 x 40, the annotation file says 40 x 60",
    ),
    (
        "image-size-turned",
        file("2.png", turned((WIDTH, HEIGHT), 6)),
        "2.png (image 2): 60 x 40 is its size before turning (orientation 6)",
    ),
    ("image-turned", file("2.png", turned((WIDTH, HEIGHT), 3)), "orientation 3; it is turned"),
    ("image-unreadable", file("2.png", float_tiff), "32-bit pixels (mode F)"),
    ("file-name-twice", again("images", id=6), "images 2 and 6 are both 2.png", {"image-empty"}),
    ("box-format", thing(bbox=[1, 2, 3]), "bbox [1, 2, 3]"),
    ("box-format", thing(bbox=[1, 2, 3, "4"]), "'4'"),
    ("box-format", thing(bbox=[1, 2, float("nan"), 4]), "nan"),
    ("box-format", thing(bbox={"x": 1}), "{'x': 1}"),
    ("box-negative", thing(bbox=[20, 20, -5, 5]), "bbox [20, 20, -5, 5], image 60 x 40"),
    ("box-empty", thing(bbox=[20, 20, 5, 0], area=0), "bbox [20, 20, 5, 0]"),
    (
        "box-outside",
        thing(bbox=[61, 6, 20, 14]),
        "annotation 11 of image 2: bbox [61",
        {"box-mask-apart"},
    ),
    ("box-partly-outside", move(40, 0), "bbox [46, 6, 20, 14]"),
    (
        "box-corners",
        corners,
        "fit when their last two numbers are taken",
        {"box-partly-outside", "box-mask"},
    ),
    ("box-fractions", fractions, "5 of 5 boxes end before (1, 1)", {"left-out", "nothing-left"}),
    ("box-mask-apart", thing(bbox=[30, 6, 20, 14]), "its mask from corner to corner: 6, 6, 26, 20"),
    (
        "box-mask-apart",
        change("annotations", 4, bbox=[40, 0, 20, 40]),
        "corner to corner: 10, 0, 30, 40",
    ),
    ("box-mask", thing(bbox=[15, 6, 20, 14]), "bbox [15, 6, 20, 14] (left, top, width, height)"),
    ("nothing-left", every(iscrowd=1), "0 of 5 objects are used; left out: 5 iscrowd 1"),
    ("nothing-left", every(ignore=1), "left out: 5 ignore 1", {"left-out"}),
    ("nothing-left", every(area=0), "left out: 5 area 0", {"left-out", "area"}),
    ("left-out", thing(ignore=1), "annotation 11 of image 2: ignore 1"),
    ("left-out", thin, "annotation 11 of image 2: narrower than a pixel"),
    ("category-left-out", change("annotations", 2, ignore=1), "eel (1)", {"left-out"}),
    ("federated", image(neg_category_ids=[3]), "image 2 has neg_category_ids"),
    ("area", thing(area=320), "area 320, bbox [6, 6, 20, 14]"),
    ("area", thing(area=0), "area 0", {"left-out"}),
    ("area", thing(segmentation=[[6, 6, 9, 6, 9, 9]]), "area 280, polygons 4.5", {"box-mask"}),
    ("mask-missing", thing(segmentation=None), "segmentation None"),
    ("mask-missing", thing(segmentation=[]), "segmentation []"),
    ("mask-format", thing(segmentation="polygon"), "segmentation 'polygon'"),
    ("mask-format", thing(segmentation=[6, 6, 9, 6, 9, 9]), "segmentation [6, 6"),
    ("mask-format", crowd(counts=None), "run lengths with"),
    ("polygon-broken", thing(segmentation=[[1, 2, 3, 4]]), "4 coordinates, expected 6 or more"),
    ("polygon-broken", thing(segmentation=[SQUARE, [5, 5, 25, 5, 25, 25, 5]]), "an odd number"),
    ("polygon-broken", thing(segmentation=[SQUARE, [1, 1, "2", 2, 3, 3]]), "not a finite number"),
    ("polygon-broken", thing(segmentation=[SQUARE, [1, 1, 2, float("inf"), 3, 3]]), "not a finite"),
    ("polygon-short", thing(segmentation=[[1, 2, 3, 4], SQUARE]), "4 coordinates"),
    ("mask-outside", move(70, 0), "from (76, 6) to (96, 20), image 60 x 40", {"box-outside"}),
    ("run-length-size", crowd(size=[WIDTH, HEIGHT]), "size [60, 40], image [40, 60]"),
    ("run-length-broken", crowd(counts=[400, 800]), "1,200 pixels, the image has 2,400"),
    ("run-length-broken", crowd(counts=[400, -1, 2001]), "not run lengths"),
    ("run-length-broken", crowd(counts="\x7f"), "not run lengths"),
    ("run-length-broken", crowd(counts="b"), "not run lengths"),
    ("run-length-broken", crowd(counts="5"), "5 pixels, the image"),
    ("category-unused", again("categories", id=4, name="fox"), "fox (category 4)"),
    ("image-empty", again("images", id=6, file_name="6.png"), "6.png (image 6)", {"image-missing"}),
]


@pytest.mark.parametrize("row", FAULTS, ids=[row[0] for row in FAULTS])
def test_a_fault_is_found(folder: Path, row: tuple[Any, ...]) -> None:
    kind, fault, example, *rest = row
    others = rest[0] if rest else set()
    content = sound()
    fault(content, folder)
    report = check(content, folder)
    counts = found(report)
    assert set(counts) == {kind} | others
    assert counts[kind] == 1
    finding = next(each for each in report.findings if each.kind == kind)
    assert any(example in each for each in finding.examples), finding.examples
    assert f"{KINDS[kind][1]} [{kind}]" in report.render()
    assert json.loads(json.dumps(report.to_dict()))["findings"]
    if report.errors:
        with pytest.raises(DataError, match="kinds of errors:"):
            report.raise_for_errors()
    else:
        report.raise_for_errors()


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("json", "{", "is not JSON: Expecting"),
        ("json", "\x00\xff", "is not JSON"),
        ("structure", "[]", "holds a list, expected an object with images, annotations, categ"),
        ("structure", "{}", "lacks 'images'; it has "),
        ("structure", '{"image": []}', "lacks 'images'; did it mean 'image'?"),
        ("structure", '{"images": {}}', "'images' of .* must be a list, not an object"),
        ("structure", '{"images": null}', "must be a list, not nothing"),
        (
            "structure",
            '{"images": [null]}',
            "'images' of .* must be objects, not nothing",
        ),
    ],
)
def test_a_file_that_is_no_annotation_file(
    folder: Path, kind: str, text: str, message: str
) -> None:
    file = folder / "annotations.json"
    file.write_bytes(text.encode("latin-1"))
    assert found(check_annotations(file, folder / "images")) == {kind: 1}
    with pytest.raises(DataError, match=message):
        load_annotations(file)
    assert found(check_annotations(folder / "none.json", folder)) == {"file": 1}
    assert found(check_annotations(folder, folder)) == {"file": 1}


def test_the_model_and_the_file_must_agree(folder: Path) -> None:
    report = check(sound(), folder, classes=["cat", "dog", "eal"])
    assert found(report) == {"class-missing": 1, "class-extra": 1}
    assert "eal; the file has 'eel'" in report.render()


def test_what_the_settings_leave_out(folder: Path) -> None:
    content = sound()

    def settings(**values: Any) -> Any:
        return CocoDataConfig(root="", **values)

    counts = found(check(content, folder, settings=settings(min_size=41)))
    assert counts == {"nothing-left": 1, "left-out": 4}
    assert found(check(content, folder, settings=settings(min_size=41), training=False)) == {}
    small = BadImagesConfig(max_pixels=WIDTH * HEIGHT - 1)
    assert found(check(content, folder, settings=settings(bad_images=small))) == {
        "image-unreadable": 5
    }


def test_orientation(folder: Path) -> None:
    """An image's size must be that of the picture as it is read."""
    turned((HEIGHT, WIDTH), 8)(folder / "images" / "2.png")
    assert found(check(sound(), folder)) == {}
    left = CocoDataConfig(root="", exif_orientation="ignore")
    report = check(sound(), folder, settings=left)
    assert found(report) == {"image-size-turned": 1}
    assert "60 x 40 is its size after turning" in report.render()
    turned((WIDTH, HEIGHT), 8)(folder / "images" / "2.png")
    assert found(check(sound(), folder, settings=left)) == {}


def test_a_category_listed_twice(folder: Path) -> None:
    content = sound()
    content["categories"].insert(0, {"id": 1, "name": "cat", "supercategory": "none"})
    assert found(check(content, folder)) == {"category-double": 1}
    assert category_ids(content, "file") == {"dog": 3, "eel": 7, "cat": 9}
    dogs(content, folder)
    with pytest.raises(DataError, match=r"rename one, or give the objects of both one category_id"):
        category_ids(content, "file")


def test_boxes_only(folder: Path) -> None:
    content = sound()
    for row in content["annotations"]:
        del row["segmentation"]
    assert found(check(content, folder)) == {"mask-missing": 5}
    assert found(check(content, folder, masks=False)) == {}


def test_a_damaged_image_is_found_by_reading_it(folder: Path) -> None:
    path = folder / "images" / "2.png"
    path.write_bytes(path.read_bytes()[:3000])
    assert found(check(sound(), folder)) == {}
    assert found(check(sound(), folder, read_images=True)) == {"image-unreadable": 1}


def test_a_missing_folder(folder: Path) -> None:
    (folder / "images").rename(folder / "pictures")
    assert found(check(sound(), folder)) == {"images-dir": 1}


def test_images_of_another_set(folder: Path) -> None:
    train = check(sound(), folder)
    assert found(check(sound(), folder, other=train)) == {"leak": 5}
    other = folder / "other"
    (other / "images").mkdir(parents=True)
    for path in (folder / "images").iterdir():
        # Numbered alike, but only the third is the same image.
        source = path if path.stem == "3" else folder / "images" / f"{int(path.stem) % 5 + 1}.png"
        (other / "images" / path.name).write_bytes(source.read_bytes())
    report = check(sound(), other, other=train)
    assert found(report) == {"leak": 1}
    assert f"{other / 'images' / '3.png'} is {folder / 'images' / '3.png'}" in report.render()


def test_many_faults_are_counted_and_a_few_shown(folder: Path) -> None:
    content = sound()
    content["annotations"] += [
        {**content["annotations"][0], "id": 1000 + i, "image_id": 5000 + i} for i in range(1234)
    ]
    report = check(content, folder)
    assert found(report) == {"unknown-image": 1234}
    assert "error     1,234  annotations of an image that is not listed" in report.render()
    assert "and 1,229 more" in report.render()


def test_command(
    folder: Path, tool: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    content = sound()
    content["images"].append({"id": 6, "file_name": "5.png", "width": WIDTH, "height": HEIGHT})
    check(content, folder)
    paths = folder / "annotations.json", folder / "images"
    tool("tools/check_coco.py", *paths)
    assert "warning       1  images with the file of another image" in capsys.readouterr().out

    content["images"][5]["file_name"] = "6.png"
    check(content, folder)
    out = folder / "new" / "list.json"
    with pytest.raises(SystemExit) as stop:
        tool("tools/check_coco.py", *paths, *paths, "--json", out, "--no-masks", "--read-images")
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert "error         1  image files missing [image-missing]" in printed.out
    assert "images that the other set has as well" in printed.out
    assert printed.err.startswith(f"error: errors in {paths[0]}, {paths[0]}")
    listed = json.loads(out.read_text())
    assert [each["findings"][0]["examples"] for each in listed] == [["6.png (image 6)"]] * 2

    with pytest.raises(SystemExit) as stop:
        tool("tools/check_coco.py", folder / "none.json", folder)
    assert stop.value.code == 2
    with pytest.raises(SystemExit):
        tool("tools/check_coco.py", *paths, folder)
    assert "expected pairs" in capsys.readouterr().err
