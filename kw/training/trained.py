"""From a configuration and a checkpoint to a ready network: one way for every tool."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config, ConfigError, config_from_text, load_config
from ..hub import WEIGHTS as EXPORTED
from ..hub import is_hub_name, weights_file
from ..models.build import build_network, check_network
from .checkpoint import CheckpointError, load_checkpoint, load_network, named_classes
from .saving import remaining

WEIGHTS = ("auto", "model", "ema")


@dataclass(frozen=True)
class Trained:
    """A trained network and what its checkpoint says of it.

    Attributes:
        network: with the checkpoint's weights, in evaluation mode, at the temperature that it was
            written at.
        config: of the run.
        file: the checkpoint.
        weights: ``"model"``, or ``"ema"`` for the moving average.
        classes: their names, where the checkpoint has them.
        meta: the checkpoint's ``meta``.
    """

    network: nn.Module
    config: Config
    file: Path
    weights: str
    classes: list[str] | None
    meta: Mapping[str, Any]


def load_trained(
    checkpoint: str | Path,
    config: Config | str | Path | None = None,
    options: Iterable[str] = (),
    weights: str = "auto",
    device: str | torch.device = "cpu",
) -> Trained:
    """The classifier of a checkpoint.

    Args:
        checkpoint: see :func:`trained_file`.
        config: the configuration or its file; left out, the checkpoint's own.
        options: ``key=value`` settings over the configuration file's; for another there are none.
        weights: see :func:`choose_weights`.
        device: where the network goes.

    Raises:
        CheckpointError: it cannot be read, is of another model, or lacks what is asked for.
        ConfigError: the configuration is wrong.
    """
    options = list(options)
    if options and (config is None or isinstance(config, Config)):
        raise ConfigError(f"options {', '.join(options)}: expected the file that they change")
    file = trained_file(checkpoint)
    saved = load_checkpoint(file)
    meta = saved.get("meta", {})
    if config is None:
        config = _own_config(file, meta)
    elif not isinstance(config, Config):
        config = load_config(config, options)
    chosen, state = choose_weights(saved, file, weights)
    network = build_network(config.model)
    check_network(network, config.model, config.data.shape)
    load_network(network, state, str(file))
    classes = named_classes(saved, config.model.num_classes, str(file))
    return Trained(network.to(device).eval(), config, file, chosen, classes, meta)


def trained_file(path: str | Path) -> Path:
    """The checkpoint that a path stands for: a file itself, the best or newest of a work directory,
    the weights of a folder of ``kw pull``, or those of a model on the hub (``hf-hub:user/model``).

    Raises:
        CheckpointError: the directory holds none.
        kw.hub.HubError: the hub has no such classifier, or cannot be reached.
    """
    if is_hub_name(path):
        return weights_file(str(path))
    path = Path(path)
    if not path.is_dir():
        return path
    best = path / "best.pth"
    found = [best] if best.is_file() else remaining(path)[-1:]
    found = found or [file for file in [path / EXPORTED] if file.is_file()]
    if not found:
        raise CheckpointError(f"{path}: expected a work directory of kw train; no *.pth there")
    return found[0]


def detector_config(model: str | Path) -> Path | None:
    """The configuration of a detector's run, by its work directory or a checkpoint in it; None for
    any other model."""
    if is_hub_name(model):  # a program in a repository is not run
        return None
    path = Path(model)
    config = (path if path.is_dir() else path.parent) / "config.py"
    if not ((path.is_dir() or path.suffix == ".pth") and config.is_file()):
        return None
    # A program of this name may be anything else: that is not to be run.
    return config if "test_pipeline" in config.read_text("utf-8", "replace") else None


def choose_weights(
    checkpoint: Mapping[str, Any], file: str | Path, weights: str = "auto"
) -> tuple[str, Mapping[str, Tensor]]:
    """The weights of a checkpoint that are used, and which these are.

    Args:
        checkpoint: as it was read.
        file: what messages call it.
        weights: ``"model"``, ``"ema"``, or ``"auto"`` for those that the run's figures stand for:
            the moving average where there is one.

    Raises:
        CheckpointError: the moving average is asked for, and there is none.
    """
    of = checkpoint.get("meta", {}).get("weights")
    if of in ("ema", "model"):  # an exported file, which holds one of the two
        if weights not in ("auto", of):
            raise CheckpointError(f"{file}: holds the {of!r} weights only; expected auto or {of}")
        return of, checkpoint["state_dict"]
    if weights == "auto":
        weights = "ema" if "ema_state_dict" in checkpoint else "model"
    state = checkpoint.get("ema_state_dict" if weights == "ema" else "state_dict")
    if state is None:
        raise CheckpointError(
            f"checkpoint {file}: holds no moving average; use the model's weights"
        )
    return weights, state


def _own_config(file: Path, meta: Mapping[str, Any]) -> Config:
    text = meta.get("config")
    if not isinstance(text, str):
        raise CheckpointError(f"checkpoint {file}: holds no configuration (meta.config)")
    try:
        return config_from_text(text, f"configuration in {file}")
    except ConfigError as error:
        if "\nmodel = dict(" in text or text.startswith("model = "):
            raise CheckpointError(
                f"checkpoint {file}: is a detector's, which needs the config.py of its run beside "
                "it; expected one of a classifier"
            ) from error
        raise
