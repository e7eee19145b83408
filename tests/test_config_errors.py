"""A user's mistakes in a configuration: each is one line with file, key, value and remedy."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest

from kw.config import ConfigError, config_from_mapping, load_config

KERNEL_WAREHOUSE = {"plan": "resnet18"}
MINIMAL: dict[str, Any] = {
    "model": {"name": "resnet18"},
    "data": {"root": "images"},
    "optimizer": {"lr": 0.1},
    "epochs": 10,
    "total_batch_size": 8,
    "batch_size": 8,
}
MINIMAL_YAML = """\
model:
  name: resnet18
data: {root: images}
optimizer:
  lr: 0.1
epochs: 10
total_batch_size: 8
batch_size: 8
"""


def problems_of(changes: dict[str, Any]) -> list[str]:
    """What is wrong with the minimal configuration once dotted keys are set."""
    mapping = copy.deepcopy(MINIMAL)
    for key, value in changes.items():
        *groups, name = key.split(".")
        inner = mapping
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[name] = value
    with pytest.raises(ConfigError) as error:
        config_from_mapping(mapping, "here", check_model_name=False)
    return list(error.value.problems)


def file_problems(folder: Path, text: str, *options: str) -> list[str]:
    path = folder / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path, options, check_model_name=False)
    return [problem.replace(f"{folder}/", "") for problem in error.value.problems]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("epochs", 2.0, "epochs = 2.0: expected an integer >= 1"),
        ("epochs", True, "epochs = true: expected an integer >= 1"),
        ("epochs", "ten", "epochs = 'ten': expected an integer >= 1"),
        ("epochs", 0, "epochs = 0: expected an integer >= 1"),
        ("epochs", None, "epochs = null: expected an integer >= 1"),
        ("optimizer.lr", "0.1x", "optimizer.lr = '0.1x': expected a number > 0"),
        ("optimizer.lr", False, "optimizer.lr = false: expected a number > 0"),
        ("optimizer.lr", 0, "optimizer.lr = 0: expected a number > 0"),
        ("optimizer.lr", float("nan"), "optimizer.lr = nan: expected a finite number > 0"),
        ("optimizer.lr", 10**400, "expected a number > 0"),
        ("optimizer.clip_grad", float("inf"), "expected a finite number > 0 or null"),
        ("optimizer.momentum", 1, "optimizer.momentum = 1: expected a number >= 0 and < 1"),
        ("compile", 1, "compile = 1: expected true or false"),
        ("compile", "yes", "compile = 'yes': expected true or false"),
        ("data.root", 5, "data.root = 5: expected a string"),
        ("data.auto_augment", 1, "data.auto_augment = 1: expected a string or null"),
        ("data", "images", "data = 'images': expected a mapping of settings (root, input_size, "),
        ("schedule", None, "schedule = null: expected a mapping of settings (name, "),
        ("model.timm_args", [1], "model.timm_args = [1]: expected a mapping"),
        ("model.timm_args", {"a": {1}}, "model.timm_args.a = {1}: expected plain values: text"),
        ("data.mean", 0.5, "data.mean = 0.5: expected a list of numbers, each >= 0 and <= 1"),
        ("data.mean", [0.5], "data.mean = [0.5]: expected a list of 3 numbers"),
        (
            "data.std",
            [1, 1, 0],
            "data.std = [1, 1, 0]: expected a list of numbers, each >= 1e-06",
        ),
        ("data.mean", [0, 0, "a"], "data.mean = [0, 0, 'a']: expected a list of numbers"),
        ("optimizer.betas", [0.9, 1], "expected a list of 2 numbers, each >= 0 and < 1"),
        ("data.crop_scale", [0.1, 2], "expected a list of 2 numbers, each > 0 and <= 1"),
        (
            "optimizer.name",
            "adamm",
            "optimizer.name = 'adamm': expected another name: optimizer 'adamm' is unknown",
        ),
        (
            "model.kernel_warehouse",
            "resnet18",
            "model.kernel_warehouse = 'resnet18': expected a mapping of settings (plan, ",
        ),
        (
            "model.kernel_warehouse",
            {"plan": 3},
            "model.kernel_warehouse.plan = 3: expected a string or a mapping",
        ),
        (
            "model.kernel_warehouse",
            {"plan": "resnet18", "warehouses": {"layer1": {"reduction": 0}}},
            "warehouses.layer1.reduction = 0: expected a number > 0 and <= 64 or null",
        ),
    ],
)
def test_wrong_value(key: str, value: object, expected: str) -> None:
    (problem,) = problems_of({key: value})
    assert problem.startswith(f"here: {key}")
    assert expected in problem


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("epoch", "did you mean epochs?"),
        ("lr", "did you mean optimizer.lr?"),
        ("optimizer.learning_rate", "valid in optimizer: name, lr, weight_decay"),
        ("optimizer.weigth_decay", "did you mean optimizer.weight_decay?"),
        ("data.random_erasing.prob", "did you mean data.random_erasing.probability?"),
        ("_base_", "valid here: model, data"),
    ],
)
def test_unknown_key(key: str, nearest: str) -> None:
    (problem,) = problems_of({key: 1})
    assert problem.startswith(f"here: {key} = 1: expected a known key")
    assert nearest in problem


def test_unknown_settings_of_the_conversion() -> None:
    conversion = {"plan": "resnet18", "cell_ratio": 1, "warehouses": {"layer1": {"rank": 2}}}
    problems = problems_of({"model.kernel_warehouse": conversion})
    assert len(problems) == 2
    assert "model.kernel_warehouse.cell_ratio = 1: expected a known key" in problems[0]
    assert "model.kernel_warehouse.warehouses.layer1.rank = 2: expected a known key" in problems[1]


def test_dotted_key_in_a_file(tmp_path: Path) -> None:
    (problem,) = file_problems(tmp_path, MINIMAL_YAML + "optimizer.eps: 1e-6\n")
    assert problem.startswith("mine.yaml:9: optimizer.eps = 1e-06: ")
    assert "write optimizer: {eps: ...}" in problem


def test_missing_keys_come_with_examples(tmp_path: Path) -> None:
    problems = file_problems(tmp_path, "model:\n  kernel_warehouse: {}\n")
    missing = ["model.name", "model.kernel_warehouse.plan", "data.root", "optimizer.lr", "epochs"]
    missing += ["total_batch_size", "batch_size"]
    assert len(problems) == len(missing)
    for problem, key in zip(problems, missing, strict=True):
        assert f": {key} is missing: expected " in problem
        assert f", e.g. {key}: " in problem
    assert problems[2].startswith("mine.yaml: data.root is missing: expected a string (a folder ")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"total_batch_size": 12},
            "total_batch_size = 12: expected a multiple of batch_size; batch_size = 8 (here)",
        ),
        (
            {"batch_size": 1, "data.cutmix": 1.0},
            "batch_size = 1: expected an even number, because mixup and cutmix pair the images",
        ),
        (
            {"schedule.warmup_epochs": 11},
            "schedule.warmup_epochs = 11.0: expected at most epochs; epochs = 10 (here)",
        ),
        (
            {"schedule.final_lr": 1},
            "schedule.final_lr = 1.0: expected at most optimizer.lr; optimizer.lr = 0.1 (here)",
        ),
        (
            {"schedule.name": "step"},
            "schedule.milestones = []: expected at least one epoch, e.g. [30, 60, 90]",
        ),
        (
            {"schedule.name": "step", "schedule.milestones": [3, 3]},
            "schedule.milestones = [3.0, 3.0]: expected epochs in rising order, none twice",
        ),
        (
            {"schedule.name": "step", "schedule.milestones": [3, 10]},
            "schedule.milestones = [3.0, 10.0]: expected each less than epochs",
        ),
        (
            {"temperature_epochs": 11, "model.kernel_warehouse": KERNEL_WAREHOUSE},
            "temperature_epochs = 11.0: expected at most epochs; epochs = 10 (here)",
        ),
        (
            {"temperature_epochs": 5},
            "temperature_epochs = 5.0: expected 0 for a static network, which has no attention "
            "temperature; model.kernel_warehouse = null (the default)",
        ),
        (
            {
                "temperature_epochs": 5,
                "model.kernel_warehouse": {
                    **KERNEL_WAREHOUSE,
                    "start": "paper",
                    "warehouses": {"stage2_dense": {"start": "keep", "cell_num_ratio": 0.5}},
                },
            },
            "expected 0 below a budget of 1 for start: keep, which holds at temperature 0 alone "
            "(warehouse stage2_dense); model.kernel_warehouse.start = 'paper'",
        ),
        (
            {"temperature_epochs": 5, "model.peer": {"method": "condconv"}},
            "temperature_epochs = 5.0: expected 0 for condconv, whose attention has no temperature",
        ),
        (
            {"model.peer": {"method": "condconv", "reduction": 0.25}},
            "model.peer.reduction = 0.25: expected null for CondConv",
        ),
        (
            {"model.peer": {"method": "dyconv"}, "model.kernel_warehouse": KERNEL_WAREHOUSE},
            "expected null beside model.kernel_warehouse: a network is converted to one method",
        ),
        (
            {"model.peer": {"method": "dyconf"}},
            "'dyconf': expected one of 'condconv', 'dyconv', 'odconv', 'fdconv', "
            "'kerneldna'; did you mean 'dyconv'?",
        ),
        ({"data.crop_scale": [1, 0.5]}, "data.crop_scale = [1.0, 0.5]: expected [low, high]"),
        ({"data.crop_ratio": [2, 1]}, "data.crop_ratio = [2.0, 1.0]: expected [low, high]"),
        ({"data.auto_augment": "rand-n2x"}, "expected a timm policy such as 'rand-m9-mstd0.5"),
        (
            {"optimizer.name": "sgd", "optimizer.momentum": 0, "optimizer.nesterov": True},
            "optimizer.nesterov = true: expected false, because Nesterov's form needs a momentum",
        ),
        (
            {"model.timm_args": {"drop_rate": 0.1}},
            "model.timm_args = {drop_rate: 0.1}: expected no drop_rate among them: set model.drop",
        ),
        (
            {"model.name": "kw_resnet18_1x"},
            "model.name = 'kw_resnet18_1x': expected the static network, e.g. 'resnet18'",
        ),
    ],
)
def test_rule_between_settings(changes: dict[str, Any], expected: str) -> None:
    (problem,) = problems_of(changes)
    assert problem.startswith("here: ")
    assert expected in problem


def test_all_problems_come_at_once_and_none_twice() -> None:
    changes = {"epochs": "x", "sed": 1, "total_batch_size": 12, "schedule.warmup_epochs": 999}
    problems = problems_of(changes)
    # Nothing is said of the warm-up: the epochs that it must fit into are not known.
    assert len(problems) == 3
    assert any("epochs = 'x'" in problem for problem in problems)
    assert any("sed = 1: expected a known key; did you mean seed?" in p for p in problems)
    assert any("total_batch_size = 12" in problem for problem in problems)


def test_error_is_a_value_error_with_one_line_a_problem() -> None:
    with pytest.raises(ValueError, match=r"here: seed = -1: .*\nhere: compile = 3: ") as error:
        config_from_mapping({**MINIMAL, "seed": -1, "compile": 3}, "here", check_model_name=False)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


# Where it was written


def test_place_is_the_file_and_line_that_set_the_value(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(MINIMAL_YAML.replace("lr: 0.1", "lr: -1"))
    text = "_base_: base.yaml\nseed: x\n"
    problems = file_problems(tmp_path, text, "batch_size=no")
    assert problems == [
        "base.yaml:5: optimizer.lr = -1: expected a number > 0 and <= 1e+06",
        "--cfg-options: batch_size = 'no': expected an integer >= 1 and <= 65536",
        "mine.yaml:2: seed = 'x': expected an integer >= 0 and <= 2147483647",
    ]


# Files


def test_object_tags_are_refused_and_do_nothing(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    text = f"seed: !!python/object/apply:os.system ['touch {trace}']\nepochs: !!python/none x\n"
    problems = file_problems(tmp_path, text)
    assert len(problems) == 2
    expected = (
        "!!python/object/apply:os.system: expected a plain value; tags that construct objects"
    )
    assert problems[0].startswith(f"mine.yaml:1: seed: {expected}")
    assert problems[1].startswith("mine.yaml:2: epochs: !!python/none: ")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\nepochs: 2\nseed: 3\n", "mine.yaml:3: seed: set twice in one mapping, first on"),
        ("optimizer: {lr: 1, lr: 2}\n", "mine.yaml:1: optimizer.lr: set twice in one mapping"),
        ("seed: [1\nepochs: 2\n", "mine.yaml:2: not valid: "),
        ("a: &a {b: 1}\nc: *a\n", "mine.yaml:2: not valid: anchors and aliases (&, *) are not"),
        ("1: 2\n", "mine.yaml:1: 1: keys are strings"),
        ("- 1\n- 2\n", "mine.yaml: expected a mapping of settings, found [1, 2]"),
        ("seed: 1\n---\nseed: 2\n", "mine.yaml:2: not valid: "),
        ("seed: \0\n", "mine.yaml: not valid: "),
        ("seed: " + "[" * 5000, "mine.yaml:1: not valid: more than 50 brackets"),
        ("compile: !!bool maybe\n", "mine.yaml:1: compile: 'maybe' is no !!bool"),
        ("? [a]\n: b\n", "keys are strings"),
        ("_base_: 3\n", "mine.yaml:1: _base_ = 3: expected a file name or a list of file names"),
        ("data: {_base_: a.yaml}\n", "mine.yaml:1: data._base_: _base_ belongs at the top"),
        ("data: {_delete_: 1}\n", "mine.yaml:1: data._delete_: expected true, found 1"),
        ("_base_: [no.yaml]\n", "mine.yaml:1: _base_ = 'no.yaml': no such file: no.yaml"),
        ("_base_: no/no.yaml\n", "no such file: no/no.yaml (nor a folder no)"),
        ("_base_: minee.yaml\n", "no such file: minee.yaml; did you mean mine.yaml?"),
        ("_base_: coco.py\n", "_base_ = 'coco.py': Python configurations are for detectors"),
    ],
)
def test_file_that_cannot_be_read(
    text: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config("mine.yaml", check_model_name=False)
    (problem,) = error.value.problems
    assert expected in problem


def test_circle_of_bases(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("seed: 1\n_base_: ./mine.yaml\n")
    (problem,) = file_problems(tmp_path, "_base_: other.yaml\n")
    circle = "mine.yaml -> other.yaml -> mine.yaml"
    assert problem.startswith("other.yaml:2: _base_ = 'mine.yaml'")
    assert problem.endswith(f"inheritance goes in a circle: {circle}")


def test_missing_python_and_binary_files(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(MINIMAL_YAML)
    (tmp_path / "weights.pth").write_bytes(b"\x80\x02\xff")
    with pytest.raises(ConfigError, match=r"no such file: .*mime\.yaml; did you mean .*mine\.yaml"):
        load_config(tmp_path / "mime.yaml")
    with pytest.raises(ConfigError, match="Python configurations are for detectors"):
        load_config(tmp_path / "mask_rcnn.py")
    with pytest.raises(ConfigError, match="expected a YAML file, found one that is not text"):
        load_config(tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match="cannot be read: "):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("epochs", "--cfg-options: 'epochs': expected KEY=VALUE, e.g. optimizer.lr=0.1"),
        ("=3", "--cfg-options: '=3': expected KEY=VALUE"),
        ("optimizer..lr=3", "--cfg-options: 'optimizer..lr=3': expected KEY=VALUE"),
        ("epochs=", "--cfg-options: epochs: no value after '='; for none write epochs=null"),
        ("data.mean=[0.1", "--cfg-options: data.mean = [0.1: not valid: "),
        ("_base_=a.yaml", "--cfg-options: '_base_=a.yaml': _base_ and _delete_ belong in files"),
        ("seed=!!python/name:os.system x", "--cfg-options: seed: !!python/name:os.system: "),
        ("sede=3", "--cfg-options: sede = 3: expected a known key; did you mean seed?"),
        (
            "optimizer.betas.0=0.8",
            "--cfg-options: optimizer.betas = {0: 0.8}: expected a list of 2 numbers, each >= 0 "
            "and < 1, set as a whole",
        ),
    ],
)
def test_wrong_option(option: str, expected: str, tmp_path: Path) -> None:
    (problem,) = file_problems(tmp_path, MINIMAL_YAML, option)
    assert problem.startswith(expected)


# Settings without effect


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("optimizer.momentum=0.5", "optimizer.name is 'adamw'"),
        ("optimizer={name: sgd, betas: [0.5, 0.5]}", "optimizer.name is 'sgd'"),
        ("schedule.milestones=[3]", "schedule.name is 'cosine'"),
        ("schedule.gamma=0.5", "schedule.name is 'cosine'"),
        ("schedule={name: step, milestones: [3], final_lr: 0}", "schedule.name is 'step'"),
        ("data.mix_probability=0.5", "data.mixup and data.cutmix are both 0"),
        ("data={mixup: 1, mix_switch_probability: 0}", "data.mixup and data.cutmix are not both"),
        ("data={color_jitter: 0.4, auto_augment: rand-m9}", "data.auto_augment replaces it"),
        ("data.augment_on=device", "data.auto_augment and data.color_jitter are both off"),
        ("data={memory: {}, augment_on: device}", "data.memory augments on the device"),
        ("model.drop_path_decay=constant", "model.drop_path_rate is 0"),
    ],
)
def test_setting_without_effect_warns(option: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL_YAML)
    with pytest.warns(UserWarning, match=f"^--cfg-options: .* has no effect: {reason}"):
        load_config(path, [option], check_model_name=False)


def test_own_file_warns_with_its_line_and_an_inherited_setting_does_not(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(MINIMAL_YAML + "schedule: {gamma: 0.5}\n")
    (tmp_path / "child.yaml").write_text("_base_: mine.yaml\nseed: 1\n")
    with pytest.warns(UserWarning, match=r"mine\.yaml:9: schedule\.gamma = 0\.5 has no effect"):
        load_config(tmp_path / "mine.yaml", check_model_name=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_config(tmp_path / "child.yaml", check_model_name=False)
