"""The papers' models under their own names in timm.

Importing this module registers them; :mod:`kw.models.timm_names` does so once timm is imported::

    import kw, timm

    timm.create_model("kw_resnet50_4x", num_classes=10)
    timm.create_model("kw_resnet50_4x", features_only=True)
    timm.create_model("kw_resnet50_4x", pretrained=True, num_classes=10)
    weights = {"file": "best.pth"}
    timm.create_model("kw_resnet50_4x", pretrained=True, pretrained_cfg_overlay=weights)
    timm.create_model("hf-hub:user/model", pretrained=True)  # that kw push wrote

``pretrained=True`` takes the weights that timm has for the static network, and converts it with
them: no weights of converted networks are hosted. A file may hold either, the static network's or
the converted one's. A network is at temperature 0 until the weights or :func:`kw.set_temperature`
set another. ``start="paper"`` initialises it at random for training with annealing;
``anneal=N`` does, too, and lets the temperature fall by itself over N forward passes in training
(:func:`kw.warehouse.anneal`), for training scripts that know nothing of it.

``kernelwarehouse`` is the architecture of the other networks that ``kw push`` publishes: their
``config.json`` has the ``model`` of a configuration among its ``model_args``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from timm.models import build_model_with_cfg, get_pretrained_cfg, register_model
from torch import nn

from ..config.checking import Schema, check_tree
from ..config.schema import ModelConfig
from ..config.tree import Origin, entry_from_plain
from ..errors import say
from ..hub import PREFIX, WEIGHTS, weights_file
from ..warehouse import convert, drop_unused_warehouses, temperature
from .paper_models import PAPER_MODELS, PaperModel
from .weights import is_converted, load_start, read_weights

# Backbones whose feature maps are not timm's usual five: ConvNeXt's four, DeiT's last three blocks.
_OUT_INDICES: dict[str, Any] = {"convnext_tiny": (0, 1, 2, 3), "deit": 3}
_OWN = ("drop_rate", "drop_path_rate")


def _default_cfg(released: PaperModel) -> dict[str, Any]:
    """timm's configuration of the static network, without weights and their test settings."""
    static = get_pretrained_cfg(released.backbone, allow_unregistered=False)
    of_the_network = ("first_conv", "classifier", "pool_size", "fixed_input_size")
    return {
        "input_size": (3, 224, 224),
        "num_classes": 1000,
        "crop_pct": 0.875,
        "interpolation": "bilinear" if "mobilenet" in released.backbone else "bicubic",
        **{key: getattr(static, key) for key in of_the_network},
    }


def _entrypoint(name: str, released: PaperModel) -> Callable[..., nn.Module]:
    """The function that ``timm.create_model`` calls for a name."""

    def create(
        pretrained: bool = False, start: str | None = None, anneal: int = 0, **kwargs: Any
    ) -> nn.Module:
        if anneal and (pretrained or start == "keep"):
            raise ValueError(
                f"{name}: anneal={anneal} is the paper's training from nothing, at temperature 1 "
                "first; drop it, or pretrained=True and start='keep'"
            )
        start = start or ("paper" if anneal else "keep")
        file = _file(kwargs) if pretrained else None
        state = None if file is None else read_weights(file)
        has_all = state is not None and is_converted(state)
        settings: dict[str, Any] = {**released.settings, "start": "paper" if has_all else start}

        def converted(**arguments: Any) -> nn.Module:
            from_hub = pretrained and file is None
            network: Any = timm.create_model(
                released.backbone,
                pretrained=from_hub,
                cache_dir=kwargs.get("cache_dir"),  # which build_model_with_cfg does not pass on
                **arguments,
            )
            if from_hub and network.num_classes not in (0, network.pretrained_cfg["num_classes"]):
                say(f"{name}: the classifier of {network.num_classes} classes starts afresh")
            if state is not None and not has_all:
                load_start(network, state, str(file))
            network = convert(network, released.plan, announce=not has_all, **settings)
            if state is not None and has_all:
                load_start(network, state, str(file))
            return network

        feature_cfg: dict[str, Any] = {"feature_cls": kwargs.pop("feature_cls", "getter")}
        if released.plan in _OUT_INDICES:
            feature_cfg["out_indices"] = _OUT_INDICES[released.plan]
        model = build_model_with_cfg(
            converted,
            name,
            False,  # `converted` has loaded the weights already, with stricter checks than timm's
            feature_cfg=feature_cfg,
            **kwargs,
        )
        drop_unused_warehouses(model)  # features_only cuts off the last stages
        return temperature.anneal(model, anneal) if anneal else model

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"timm's {released.backbone}, converted by the plan {released.plan!r}."
    return create


