"""Parameters of which the ordinary run of the tests takes some, and ``pytest -m slow`` the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def breadth(values: Iterable[Any], quick: Iterable[Any]) -> list[Any]:
    """Values as parameters; those that are not in ``quick`` are marked as slow."""
    some, all_values = list(quick), list(values)
    assert some, "no case would be run"
    assert all(value in all_values for value in some), "a quick case that is none"
    return [
        value if value in some else pytest.param(value, marks=pytest.mark.slow)
        for value in all_values
    ]
