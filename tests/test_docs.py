"""The code in ``docs/converting.md`` runs, block after block, on small data."""

from __future__ import annotations

import functools
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import distributed

from kw import get_temperature
from kw.warehouse import KWLayer

PAGE = Path(__file__).parents[1] / "docs" / "converting.md"


@pytest.fixture
def process_group(tmp_path):
    """A world of one, for the block on several GPUs."""
    store = f"file://{tmp_path / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_converting_md(tmp_path, process_group, monkeypatch):
    text = PAGE.read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) >= 12
    # What is traced is the same, and no compiler is needed.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    batch = (torch.randn(4, 3, 64, 64), torch.randint(10, (4,)))
    names = {"loader": [batch] * 2, "epochs": 1, "path": tmp_path / "model.pth"}
    names["__name__"] = "converting"
    for block in blocks:
        line = text[: text.index(block)].count("\n")
        code = compile("\n" * line + block, str(PAGE), "exec")  # errors name the page's line
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            exec(code, names)

    assert names["step"] == 1
    assert names["loss"].isfinite()
    assert names["report"].refused
    assert get_temperature(names["average"].module) == 0.5
    assert get_temperature(names["again"]) == 0
    assert not names["again"].warehouses["layer1"].cells.requires_grad
    assert any(isinstance(m, KWLayer) for m in names["backbone"].modules())
