"""What a run takes on a GPU without being told: layout; and the modes of torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kw.config import ConfigError, config_from_mapping
from kw.training.run import build_preprocessor, uses_channels_last

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [(None, (False, True)), (True, (True, True)), (False, (False, False))],
)
def test_channels_last_on_gpus(
    settings: dict[str, Any], chosen: bool | None, expected: tuple[bool, bool]
) -> None:
    config = config_from_mapping({**settings, "channels_last": chosen})
    assert (uses_channels_last(config, CPU), uses_channels_last(config, GPU)) == expected
    formats = [build_preprocessor(config, device).memory_format for device in (CPU, GPU)]
    assert [each == torch.channels_last for each in formats] == list(expected)


@pytest.mark.parametrize(
    ("value", "mode"),
    [(True, None), ({"mode": "reduce-overhead"}, "reduce-overhead"), ({}, "default")],
)
def test_modes_of_compile(
    settings: dict[str, Any],
    value: Any,
    mode: str | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Any,
) -> None:
    from kw.training.distributed import find_process
    from kw.training.run import build_trainer

    modes = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, mode: modes.append(mode))
    config = config_from_mapping({**settings, "compile": value})
    build_trainer(config, tmp_path, find_process("none"))
    assert modes == [mode]


def test_an_unknown_mode_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="did you mean 'reduce-overhead'"):
        config_from_mapping({**settings, "compile": {"mode": "reduce_overhead"}})
