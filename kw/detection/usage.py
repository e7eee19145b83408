"""Which objects of an annotation file training and evaluation use.

mmdetection's reader silently leaves out some. :func:`why_unused` has the same rules;
``tests/test_usage.py`` compares the two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kw.detection.findings import some

OUTSIDE = "outside of its image, or of no width or height"

_CROWD = "iscrowd 1, a region to ignore; an object has 0"


def why_unused(
    each: Mapping[str, Any], size: tuple[int, int], training: bool = True, min_size: int = 0
) -> str | None:
    """The reason why an object is not used, or None if it is.

    Args:
        each: an annotation whose box has four finite numbers.
        size: width and height of its image in the file.
        training: whether it is for training; evaluation leaves out only crowds.
        min_size: training images with a shorter side are left out, pixels.
    """
    if training:
        if min(size) < min_size:
            return f"in an image with a side under {min_size} pixels (data.min_size)"
        if each.get("ignore"):
            return "ignore 1, which leaves it out"
        left, top, width, height = each["bbox"]
        right, bottom = min(left + width, size[0]), min(top + height, size[1])
        if right <= max(left, 0) or bottom <= max(top, 0):
            return OUTSIDE
        if each["area"] <= 0:
            return f"area {each['area']:g}, where the pixels of the object are expected"
        if width < 1 or height < 1:
            return "narrower than a pixel"
    return _CROWD if each.get("iscrowd") else None


@dataclass
class Usage:
    """Numbers of objects in the file and of objects that are used, by category name."""

    listed: Counter[str] = field(default_factory=Counter)
    used: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    """of the objects that are not used"""

    def count(self, name: str, reason: str | None) -> None:
        """Count an object of a category; ``reason`` is that of :func:`why_unused`."""
        self.listed[name] += 1
        if reason is None:
            self.used[name] += 1
        else:
            self.reasons[reason] += 1

    @classmethod
    def of(
        cls,
        objects: Iterable[Mapping[str, Any]],
        names: Mapping[int, str],
        sizes: Mapping[int, tuple[int, int]],
        min_size: int = 0,
    ) -> Usage:
        """Count the objects of some categories, ``names`` by id, in a training set; ``sizes`` are
        width and height of its images by id."""
        usage = cls()
        for each in objects:
            if each["category_id"] in names and each["image_id"] in sizes:
                reason = why_unused(each, sizes[each["image_id"]], min_size=min_size)
                usage.count(names[each["category_id"]], reason)
        return usage

    def without_any(self) -> list[str]:
        """Categories whose objects are all left out."""
        return [f"{name} ({n:,})" for name, n in self.listed.items() if not self.used[name]]

    def __str__(self) -> str:
        """``12 of 30 objects are used; left out: 18 area 0; none is left of: bolt (10)``."""
        parts = [f"{self.used.total():,} of {self.listed.total():,} objects are used"]
        if self.reasons:
            reasons = [f"{number:,} {reason}" for reason, number in self.reasons.most_common()]
            parts.append(f"left out: {some(reasons)}")
        if self.used and (lost := self.without_any()):
            parts.append(f"none is left of: {some(lost)}")
        return "; ".join(parts)