def _file(arguments: dict[str, Any]) -> str | None:
    """The file of weights in the arguments of ``timm.create_model``, if there is one."""
    overlay: Any = arguments.get("pretrained_cfg_overlay") or {}
    for key in ("state_dict", "url", "hf_hub_id", "custom_load"):
        if overlay.get(key):
            raise ValueError(f"pretrained_cfg_overlay has {key!r}; give weights as 'file'")
    config: Any = arguments.get("pretrained_cfg")
    source = config if isinstance(config, dict) else getattr(config, "__dict__", {})
    named = overlay.get("file") or source.get("file")
    if named is None and source.get("hf_hub_id"):
        return str(weights_file(PREFIX + source["hf_hub_id"], arguments.get("cache_dir")))
    # timm's local-dir: names a folder.
    return str(Path(named, WEIGHTS)) if named and Path(named).is_dir() else named


def kernelwarehouse(
    pretrained: bool = False, model: Mapping[str, Any] | None = None, **kwargs: Any
) -> nn.Module:
    """Any classifier of this project; ``model`` is its configuration's, from a config.json."""
    if model is None:
        raise ValueError(
            "kernelwarehouse: expected hf-hub:user/model or local-dir:FOLDER, whose config.json "
            "says which network it is (kw push writes it), or model={'name': ..., ...}"
        )
    from .build import build_network, without_sources  # it imports timm, which imports this module

    file = _file(kwargs) if pretrained else None

    def build(num_classes: int, **arguments: Any) -> nn.Module:
        own = {key: arguments.pop(key) for key in _OWN if key in arguments}
        if num_classes > 0:
            own["num_classes"] = num_classes
        if arguments.get("in_chans") == model.get("timm_args", {}).get("in_chans", 3):
            del arguments["in_chans"]  # which timm adds, and a user's network may not take
        config = _network_config({**model, **own}, arguments)
        network: Any = build_network(without_sources(config))
        if file is not None:
            load_start(network, read_weights(file), file)
        if num_classes == 0:
            network.reset_classifier(0)
        return network

    built = build_model_with_cfg(
        build, "kernelwarehouse", False, feature_cfg={"feature_cls": "getter"}, **kwargs
    )
    return drop_unused_warehouses(built)


@dataclass
class _Network:
    model: ModelConfig = field(metadata={"doc": "the network"})


def _network_config(model: Mapping[str, Any], timm_args: Mapping[str, Any]) -> ModelConfig:
    """The checked settings of a network, with further arguments of timm's."""

    def rules(found: _Network, expect: Any) -> None:
        # Another repository's name, for one.
        expect(timm.is_model(found.model.name), "a name of timm.list_models()", "model.name")

    tree = entry_from_plain({"model": dict(model)}, Origin("config.json"))
    config = check_tree(tree, Schema(_Network, rules)).model
    config.timm_args.update(timm_args)
    return config


# timm looks a model's configuration up in its module, under this name.
default_cfgs = {name: _default_cfg(released) for name, released in PAPER_MODELS.items()}

for _name, _released in PAPER_MODELS.items():
    register_model(_entrypoint(_name, _released))
register_model(kernelwarehouse)
