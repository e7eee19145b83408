"""Hugging Face transformers: ``from_pretrained`` repeats a conversion; a callback of ``Trainer``.

``config.json`` of a converted model has the plans and a model type that transformers knows once
this module is imported; without it ``AutoModel`` refuses the folder. The plans are applied where
layers of quantized models are replaced: the network is built, its weights are not yet loaded.
"""

from __future__ import annotations

import copy
from functools import cache, partial
from typing import Any

import torch

from ..errors import say
from ..warehouse.attention import KernelAttention, _restore_one_hot
from ..warehouse.temperature import find_warehouses, has_temperature
from .core import Recipe, host, plans_by_part, refuse_other, repeat

_TYPE = "kernelwarehouse"
hf = host("transformers", "5.24")
quantizers, settings = hf.quantizers, hf.utils.quantization_config


def convert(model: Any, recipe: Recipe | None = None, example: Any = None, part: str = "") -> Any:
    """Convert a ``PreTrainedModel`` in place, before ``Trainer`` or an optimizer is made.

    Args:
        model: any; its class, its attributes and the names of its modules stay.
        recipe: plan, settings and annealing; default: the derived plan, from the model's weights.
        example: for the plan ``"auto"``, inputs of the network. Default: images of the size in the
            model's configuration.
        part: the module that the plan is for, as ``"timm_model"``; default: the whole model.

    Raises:
        ValueError: as :func:`kw.convert`; a model that was converted by :mod:`kw.peers`.
    """
    size = getattr(model.config, "image_size", None)
    if example is None and size is not None and not part:
        channels = getattr(model.config, "num_channels", 3)
        example = torch.zeros(2, channels, *((size, size) if isinstance(size, int) else size))
    (recipe or Recipe()).convert(model.get_submodule(part), example)
    if not plans_by_part(model):
        raise ValueError("the model was not converted by kw.convert, so that no plan can be saved")
    return _marked(model)


class KernelWarehouse(hf.TrainerCallback):  # type: ignore[name-defined]
    """Sets the temperature before every update of a ``Trainer``, by the conversion's recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        model, optimizer = given["model"], given["optimizer"]
        if args.fsdp or args.deepspeed:
            raise ValueError("layers share their cells, which FSDP and DeepSpeed split; use DDP")
        known = {id(p) for p in model.parameters()}
        trained = {
            id(p) for g in (optimizer.param_groups if optimizer else ()) for p in g["params"]
        }
        if not has_temperature(model) or not trained <= known:
            raise ValueError(
                f"{type(model).__name__} was not converted before the optimizer was made: "
                "kw.integrations.transformers.convert(model, recipe), then Trainer(model, ...); "
                "with model_init=, in that function"
            )
        if self.recipe.anneal and not hasattr(given["train_dataloader"].dataset, "__len__"):
            raise ValueError("anneal is in epochs, but the training data has no length")
        plans = plans_by_part(model)
        # What a checkpoint has of its callbacks.
        if _TYPE in state.stateful_callbacks:
            refuse_other(state.stateful_callbacks[_TYPE], plans)
        elif state.global_step:
            say("the checkpoint does not say how its model was converted: it is not compared")
        self.recipe.check(state.num_train_epochs, None if state.global_step else model)
        state.stateful_callbacks[_TYPE] = plans

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.recipe.set_temperature(state.epoch or 0, given["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.recipe.end(given["model"])


@quantizers.register_quantization_config(_TYPE)
class _Plans(settings.QuantizationConfigMixin):  # type: ignore[name-defined]
    """The plans in ``config.json``, by the module they are for."""

    def __init__(self, plans: dict[str, Any], quant_method: str = _TYPE, **_: Any) -> None:
        self.plans, self.quant_method = plans, quant_method


@quantizers.register_quantizer(_TYPE)
class _Loader(quantizers.HfQuantizer):  # type: ignore[name-defined]
    """Repeats the conversion in ``from_pretrained``; the model keeps nothing of it."""

    is_serializable = is_trainable = True  # the model is what saves and trains

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        for part, plans in self.quantization_config.plans.items():
            repeat(model.get_submodule(part), plans)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for module in model.modules():
            if isinstance(module, KernelAttention):
                _restore_one_hot(module)
        loaded = "_is_hf_initialized"
        if lost := [w.name for w in find_warehouses(model) if not hasattr(w.weight, loaded)]:
            raise ValueError(f"the file of weights lacks the cells of {', '.join(lost)}")
        self.remove_quantization_config(model)
        for module in model.modules():
            getattr(module, "config", self).__dict__.pop("_is_quantized", None)
        return _marked(model)


class _Config(hf.PreTrainedConfig):  # type: ignore[name-defined]
    """Reads the configuration of a converted model as that of the static one, with the plans."""

    model_type = _TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        kind = hf.CONFIG_MAPPING[config_dict["static_model_type"]]
        return kind.from_dict({**config_dict, "model_type": kind.model_type}, **kwargs)


hf.AutoConfig.register(_TYPE, _Config)


@cache
def _writes_plans(kind: Any) -> Any:
    """A configuration that :class:`_Config` reads. Its name stays: models are found by it."""

    def to_dict(self: Any) -> dict[str, Any]:
        types = {"model_type": _TYPE, "static_model_type": kind.model_type}
        return {**kind.to_dict(self), **types}

    return type(kind.__name__, (kind,), {"to_dict": to_dict, "__module__": __name__})


def _marked(model: Any) -> Any:
    """Let ``save_pretrained`` write the plans, and the names that the model has: for some models
    transformers writes older ones, which ``Trainer`` does not find when it resumes."""
    model.config = config = copy.deepcopy(model.config)
    if type(config).__module__ != __name__:
        config.__class__ = _writes_plans(type(config))  # type: ignore[arg-type]
    config.__dict__.pop("model_type", None)  # the file's; the class has its own
    config.quantization_config = _Plans(plans_by_part(model))
    save = partial(type(model).save_pretrained, model, save_original_format=False)
    model.__dict__["save_pretrained"] = save  # in place of kw.convert's refusal
    model.register_load_state_dict_post_hook(_refuse_parts)
    return model


def _refuse_parts(model: Any, keys: Any) -> None:
    """``Trainer`` loads what it finds."""
    if lost := [name for name in keys.missing_keys if name.endswith("warehouse.weight")]:
        raise ValueError(f"these weights are of another conversion: they lack {', '.join(lost)}")
