"""What ``convert`` refuses: each message names the facts, and the model is left as it was."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from networks import chain, narrow_resnet, plan_of
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune

from kw import convert, peers
from kw.registry import PLANS
from kw.warehouse import (
    KWConv2d,
    Plan,
    Rule,
)


def refusal(model, plan, **overrides):
    """The message of the refusal, after which the model must be what it was."""
    before = [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)]
    tensors = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"\w") as error:
        convert(model, plan, **overrides)
    after = [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)]
    assert after == before
    for name, parameter in model.named_parameters():
        assert id(parameter) == tensors[name][0]
        assert torch.equal(parameter, tensors[name][1])
    return str(error.value)


def test_names_must_match_as_a_whole():
    message = refusal(chain(nn.Conv2d(4, 4, 1)), plan_of(("a.", "w")))
    assert "'a.' matches no layer" in message


@pytest.mark.parametrize("name", ["resnet81", "resnet", "ResNet18"])
def test_unknown_plan(name):
    message = refusal(narrow_resnet(), name)
    assert f"plan {name!r} is unknown" in message
    assert "'resnet18'" in message


def test_rule_without_a_layer():
    plan = plan_of((r"layer1\.0\.conv1", "w"), (r"layer1.0.cnv2", "w"))
    message = refusal(narrow_resnet(), plan)
    for fact in ("'layer1.0.cnv2'", "matches no layer of ResNet", "nearest: 'layer1.0.conv2'"):
        assert fact in message


def test_a_converted_model_has_no_layers_left():
    message = refusal(convert(narrow_resnet(), "resnet18"), "resnet18")
    assert "matches no layer of ResNet" in message


def test_layer_claimed_by_two_rules():
    model = chain(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    message = refusal(model, plan_of(("[ab]", "first"), ("b", "second")))
    for fact in ("layer 'b'", "'first'", "'[ab]'", "'second'", "narrow"):
        assert fact in message


def test_layer_claimed_twice_for_one_warehouse():
    message = refusal(chain(nn.Conv2d(4, 4, 1)), plan_of(("a", "w"), ("[ab]", "w")))
    for fact in ("layer 'a'", "'w'", "'[ab]'", "narrow"):
        assert fact in message


@pytest.mark.parametrize("match", ["a|b", "a", "b"])
def test_module_that_stands_twice_in_the_network(match):
    """Also where the plan names one place only: replacing it there would untie the two."""
    conv = nn.Conv2d(4, 4, 1)
    message = refusal(chain(conv, conv, nn.Conv2d(4, 4, 1)), plan_of((match, "w"), ("c", "v")))
    for fact in ("layer 'a'", "'b'", "warehouse 'w'", "same module", "static"):
        assert fact.replace("layer 'a'", "'a'") in message


def test_shared_module_may_stay_static():
    conv = nn.Conv2d(4, 4, 1)
    model = convert(chain(conv, conv, nn.Conv2d(4, 4, 1)), plan_of(("c", "w")))
    assert model.a is model.b is conv


class OwnConv(nn.Conv2d):
    """A subclass may compute something else."""


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.ConvTranspose2d(4, 4, 1), "ConvTranspose2d"),
        (nn.Embedding(4, 4), "Embedding"),
        (OwnConv(4, 4, 1), "OwnConv"),
        (nn.LazyConv2d(4, 1), "LazyConv2d"),
        (nn.Bilinear(4, 4, 4), "Bilinear"),
    ],
)
def test_unconvertible_type(layer, kind):
    model = nn.Module()
    model.first, model.odd = nn.Conv2d(4, 4, 1), layer
    plan = plan_of(("first|odd", "w"))
    with pytest.raises(ValueError, match=r"layer 'odd' is a") as error:
        convert(model, plan)
    for fact in (kind, "Conv1d, Conv2d, Conv3d, Linear", "static: true", "before"):
        assert fact in str(error.value)
    assert type(model.first) is nn.Conv2d
    assert model.odd is layer
    convert(model, plan_of(("first", "w")))
    assert type(model.first) is KWConv2d


@pytest.mark.parametrize(
    ("compute", "part"),
    [
        (nn.utils.parametrizations.weight_norm, "weight"),
        (nn.utils.spectral_norm, "weight"),
        (partial(prune.random_unstructured, name="bias", amount=0.5), "bias"),
    ],
    ids=["parametrized", "hooked", "pruned"],
)
def test_parts_that_are_computed(compute, part):
    """Converting would silently drop what computes them."""
    model = chain(nn.Conv2d(4, 4, 1), compute(nn.Conv2d(4, 4, 1)))
    with pytest.raises(ValueError, match=f"{part} of layer 'b' is no parameter") as error:
        convert(model, plan_of(("[ab]", "w")))
    assert "remove that first" in str(error.value)
    with pytest.raises(ValueError, match=f"layer 'b' is with a computed {part}"):
        peers.convert(model, "dyconv", layers="[ab]")
    assert type(model.a) is nn.Conv2d


def doubled(layer):
    """As adapters and offloading wrap a layer."""
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)
    return layer


def test_a_layer_whose_forward_method_is_replaced():
    """The layer in its place would not compute what the method does."""
    model = chain(nn.Conv2d(4, 4, 1), doubled(nn.Conv2d(4, 4, 1)))
    message = refusal(model, plan_of(("[ab]", "w")))
    for fact in ("forward method of layer 'b' is replaced", "remove that first"):
        assert fact in message
    with pytest.raises(ValueError, match="layer 'b' is a Conv2d whose forward method is replaced"):
        peers.convert(model, "dyconv", layers="[ab]")
    assert type(model.a) is nn.Conv2d
    model.b.forward = nn.Conv2d.forward.__get__(model.b)  # as accelerate puts it back
    convert(model, plan_of(("[ab]", "w")))


@pytest.mark.parametrize("wrap", [DistributedDataParallel, fully_shard])
def test_a_network_that_is_distributed_already(wrap, tmp_path):
    """Nothing would average the gradients of the new parameters."""
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = wrap(chain(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)))
        with pytest.raises(ValueError, match=r"convert (it|the network) first"):
            convert(model, plan_of((r"(module\.)?[ab]", "w")))
        with pytest.raises(ValueError, match=r"convert (it|the network) first"):
            peers.convert(model, "odconv")
    finally:
        dist.destroy_process_group()


def test_static_rule_too_late():
    rules = [{"match": "[ab]", "warehouse": "w"}, {"match": "b", "static": True}]
    message = refusal(chain(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)), {"rules": rules})
    for fact in ("layer 'b'", "'w'", "'[ab]'", "static", "first"):
        assert fact in message


def test_plan_of_static_rules_only():
    message = refusal(chain(nn.Conv2d(4, 4, 1)), {"rules": [{"match": "a", "static": True}]})
    assert "every layer" in message
    assert "'warehouse'" in message


def test_settings_that_two_rules_give_differently():
    rules = [
        {"match": "a", "warehouse": "w", "attention": "softmax"},
        {"match": "b", "warehouse": "w", "attention": "sigmoid"},
    ]
    model = chain(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    message = refusal(model, {"rules": rules})
    for fact in ("rule 'b'", "'w'", "'warehouses'"):
        assert fact in message
    rules[1]["attention"] = "softmax"
    assert convert(model, {"rules": rules}).b.attention.function == "softmax"


@pytest.mark.parametrize(
    ("plan", "overrides", "facts"),
    [
        ({"cell_num_ration": 2}, {}, ["plan:", "'cell_num_ration'", "'cell_num_ratio'"]),
        ({}, {"cell_num_ration": 2}, ["convert:", "'cell_num_ration'", "'cell_num_ratio'"]),
        ({}, {"colour": "red"}, ["convert:", "'colour'", "reduction"]),
        (
            {"warehouses": {"w": {"nrom": "layer"}}},
            {},
            ["warehouse 'w'", "'nrom'", "did you mean 'norm'"],
        ),
        ({}, {"warehouses": {"w": {"nrom": 1}}}, ["warehouse 'w'", "did you mean 'norm'"]),
        ({"warehouses": {"v": {"norm": "layer"}}}, {}, ["warehouse 'v'", "nearest: 'w'"]),
        ({}, {"warehouses": {"v": {"norm": "layer"}}}, ["warehouse 'v'", "nearest: 'w'"]),
        ({}, {"norm": "group"}, ["'w'", "layer 'a'", "'group'", "'batch' or 'layer'"]),
        ({}, {"cell_num_ratio": 1.5}, ["'w'", "'a'", "1.5", "1 / integer"]),
        ({}, {"cell_inplane_ratio": 0.75}, ["'w'", "'a'", "cell_inplane_ratio", "1 / integer"]),
        ({}, {"cell_num_ratio": 0.5}, ["'w'", "'a' 9", "multiple of 4"]),
    ],
)
def test_settings_that_cannot_be(plan, overrides, facts):
    message = refusal(chain(nn.Conv2d(16, 8, 3)), plan_of(("a", "w"), **plan), **overrides)
    for fact in facts:
        assert fact in message


@pytest.mark.parametrize(
    ("rules", "facts"),
    [
        (None, ["'rules'", "at least one"]),
        ([], ["'rules'", "at least one"]),
        ("conv", ["'rules'", "list"]),
        ([{"warehouse": "w"}], ["no 'match'"]),
        ([{"match": 3, "warehouse": "w"}], ["no 'match'"]),
        ([{"match": "a"}], ["'a'", "'warehouse: NAME'", "'static: true'"]),
        ([{"match": "a", "warehouse": "w", "static": True}], ["either"]),
        ([{"match": "a", "static": "yes"}], ["either"]),
        ([{"match": "a", "warehouse": "w", "nrom": 1}], ["rule 'a'", "did you mean 'norm'"]),
        ([{"match": "(a", "warehouse": "w"}], ["match '(a'", "regular expression"]),
        ([{"match": "a", "warehouse": "w", "handover": "["}], ["handover '['"]),
        ([{"match": "a", "static": True, "handover": "a"}], ["handover", "no warehouse"]),
        ([{"match": "a", "warehouse": "w{stage}"}], ["{stage}", "(?P<stage>...)"]),
        ([{"match": "a", "warehouse": "w.1"}], ["'w.1'", "without dots"]),
        ([{"match": "a", "warehouse": ""}], ["'' cannot name"]),
    ],
)
def test_rules_that_are_none(rules, facts):
    message = refusal(chain(nn.Conv2d(4, 4, 1)), {"rules": rules})
    for fact in facts:
        assert fact in message


def test_handover_without_a_warehouse_before():
    rule = Rule(r"(?P<own>[ab])", "{own}", "a")
    message = refusal(chain(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)), Plan((rule,)))
    for fact in ("layer 'a'", "before 'a'", "narrow 'handover'"):
        assert fact in message


def test_unequal_kernels_that_are_to_stay_whole():
    model = chain(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1))
    message = refusal(model, plan_of(("[ab]", "w"), spatial_partition=False))
    for fact in ("'w'", "'a' 3x3", "'b' 1x1", "spatial_partition"):
        assert fact in message


def test_the_last_of_many_warehouses_refused_leaves_the_rest_alone():
    message = refusal(narrow_resnet(), "resnet18", warehouses={"layer4": {"cell_num_ratio": 1.5}})
    assert "'layer4'" in message


def test_second_conversion_under_a_name_that_is_taken():
    model = convert(chain(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)), plan_of(("a", "w")))
    message = refusal(model, plan_of(("b", "w")))
    assert "already has a warehouse 'w'" in message


def test_attribute_warehouses_of_the_models_own():
    model = chain(nn.Conv2d(4, 4, 1))
    model.warehouses = nn.Identity()
    assert "'warehouses' of its own" in refusal(model, plan_of(("a", "w")))


def test_a_single_layer_cannot_be_converted():
    assert "matches no layer of Conv2d" in refusal(nn.Conv2d(4, 4, 1), plan_of((".*", "w")))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"rules": [{"match": "0", "warehouse": 3}]}, "warehouse is 3, expected a string"),
        ({"rules": [{"match": "0", "warehouse": "w", "handover": ["1"]}]}, "handover is"),
        ({"rules": ["0"]}, "every rule must be a mapping"),
        ({"rules": [{"match": "0", "warehouse": "w"}], "warehouses": [3]}, "must map names"),
        ({"rules": [{"match": "0", "warehouse": "w"}], "warehouses": {"w": 3}}, "must map names"),
        ({"rules": [{"match": "0", "warehouse": "w"}], "cell_num_ratio": "4"}, "a number"),
        ({"rules": [{"match": "0", "warehouse": "w"}], "spatial_partition": "no"}, "true or false"),
        ({"rules": [{"match": "(?P<s>x)?0", "warehouse": "w{s}"}]}, "does not catch in '0'"),
        (
            {"rules": [{"match": "0", "static": True}, {"match": "0", "warehouse": "w"}]},
            "reaches no layer",
        ),
        (None, "expected a name"),
    ],
)
def test_plans_of_wrong_form_are_refused(plan: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(nn.Sequential(nn.Conv2d(4, 4, 3)), plan)


def test_a_plans_whole_number_is_a_number_like_another():
    """mobilenetv2_4x sets a ratio of 4; another one may be a fraction."""
    settings = PLANS["mobilenetv2_4x"].settings
    assert settings.with_overrides({"cell_num_ratio": 0.5}, "convert").cell_num_ratio == 0.5
    with pytest.raises(ValueError, match="cell_num_ratio is 'four', expected a number"):
        settings.with_overrides({"cell_num_ratio": "four"}, "convert")
