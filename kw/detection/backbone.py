"""Any classifier of this project as a detector's backbone: its feature maps, and no copy of it.

::

    model = dict(
        backbone=dict(
            _delete_=True,
            type="kw.Backbone",
            network="../imagenet/resnet50/kw_resnet50_1x.yaml",
            weights="work_dirs/kw_resnet50_1x/best.pth",
            out_indices=(1, 2, 3, 4),
            frozen_stages=1,
        ),
    )

Legend: B images, C channels, H x W positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ConfigError, load_config
from ..config.checking import Schema, check_tree
from ..config.schema import ModelConfig
from ..config.tree import Origin, entry_from_plain
from ..engine.checkpoint import load_checkpoint, load_network
from ..models import build_network
from ..registry import MODELS
from ..warehouse import (
    Warehouse,
    WarehouseDict,
    drop_unused_warehouses,
    has_temperature,
    set_temperature,
)
from .layout import frozen_parameters

__all__ = ["Backbone", "read_network"]


@MODELS.register_module()
class Backbone(nn.Module):
    """The feature maps of a timm network, static or converted, at temperature 0.

    Parts that no map depends on, the classifier first, are taken out, so that every parameter
    that is left gets a gradient.

    Args:
        network: a classification configuration (YAML), or a mapping with the keys of its
            ``model``.
        weights: checkpoint of that classifier (``tools/train.py``, or the authors' by
            ``tools/convert_checkpoint.py``); its moving average where it has one. Everything must
            fit but the classifier itself, which may have other classes.
        out_indices: which maps: places in timm's ``feature_info`` of the network, and one more for
            what its last convolution makes of the last (MobileNetV2). Default: the maps of stride
            4 to 32, of those that there are.
        frozen_stages: -1 trains everything, 0 freezes the stem, n the stem and n stages. A
            warehouse is frozen when every layer that uses it is.
        norm_eval: BatchNorm, that of attention too, uses and keeps its statistics.
        output_norm: LayerNorm over the channels of every map, as ConvNeXt's detectors have it.
        grad_checkpointing: keep only the blocks' inputs for the backward pass. Where norm_eval is
            off, BatchNorm's statistics are then updated twice an iteration.
        drop_path_rate: in place of the classifier's own; stochastic depth grows from 0 to this.

    Attributes:
        out_channels: channels of the maps.
        strides: pixels of the image per position of the maps.

    Raises:
        ConfigError: the network cannot be built, has no such maps or no stages to freeze.
        CheckpointError: the weights cannot be read or are of another network.
    """

    def __init__(
        self,
        network: str | Mapping[str, Any],
        weights: str | None = None,
        out_indices: Sequence[int] | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        output_norm: bool = False,
        grad_checkpointing: bool = False,
        drop_path_rate: float | None = None,
    ) -> None:
        super().__init__()
        config = read_network(network)
        if drop_path_rate is not None:
            config.drop_path_rate = drop_path_rate
        built: Any = build_network(config)
        self.network = built
        if not hasattr(self.network, "forward_intermediates"):
            raise ConfigError(f"model.backbone.network: timm's {config.name} has no feature maps")
        if weights is not None:
            load_classifier(self.network, weights)
        if has_temperature(self.network):
            set_temperature(self.network, 0.0)
        self.norm_eval = norm_eval
        self._choose_maps(config.name, out_indices)
        self._drop_unused(config.name)
        try:
            frozen = frozen_parameters(self.network, frozen_stages)
        except ValueError as error:
            raise ConfigError(f"model.backbone.frozen_stages: {error}") from error
        self._freeze(frozen)
        self.output_norms: Any = None
        if output_norm:
            self.output_norms = nn.ModuleList(nn.LayerNorm(c, eps=1e-6) for c in self.out_channels)
        if grad_checkpointing:
            built.set_grad_checkpointing(True)
        self.train()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Feature maps ``[B, C, H / stride, W / stride]`` of images ``[B, 3, H, W]``."""
        maps = self._maps(images)
        if self.output_norms is not None:
            normed = []
            for map_, norm in zip(maps, self.output_norms, strict=True):
                normed.append(norm(map_.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
            maps = normed
        return tuple(maps)

    def train(self, mode: bool = True) -> Backbone:
        """Training mode, but for what is frozen and, with ``norm_eval``, BatchNorm."""
        super().train(mode)
        for module in self._kept_in_eval:
            module.eval()
        if mode and self.norm_eval:
            for module in self.network.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def _maps(self, images: Tensor) -> list[Tensor]:
        take = self.network.forward_intermediates
        if self._takes_last:
            last, maps = take(images, indices=self._indices)
            return [*maps, last]
        return take(images, indices=self._indices, stop_early=True, intermediates_only=True)

    def _choose_maps(self, name: str, out_indices: Sequence[int] | None) -> None:
        self._kept_in_eval: list[nn.Module] = []
        # ModuleList-like objects of timm iterate over the dictionaries of all maps.
        info = [dict(entry) for entry in self.network.feature_info]
        if out_indices is None:
            wanted = [i for i, entry in enumerate(info) if 4 <= entry["reduction"] <= 32]
            out_indices = wanted if len({info[i]["reduction"] for i in wanted}) > 1 else wanted[-1:]
        indices = list(out_indices)
        if indices != sorted(set(indices)) or not indices or indices[0] < 0:
            raise ConfigError(
                f"model.backbone.out_indices: expected places in rising order, found {indices}"
            )
        self._takes_last = indices[-1] == len(info)
        self._indices = indices[:-1] if self._takes_last else indices
        if self._indices and self._indices[-1] >= len(info):
            maps = ", ".join(f"{i}: {e['num_chs']}@{e['reduction']}" for i, e in enumerate(info))
            raise ConfigError(
                f"model.backbone.out_indices: {name} has no map {self._indices[-1]}; it has {maps} "
                f"(channels@stride), and {len(info)} is what its last convolution gives"
            )
        self.strides = [info[min(i, len(info) - 1)]["reduction"] for i in indices]

    @torch.no_grad()
    def _drop_unused(self, name: str) -> None:
        """Take out what an image does not pass on its way to the maps."""
        called: set[nn.Module] = set()
        handles = [
            module.register_forward_pre_hook(lambda module, _: called.add(module))
            for module in self.network.modules()
        ]
        self.network.eval()
        try:
            maps = self._maps(torch.zeros(1, 3, 72, 72))
        except (AssertionError, RuntimeError) as error:
            raise ConfigError(
                f"model.backbone.network: {name} does not take images of any size ({error}); "
                "a vision transformer does with timm_args: {dynamic_img_size: true, "
                "dynamic_img_pad: true}"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        if any(map_.dim() != 4 for map_ in maps):
            raise ConfigError(f"model.backbone.out_indices: {name}'s last output is not a map")
        self.out_channels = [map_.shape[1] for map_ in maps]
        _remove(self.network, called)
        drop_unused_warehouses(self.network)

    def _freeze(self, frozen: set[str]) -> None:
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(name not in frozen)
        for module in self.network.modules():
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                self._kept_in_eval.append(module)


def read_network(network: str | Mapping[str, Any], folder: Path | None = None) -> ModelConfig:
    """The ``model`` of a classification configuration.

    Args:
        network: a file, or a mapping with the keys of ``model``.
        folder: where a relative file name starts, if it does not in the working directory.

    Raises:
        ConfigError: the file or the mapping is wrong.
    """
    if isinstance(network, str):
        beside = folder is not None and (folder / network).is_file()
        path = folder / network if folder is not None and beside else Path(network)
        return load_config(path).model
    if not isinstance(network, Mapping):
        raise ConfigError(
            f"model.backbone.network = {network!r}: expected a classification YAML file, or a "
            "mapping with the keys of its model"
        )
    entry = entry_from_plain(network, Origin("model.backbone.network"))
    schema = Schema(ModelConfig, lambda config, report: None, lambda config: ())
    return check_tree(entry, schema)


def load_classifier(network: nn.Module, weights: str) -> None:
    """Load all of a classifier's weights but the classifying layer.

    Raises:
        CheckpointError: the file cannot be read, or anything else in it does not fit.
    """
    checkpoint = load_checkpoint(weights)
    state = checkpoint.get("ema_state_dict", checkpoint["state_dict"])
    config: Any = getattr(network, "pretrained_cfg", None) or {}
    head = (f"{config['classifier']}.", "warehouses.classifier.")
    own = {key: value for key, value in network.state_dict().items() if key.startswith(head)}
    body = {key: value for key, value in state.items() if not key.startswith(head)}
    load_network(network, {**body, **own}, weights)


def _remove(module: nn.Module, called: set[nn.Module]) -> None:
    """Identities in place of the modules with parameters that were not called."""
    for name, child in list(module.named_children()):
        if isinstance(child, (Warehouse, WarehouseDict)):  # held, not called
            continue
        inside = set(child.modules())
        if child in called or not any(True for _ in child.parameters()) or inside & called:
            _remove(child, called)
        else:
            setattr(module, name, nn.Identity())
