"""The kinds of problems in a set of annotated images, and the report of those that were found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kw.data.reading import DataError

_EXAMPLES = 5

# An error would stop training or evaluation, or make it silently wrong. Data with warnings can be
# used; COCO's own files have some. The report has this order.
KINDS: dict[str, tuple[str, str]] = {
    "file": ("error", "annotation file cannot be read"),
    "json": ("error", "annotation file is not JSON"),
    "structure": ("error", "not an annotation file of COCO's format"),
    "no-images": ("error", "no images in the annotation file"),
    "no-objects": ("error", "no objects in the annotation file"),
    "missing-key": ("error", "keys missing"),
    "bad-value": ("error", "values of a wrong kind"),
    "image-id-twice": ("error", "image ids used twice"),
    "annotation-id-twice": ("error", "annotation ids used twice"),
    "category-id-twice": ("error", "category ids used twice"),
    "category-name-twice": ("error", "categories with the same name that both have objects"),
    "category-name-empty": ("error", "categories without a name"),
    "class-missing": ("error", "classes of the model that the file lacks"),
    "federated": ("error", "partly annotated images, as in LVIS: not supported"),
    "nothing-left": ("error", "no object can be used"),
    "unknown-image": ("error", "annotations of an image that is not listed"),
    "unknown-category": ("error", "annotations of a category that is not listed"),
    "images-dir": ("error", "folder of images cannot be read"),
    "image-missing": ("error", "image files missing"),
    "image-unreadable": ("error", "image files that cannot be read"),
    "image-size": ("error", "images of another size than the annotation file says"),
    "image-size-turned": (
        "error",
        "images that have the stated size under the other data.exif_orientation: set it if the "
        "boxes fit that orientation too, else exchange width and height",
    ),
    "box-format": ("error", "boxes that are not four finite numbers"),
    "box-negative": ("error", "boxes of negative width or height"),
    "box-corners": ("error", "boxes look like [left, top, right, bottom], not [.., width, height]"),
    "box-fractions": ("error", "boxes look like fractions of the image, not pixels"),
    "box-outside": ("error", "boxes completely outside of their image"),
    "box-mask-apart": ("error", "boxes that do not touch their object's mask"),
    "mask-missing": ("error", "objects without a mask"),
    "mask-format": ("error", "masks that are neither polygons nor run lengths"),
    "polygon-broken": ("error", "polygons with invalid coordinates"),
    "mask-outside": ("error", "masks completely outside of their image"),
    "run-length-size": ("error", "run lengths of another size than the image"),
    "run-length-broken": ("error", "run lengths that do not fill their image"),
    "class-extra": ("warning", "categories that the model lacks: left out"),
    "category-double": (
        "warning",
        "categories without objects that have the name of another: left out",
    ),
    "category-unused": ("warning", "categories without any object"),
    "category-left-out": ("warning", "categories whose objects are all left out"),
    "left-out": ("warning", "objects that training leaves out"),
    "file-name-twice": ("warning", "images with the file of another image"),
    "image-turned": ("warning", "images with an EXIF orientation: check that their objects fit"),
    "box-empty": ("warning", "boxes without width or height"),
    "box-partly-outside": ("warning", "boxes partly outside of their image"),
    "box-mask": ("warning", "boxes that do not fit their object's mask"),
    "polygon-short": ("warning", "polygons of fewer than three points: left out"),
    "area": ("warning", "areas that do not fit the box or the mask"),
    "leak": ("warning", "images that the other set has as well"),
    "image-empty": ("info", "images without objects"),
}


@dataclass
class Finding:
    """All problems of one kind."""

    kind: str
    severity: str
    """``error``, ``warning`` or ``info``"""
    text: str
    count: int = 0
    examples: list[str] = field(default_factory=list)
    """the first few"""


@dataclass
class Report:
    """The problems of one annotation file and its images."""

    annotations_file: str
    images_dir: str
    images: int = 0
    objects: int = 0
    categories: tuple[str, ...] = ()
    """names in the order of their ids, which is the order of the labels"""
    file_names: frozenset[str] = field(default=frozenset(), repr=False)
    """file names of the images, for the comparison with another set"""
    _found: dict[str, Finding] = field(default_factory=dict, repr=False)

    def add(self, kind: str, *examples: str) -> None:
        """Count a problem for each example."""
        for example in examples:
            finding = self._found.setdefault(kind, Finding(kind, *KINDS[kind]))
            finding.count += 1
            if len(finding.examples) < _EXAMPLES:
                finding.examples.append(example)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The problems, in the order of ``KINDS``."""
        return tuple(self._found[kind] for kind in KINDS if kind in self._found)

    @property
    def errors(self) -> list[Finding]:
        """Problems that a run must not start with."""
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def warnings(self) -> list[Finding]:
        """Problems that a user should know."""
        return [finding for finding in self.findings if finding.severity == "warning"]

    def render(self) -> str:
        """The report as text: a line for the set, for each kind and for each example."""
        lines = [
            f"{self.annotations_file}, images in {self.images_dir}: {self.images:,} images, "
            f"{self.objects:,} objects of {len(self.categories)} categories"
        ]
        for finding in self.findings:
            lines.append(
                f"  {finding.severity:<7} {finding.count:>7,}  {finding.text} [{finding.kind}]"
            )
            lines += [f"  {'':15}    {example}" for example in finding.examples]
            if finding.count > len(finding.examples):
                lines.append(f"  {'':15}    and {finding.count - len(finding.examples):,} more")
        if not self.findings:
            lines.append("  nothing is wrong")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        names = ("annotations_file", "images_dir", "images", "objects", "categories")
        findings = [asdict(finding) for finding in self.findings]
        return {**{name: getattr(self, name) for name in names}, "findings": findings}

    def raise_for_errors(self) -> None:
        """Raise a DataError with the whole report if there are errors."""
        if self.errors:
            raise DataError(f"{len(self.errors)} kinds of errors:\n{self.render()}")


def some(values: Sequence[object], most: int = _EXAMPLES) -> str:
    """The first few values, and how many more there are."""
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(str(value) for value in values[:most]) + more
