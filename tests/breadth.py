"""Parameters of which the ordinary run of the tests takes some, and ``pytest -m slow`` the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def breadth(values: Iterable[Any], quick: Iterable[Any]) -> list[Any]:
    """The values as parameters, those that are not in ``quick`` marked as slow.

    Args:
        values: of one parameter, or tuples of several.
        quick: some of them.
    """
    cases, some = list(values), list(quick)
    assert some, "no case would be run"
    assert all(value in cases for value in some), "a quick case that is none"
    return [value if value in some else _slow(value) for value in cases]


def _slow(value: Any) -> Any:
    values = value if isinstance(value, tuple) else (value,)
    return pytest.param(*values, marks=pytest.mark.slow)
