"""Any classifier of this project as a detector's backbone.

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
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from mmengine.registry import MODELS, Registry
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from ..config import ConfigError, load_config
from ..config.checking import Schema, check_tree
from ..config.schema import ModelConfig
from ..config.tree import Origin, entry_from_plain
from ..errors import say
from ..models import build_network, start_network
from ..models.build import with_start
from ..models.depth import frozen_parameters
from ..models.freezing import freeze as freeze_by_name
from ..models.freezing import frozen_modules
from ..models.recompute import recompute_blocks
from ..models.weights import CheckpointError, classifier_names, is_converted
from ..torch_private import BatchNorm
from ..warehouse import (
    Warehouse,
    drop_unused_warehouses,
    has_temperature,
    set_temperature,
)
from ..warehouse.warehouse import with_names_now
from .weights import StartWeights, read_backbone

# mmdetection's configurations name its entries kw.NAME.
_MODELS = Registry("model", parent=MODELS, scope="kw", locations=["kw.detection.backbone"])


@_MODELS.register_module()
class Backbone(nn.Module):
    """The feature maps of a timm network, static or converted, at temperature 0.

    Parts that no map depends on, such as the classifier, are removed, so that every parameter gets
    a gradient.

    Args:
        network: a classification configuration (YAML), or a mapping with the keys of its
            ``model``; ``weights`` and ``freeze`` there apply only to the classifier's training.
        weights: weights to start from: the file of a classifier, converted or static, or of a
            detector, whose backbone is used; ``timm`` or ``timm:TAG``; or :class:`StartWeights`.
            Static weights are loaded before the network is converted, so that it computes the
            same, even if the network's own start is ``"paper"``. All tensors but the classifier's
            must fit. The moving average is used if a file has one.
        out_indices: the maps, as indices into the network's ``feature_info`` of timm; one more is
            the output of its last convolution (MobileNetV2). Default: all maps of stride 4 to 32.
        frozen_stages: -1 trains everything, 0 freezes the stem, n the stem and n stages. A
            warehouse is frozen if all layers that use it are.
        freeze: patterns of further parameters or modules of the network that do not train
            (:func:`kw.models.freezing.freeze`).
        norm_eval: BatchNorm, also in attention, uses its running statistics and keeps them.
        output_norm: LayerNorm over the channels of every map, as in ConvNeXt's detectors.
        grad_checkpointing: keep only the blocks' inputs for the backward pass
            (:mod:`kw.models.recompute`); also where the network's settings say so.
        drop_path_rate: replaces the classifier's; stochastic depth grows from 0 to this rate.
        resumes: a checkpoint will bring all weights: none are read, and the conversion need not
            keep any.

    Attributes:
        out_channels: channels of the maps.
        strides: pixels of the image per position of the maps.
        classifier: of a classifier's weights that it starts from, source and pixels (see
            :class:`StartWeights`); otherwise None.

    Raises:
        ConfigError: the network cannot be built, has no such maps or no stages to freeze.
        CheckpointError: the weights cannot be read or are of another network.
    """

    def __init__(
        self,
        network: str | Mapping[str, Any] | ModelConfig,
        weights: str | StartWeights | None = None,
        out_indices: Sequence[int] | None = None,
        frozen_stages: int = -1,
        freeze: Sequence[str] = (),
        norm_eval: bool = False,
        output_norm: bool = False,
        grad_checkpointing: bool = False,
        drop_path_rate: float | None = None,
        resumes: bool = False,
    ) -> None:
        super().__init__()
        config = read_network(network)
        grad_checkpointing |= config.gradient_checkpointing
        config = replace(config, weights=None, freeze=[], gradient_checkpointing=False)
        if drop_path_rate is not None:
            config.drop_path_rate = drop_path_rate
        if resumes:
            weights = None
        elif weights is not None and not isinstance(weights, StartWeights):
            weights = read_backbone(weights, config)
        built: Any
        if weights is None:
            built = start_network(config, resumes=resumes)
        else:
            built = _started(config, weights, out_indices)
        of_classifier = weights is not None and not weights.prefix
        self.classifier = (weights.source, weights.pixels) if weights and of_classifier else None
        self.network = built
        if not hasattr(self.network, "forward_intermediates"):
            raise ConfigError(f"model.backbone.network: timm's {config.name} has no feature maps")
        if has_temperature(self.network):
            set_temperature(self.network, 0.0)
        self.norm_eval = norm_eval
        self._choose_maps(config.name, out_indices)
        self._drop_unused(config.name)
        try:
            frozen = frozen_parameters(self.network, frozen_stages)
        except ValueError as error:
            raise ConfigError(f"model.backbone.frozen_stages: {error}") from error
        self._freeze(frozen, freeze)
        self.output_norms: Any = None
        if output_norm:
            self.output_norms = nn.ModuleList(nn.LayerNorm(c, eps=1e-6) for c in self.out_channels)
        if grad_checkpointing:
            try:
                recompute_blocks(built)
            except ValueError as error:
                raise ConfigError(f"model.backbone.grad_checkpointing: {error}") from error
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
        """Set training mode, except for frozen modules and, with ``norm_eval``, BatchNorm."""
        super().train(mode)
        for module in self._kept_in_eval:
            module.eval()
        if mode and self.norm_eval:
            for module in self.network.modules():
                if isinstance(module, BatchNorm):
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
        """Remove the modules that the maps do not use."""
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
                "dynamic_img_pad: true}, a Swin with {strict_img_size: false}"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        if any(map_.dim() != 4 for map_ in maps):
            raise ConfigError(f"model.backbone.out_indices: {name}'s last output is not a map")
        self.out_channels = [map_.shape[1] for map_ in maps]
        _remove(self.network, called)
        drop_unused_warehouses(self.network)

    def _freeze(self, frozen: set[str], patterns: Sequence[str]) -> None:
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(name not in frozen)
        freeze_by_name(self.network, patterns, "model.backbone")
        self._kept_in_eval += frozen_modules(self.network)


def read_network(
    network: str | Mapping[str, Any] | ModelConfig, folder: Path | None = None
) -> ModelConfig:
    """The ``model`` of a classification configuration.

    Args:
        network: a file, a mapping with the keys of ``model``, or a configuration.
        folder: folder of relative file names; those that it lacks are in the working directory.

    Raises:
        ConfigError: the file or the mapping is wrong.
    """
    if isinstance(network, ModelConfig):
        return network
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
    return check_tree(entry, Schema(ModelConfig))


def _started(
    config: ModelConfig, weights: StartWeights, out_indices: Sequence[int] | None
) -> nn.Module:
    """The whole network with weights, before parts are removed."""
    source, state = weights.source, weights.backbone
    converts = config.kernel_warehouse is not None or config.peer is not None
    if is_converted(state) and not converts:
        raise CheckpointError(
            f"{source} is of another model: converted, where this one is static; set "
            "model.backbone.network.kernel_warehouse (or peer) as it was converted"
        )
    if converts and not is_converted(state):
        config = _keeping(config, source)
    if weights.prefix:
        state = _with_unused(config, state, out_indices)
    network = start_network(config, state, source, keep_head=False)
    if weights.caffe_style and any(isinstance(m, Bottleneck) for m in network.modules()):
        raise CheckpointError(
            f"{source}: its configuration has a backbone with style='caffe', which strides in "
            f"the first convolution of a block; {config.name} strides in the second and would "
            "compute something else with the same weights: take one with style='pytorch'"
        )
    return network


def _keeping(config: ModelConfig, source: str) -> ModelConfig:
    """The configuration with a start that keeps static weights."""
    warehouse, peer = config.kernel_warehouse, config.peer
    settings = [warehouse, *warehouse.warehouses.values()] if warehouse is not None else [peer]
    if all(own is None or own.start != "paper" for own in settings):
        return config
    say(f"{source} are kept: the network's start 'paper', which replaces them, is not used")
    return with_start(config, "keep")


def _with_unused(
    config: ModelConfig, state: dict[str, Tensor], out_indices: Sequence[int] | None
) -> dict[str, Tensor]:
    """The weights of a detector's backbone, with fresh ones for parts that our maps do not use."""
    if not is_converted(state):
        config = replace(config, kernel_warehouse=None, peer=None)
    whole = build_network(config)
    state = with_names_now(whole, state)
    head = classifier_names(whole)
    own = {key: value for key, value in whole.state_dict().items() if not key.startswith(head)}
    if own.keys() <= state.keys():
        return state
    used = Backbone(config, out_indices=out_indices, resumes=True).network.state_dict()
    return {**{key: value for key, value in own.items() if key not in used}, **state}


def _remove(module: nn.Module, called: set[nn.Module]) -> None:
    """Replace modules that have parameters and were not called by identities."""
    for name, child in list(module.named_children()):
        if isinstance(child, Warehouse):  # held, not called
            continue
        inside = set(child.modules())
        if child in called or not any(True for _ in child.parameters()) or inside & called:
            _remove(child, called)
        else:
            setattr(module, name, nn.Identity())
