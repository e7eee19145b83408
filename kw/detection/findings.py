"""What is wrong with a set of annotated images: kinds of problems, and the list of those found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kw.data.dataset import DataError

__all__ = ["KINDS", "Finding", "Findings", "Report", "some"]

_EXAMPLES = 5

# Errors are what training or evaluation would stop at or silently do wrong. Warnings are what they
# put up with, and what COCO's own files have. The order is that of the report.
KINDS: dict[str, tuple[str, str]] = {
    "file": ("error", "annotation file cannot be read"),
    "json": ("error", "annotation file is not JSON"),
    "structure": ("error", "not an annotation file of COCO's format"),
    "no-images": ("error", "no images in the annotation file"),
    "no-objects": ("error", "no objects in the annotation file"),
    "missing-key": ("error", "keys missing"),
    "bad-value": ("error", "values of a wrong kind"),
    "image-id-twice": ("error", "image ids named again"),
    "annotation-id-twice": ("error", "annotation ids named again"),
    "category-id-twice": ("error", "category ids named again"),
    "category-name-twice": ("error", "categories of one name with objects: which is meant?"),
    "category-name-empty": ("error", "categories without a name"),
    "num-classes": ("error", "number of categories is not the model's"),
    "class-missing": ("error", "classes of the model without a category"),
    "federated": ("error", "images annotated in part, as LVIS's are: not supported"),
    "nothing-left": ("error", "no object is left"),
    "unknown-image": ("error", "annotations of an image that is not listed"),
    "unknown-category": ("error", "annotations of a category that is not listed"),
    "images-dir": ("error", "folder of images cannot be read"),
    "image-missing": ("error", "image files missing"),
    "image-unreadable": ("error", "image files that cannot be read"),
    "image-size": ("error", "images of another size than the annotation file says"),
    "image-size-turned": (
        "error",
        "images whose size is that of the other data.exif_orientation: set it if their boxes lie "
        "in that picture too, else exchange width and height",
    ),
    "box-format": ("error", "boxes that are not four finite numbers"),
    "box-negative": ("error", "boxes of negative width or height"),
    "box-corners": ("error", "boxes look like [left, top, right, bottom], not [.., width, height]"),
    "box-fractions": ("error", "boxes look like parts of the image, not pixels"),
    "box-outside": ("error", "boxes wholly outside of their image"),
    "box-mask-apart": ("error", "boxes that do not touch their object's mask"),
    "mask-missing": ("error", "objects without a mask"),
    "mask-format": ("error", "masks that are neither polygons nor run lengths"),
    "polygon-broken": ("error", "polygons that are no polygon"),
    "mask-outside": ("error", "masks wholly outside of their image"),
    "run-length-size": ("error", "run lengths of another size than the image"),
    "run-length-broken": ("error", "run lengths that do not fill their image"),
    "class-extra": ("warning", "categories that the model does not have: left out"),
    "category-double": ("warning", "categories of another's name, without objects: left out"),
    "category-unused": ("warning", "categories without any object"),
    "category-left-out": ("warning", "categories whose objects are all left out"),
    "left-out": ("warning", "objects that training leaves out"),
    "file-name-twice": ("warning", "images with the file of another image"),
    "image-turned": ("warning", "images with an EXIF orientation: do their objects fit?"),
    "box-empty": ("warning", "boxes of no width or no height"),
    "box-partly-outside": ("warning", "boxes partly outside of their image"),
    "box-mask": ("warning", "boxes of another extent than their object's mask"),
    "polygon-short": ("warning", "polygons of fewer than three points: left out"),
    "polygon-flat": ("warning", "polygons without an area"),
    "mask-partly-outside": ("warning", "masks partly outside of their image"),
    "crowd-polygons": ("warning", "crowd regions given as polygons, where COCO has run lengths"),
    "area": ("warning", "areas that do not fit the box or the mask"),
    "crowded": ("warning", "images with more objects than detections count"),
    "leak": ("warning", "images that the other set has as well"),
    "image-empty": ("info", "images without objects"),
}


@dataclass(frozen=True)
class Finding:
    """All problems of one kind."""

    kind: str
    severity: str
    """``error``, ``warning`` or ``info``"""
    text: str
    count: int
    examples: tuple[str, ...]
    """the first few"""


class Findings:
    """Counts problems by kind and keeps the first few of each."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._examples: dict[str, list[str]] = {}

    def add(self, kind: str, example: str) -> None:
        """Count one problem."""
        self._counts[kind] = self._counts.get(kind, 0) + 1
        examples = self._examples.setdefault(kind, [])
        if len(examples) < _EXAMPLES:
            examples.append(example)

    def add_all(self, kind: str, examples: Iterable[str]) -> None:
        """Count many."""
        for example in examples:
            self.add(kind, example)

    def listed(self) -> list[Finding]:
        """In the order of ``KINDS``: errors, warnings, remarks."""
        return [
            Finding(kind, severity, text, self._counts[kind], tuple(self._examples[kind]))
            for kind, (severity, text) in KINDS.items()
            if kind in self._counts
        ]


@dataclass(frozen=True)
class Report:
    """What was found in one annotation file and its images."""

    annotations_file: str
    images_dir: str
    images: int
    objects: int
    categories: tuple[str, ...]
    """names in the order of their ids, which is the order of labels"""
    findings: tuple[Finding, ...]
    file_names: frozenset[str] = field(default=frozenset(), repr=False)
    """file names of the images, which another set is compared with"""

    @property
    def errors(self) -> list[Finding]:
        """What a run must not start with."""
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def warnings(self) -> list[Finding]:
        """What a user should know of."""
        return [finding for finding in self.findings if finding.severity == "warning"]

    def render(self) -> str:
        """The list as text: a line for the set, one for each kind, one for each example."""
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
        """For JSON."""
        return {
            "annotations_file": self.annotations_file,
            "images_dir": self.images_dir,
            "images": self.images,
            "objects": self.objects,
            "categories": list(self.categories),
            "findings": [
                {
                    "kind": finding.kind,
                    "severity": finding.severity,
                    "text": finding.text,
                    "count": finding.count,
                    "examples": list(finding.examples),
                }
                for finding in self.findings
            ],
        }

    def raise_for_errors(self) -> None:
        """Refuse a set with errors.

        Raises:
            DataError: lists all errors and warnings.
        """
        if self.errors:
            raise DataError(f"{len(self.errors)} kinds of errors:\n{self.render()}")


def some(values: Sequence[object], most: int = _EXAMPLES) -> str:
    """The first few values, and how many more there are."""
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(str(value) for value in values[:most]) + more
