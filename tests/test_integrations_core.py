"""The adapters' shared part: conversion once, the temperature at every step, plans that repeat."""

import copy
import json
import re
import subprocess
import sys

import numpy
import pytest
import timm
import torch
from processes import Forked

import kw
from kw.integrations.core import Recipe, host, plans_by_part, plans_of, repeat
from kw.warehouse.temperature import fold_temperature


def network():
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=5)


@pytest.mark.parametrize("plan", ["auto", "resnet18"])
def test_a_recipe_converts_once_and_keeps_the_function(plan, capsys):
    model, images = network().eval(), torch.rand(2, 3, 64, 64)
    before = model(images)
    recipe = Recipe(plan, {"cell_num_ratio": 2})
    assert recipe.convert(model, images) is model
    torch.testing.assert_close(model(images), before, rtol=1e-5, atol=1e-5)
    state = copy.deepcopy(model.state_dict())
    capsys.readouterr()
    recipe.convert(model, images)
    assert "converted already" in capsys.readouterr().err
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("plan", ["auto", "resnet18"])
def test_plans_in_json_repeat_a_conversion(plan):
    first = Recipe(plan, {"cell_num_ratio": 2}).convert(network(), torch.rand(2, 3, 64, 64))
    plans = json.loads(json.dumps(plans_of(first)))
    second = repeat(network(), plans)
    second.load_state_dict(first.state_dict())
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(first.eval()(images), second.eval()(images))
    assert plans_of(second) == plans
    assert plans_of(network()) == []


def test_an_annealed_recipe_sets_network_and_average():
    recipe = Recipe("resnet18", anneal=4)
    model = recipe.convert(network())
    average = copy.deepcopy(model)
    assert recipe.set_temperature(1, model, average, None) == 0.75
    assert kw.get_temperature(model) == kw.get_temperature(average) == 0.75
    assert recipe.set_temperature(5.5, model) == 0
    kept = Recipe("resnet18").convert(network())
    assert Recipe("resnet18").set_temperature(0, kept) == 0


@pytest.mark.parametrize(
    ("anneal", "epoch", "said"), [(4, 3, "temperature 0.25, before 4"), (4, 4, ""), (0, 0, "")]
)
def test_a_run_that_ended_before_its_annealing_says_so(anneal, epoch, said, capsys):
    recipe = Recipe("resnet18", anneal=anneal)
    model = recipe.convert(network())
    recipe.set_temperature(epoch, model)
    capsys.readouterr()
    recipe.end(model)
    printed = capsys.readouterr().err
    assert (said in printed) if said else not printed


def test_annealing_is_refused_where_it_would_not_end_or_would_spoil_weights():
    recipe = Recipe("resnet18", anneal=4)
    model = recipe.convert(network())
    recipe.check(4, model)
    assert recipe.convert(model) is model  # still at its start
    with pytest.raises(ValueError, match="anneal is 4 epochs; the run has 3"):
        recipe.check(3)
    for trained in (Recipe("resnet18").convert(network()), model):
        recipe.set_temperature(4, trained)
        with pytest.raises(ValueError, match=r"at temperature 0, .*with anneal=0"):
            recipe.convert(trained)
        Recipe().check(1, trained)


def test_a_network_without_a_temperature_is_not_converted_again(capsys):
    model = fold_temperature(Recipe("resnet18").convert(network()))
    before = [type(module) for module in model.modules()]
    Recipe("resnet18").convert(model)
    assert "converted already" in capsys.readouterr().err
    assert [type(module) for module in model.modules()] == before


def test_plans_have_plain_types_and_the_parts_they_are_for():
    model = torch.nn.Sequential(network(), network())
    for part in model:
        kw.convert(part, "resnet18", reduction=numpy.float64(0.125))
    found = plans_by_part(model)
    assert list(found) == ["0", "1"]
    assert type(found["0"][0]["reduction"]) is float
    assert found["1"] == plans_of(model[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"anneal": -1}, "anneal is -1"),
        ({"anneal": float("nan")}, "anneal is nan"),
        ({"anneal": 2, "settings": {"start": "keep"}}, "drop one"),
    ],
)
def test_bad_recipes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**arguments)


ADAPTERS = {
    "lightning": r"lightning 2\.6 or later.*; .*pytorch_lightning 2\.6",
    "transformers": r"transformers 5\.24 or later",
    "nnunet": r"nnunetv2 2\.8 or later",
}


def test_a_broken_host_breaks_its_adapter_alone(tmp_path, monkeypatch):
    """Installed in part: it raises when it is imported."""
    monkeypatch.setattr(subprocess, "Popen", Forked)
    hosts = ("lightning", "pytorch_lightning", "transformers", "nnunetv2")
    for name in hosts:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('half of it')")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import importlib, kw, kw.integrations.core\n"
        "for name in list(sys.modules):\n"
        f"    if name.split('.')[0] in {hosts} or name.startswith('kw.integrations.'):\n"
        "        del sys.modules[name]\n"
        f"for name in {[*ADAPTERS]}:\n"
        "    try: importlib.import_module(f'kw.integrations.{name}')\n"
        "    except ImportError as error: print(error)"
    )
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for line, expected in zip(said.splitlines(), ADAPTERS.values(), strict=True):
        assert re.search(expected, line)
        assert "RuntimeError: half of it" in line


def test_a_host_that_is_missing_or_too_old_is_said():
    with pytest.raises(ImportError, match=r"no_such_host 1\.2 or later, which cannot be imported"):
        host("no_such_host", "1.2")
    with pytest.raises(ImportError, match=r"torch 99\.0 or later; found .*pip install 'torch>=99"):
        host("torch", "99.0")
    assert host("torch", "2.6") is torch
