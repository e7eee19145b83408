"""Reading, merging and printing configurations."""

from __future__ import annotations

import dataclasses
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from kw.config import (
    Config,
    ConfigError,
    config_from_mapping,
    load_config,
    names,
    reference,
    to_yaml,
)
from kw.config.names import config_file

ROOT = Path(__file__).parents[1]
RESNET18 = ROOT / "configs/imagenet/resnet18"
MINIMAL = {
    "model": {"name": "resnet18"},
    "data": {"root": "images"},
    "optimizer": {"lr": 0.1},
    "epochs": 10,
    "total_batch_size": 8,
    "batch_size": 8,
}
MINIMAL_YAML = """\
model: {name: resnet18}
data: {root: images}
optimizer: {lr: 0.1}
epochs: 10
total_batch_size: 8
batch_size: 8
"""


def load(path: Path, *options: str) -> Config:
    # timm's list of models takes seconds to import; one test below looks names up.
    return load_config(path, options, check_model_name=False)


def write(folder: Path, **files: str) -> Path:
    """Write NAME.yaml for every argument; the path of the last one."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{name}.yaml"


# Inheritance and options


@pytest.mark.parametrize(
    ("child", "expected"),
    [
        ("optimizer: {lr: 1}", {"lr": 1.0, "weight_decay": 0.3, "betas": [0.8, 0.9]}),
        ("optimizer: {betas: [0.5, 0.6]}", {"lr": 0.1, "betas": [0.5, 0.6]}),
        (
            "optimizer: {_delete_: true, lr: 1}",
            {"lr": 1.0, "weight_decay": 0.0, "betas": [0.9, 0.999]},
        ),
    ],
    ids=["mappings merge", "lists are replaced", "_delete_ replaces"],
)
def test_child_over_base(child: str, expected: dict[str, object], tmp_path: Path) -> None:
    base = MINIMAL_YAML + "# base\n"
    base = base.replace("lr: 0.1", "lr: 0.1, weight_decay: 0.3, betas: [0.8, 0.9]")
    config = load(write(tmp_path, base=base, child=f"_base_: base.yaml\n{child}\n"))
    assert expected.items() <= dataclasses.asdict(config.optimizer).items()


def test_later_bases_override_and_paths_are_relative_to_their_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/mixin.yaml").write_text("_base_: ../seed.yaml\nepochs: 3\n")
    child = "_base_: [minimal.yaml, deep/mixin.yaml]\nbatch_size: 4\n"
    path = write(tmp_path, minimal=MINIMAL_YAML, seed="seed: 7\nepochs: 99\n", child=child)
    config = load(path)
    assert (config.epochs, config.seed, config.batch_size) == (3, 7, 4)


@pytest.mark.parametrize(
    "base", ["kw_resnet18_1x", "configs/imagenet/resnet18/kw_resnet18_1x.yaml"]
)
def test_a_shipped_configuration_is_a_base(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what ``kw train`` takes; a file beside the configuration wins, and a run's folder not."""
    monkeypatch.chdir(tmp_path)
    Path(base).mkdir(parents=True)
    Path("mine.yaml").write_text(f"_base_: {base}\nseed: 7\n")
    theirs = load(config_file("kw_resnet18_1x"))
    assert load(Path("mine.yaml")) == dataclasses.replace(theirs, seed=7)
    Path(base).rmdir()
    Path(base).write_text(MINIMAL_YAML.replace("resnet18", "resnet50"))
    assert load(Path("mine.yaml")).model.name == "resnet50"


def test_null_replaces_a_mapping_and_a_mapping_null(tmp_path: Path) -> None:
    base = MINIMAL_YAML + "ema: {decay: 0.5}\n"
    off = "_base_: base.yaml\nema: null\n"
    assert load(write(tmp_path, base=base, off=off)).ema is None
    again = load(write(tmp_path, on="_base_: off.yaml\nema: {}\n")).ema
    assert again is not None
    assert again.decay == 0.9999


@pytest.mark.parametrize(
    ("option", "key", "expected"),
    [
        ("epochs=3", "epochs", 3),
        ("optimizer.lr=4e-3", "optimizer.lr", 0.004),
        ("optimizer.betas=[0.8, 0.9]", "optimizer.betas", [0.8, 0.9]),
        ("ema={decay: 0.5}", "ema.decay", 0.5),
        ("ema.decay=0.5", "ema.decay", 0.5),
        ("data.root=/a=b", "data.root", "/a=b"),
        ("data.root='3'", "data.root", "3"),
        (f"data.root={json.dumps('/photos/😀')}", "data.root", "/photos/😀"),
        ("model.timm_args={in_chans: 3}", "model.timm_args", {"in_chans": 3}),
    ],
)
def test_options(option: str, key: str, expected: object, tmp_path: Path) -> None:
    value: object = load(write(tmp_path, minimal=MINIMAL_YAML), "epochs=11", option)
    for name in key.split("."):
        value = getattr(value, name)
    assert value == expected


@pytest.mark.parametrize("text", ["/data/run #2", "#2", "a b # c", " # x"])
def test_an_option_has_no_comments(text: str, tmp_path: Path) -> None:
    config = load(write(tmp_path, minimal=MINIMAL_YAML), f"data.root={text}")
    assert config.data.root == text.strip()
    with pytest.raises(ConfigError, match="3 # or 4"):
        load(write(tmp_path, minimal=MINIMAL_YAML), "epochs=3 # or 4")


def test_option_turns_a_group_off() -> None:
    path = RESNET18 / "kw_resnet18_1x.yaml"
    config = load(path, "model.kernel_warehouse=null", "temperature_epochs=0")
    assert config.model.kernel_warehouse is None


# Scalars


@pytest.mark.parametrize(
    ("text", "value"),
    [("4e-3", 4e-3), ("3e-4", 3e-4), ("1E5", 1e5), ("1.", 1.0), (".5", 0.5), ("+2e+1", 20.0)],
)
def test_floats(text: str, value: float, tmp_path: Path) -> None:
    config = load(write(tmp_path, minimal=MINIMAL_YAML.replace("lr: 0.1", f"lr: {text}")))
    assert isinstance(config.optimizer.lr, float)
    assert config.optimizer.lr == value


def test_integers_become_floats_where_floats_are_meant(tmp_path: Path) -> None:
    config = load(write(tmp_path, minimal=MINIMAL_YAML.replace("lr: 0.1", "lr: 1")))
    assert isinstance(config.optimizer.lr, float)


@pytest.mark.parametrize("text", ["4e-3", "null", "true", "on", "12", "2026-11-22", "0x1F", "a: b"])
def test_strings_that_look_like_something_else_round_trip(text: str, tmp_path: Path) -> None:
    config = config_from_mapping({**MINIMAL, "data": {"root": text}}, check_model_name=False)
    assert load(write(tmp_path, resolved=to_yaml(config))).data.root == text


def test_plan_as_rules_and_settings_of_single_warehouses(tmp_path: Path) -> None:
    plan = {"rules": [{"match": "layer1", "warehouse": "one"}]}
    conversion = {"plan": plan, "warehouses": {"one": {"cell_num_ratio": 2}}}
    mapping = {**MINIMAL, "model": {"name": "resnet18", "kernel_warehouse": conversion}}
    config = config_from_mapping(mapping, check_model_name=False)
    kernel_warehouse = config.model.kernel_warehouse
    assert kernel_warehouse is not None
    assert kernel_warehouse.plan == plan
    assert kernel_warehouse.overrides() == {"warehouses": {"one": {"cell_num_ratio": 2.0}}}
    assert load(write(tmp_path, resolved=to_yaml(config))) == config


def test_configurations_share_no_defaults() -> None:
    one, two = (config_from_mapping(MINIMAL, check_model_name=False) for _ in range(2))
    one.data.mean.append(1.0)
    one.model.timm_args["in_chans"] = 1
    assert len(two.data.mean) == 3
    assert two.model.timm_args == {}


# Reference and command line


def test_reference_has_every_key() -> None:
    text = reference()
    lr = "| `optimizer.lr` | a number > 0 and <= 1e+06 | required | learning rate after warm-up |"
    assert lr in text
    assert "| `data.random_erasing.mode` | one of 'pixel', 'rand', 'const' | `pixel` |" in text
    assert "`model.kernel_warehouse.warehouses.<name>.cell_num_ratio`" in text
    cells = {line.count(" | ") for line in text.splitlines()[2:]}
    assert cells == {3}


def run_tool(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["print_config.py", *arguments])
    runpy.run_path(str(ROOT / "tools/print_config.py"), run_name="__main__")


def test_tool_prints_the_resolved_config(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = RESNET18 / "kw_resnet18_1x.yaml"
    run_tool(monkeypatch, str(path), "--cfg-options", "seed=3", "epochs=30")
    resolved = write(tmp_path, resolved=capsys.readouterr().out)
    assert load(resolved) == load(path, "seed=3", "epochs=30")


def test_tool_answers_mistakes_with_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(RESNET18 / "kw_resnet18_1x.yaml")
    options = ["model.name=resnet81", "seed=-1"]
    with pytest.raises(SystemExit) as exit_info:
        run_tool(monkeypatch, path, "--cfg-options", *options)
    assert exit_info.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 2
    assert "model.name = 'resnet81': expected the name of a timm model; did you mean " in err
    assert "'resnet18'" in err
    assert "seed = -1: expected an integer >= 0" in err


def test_names_leave_out_what_systems_write_beside_the_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """macOS on a disk without its attributes, and Jupyter where a file was edited."""
    before = names.config_names()
    ours = Path(shutil.copytree(names.configs(), tmp_path / "configs"))
    (ours / "demo/._resnet18.yaml").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X\xb0")
    (ours / "demo/.ipynb_checkpoints").mkdir()
    shutil.copy(next(ours.glob("demo/*.yaml")), ours / "demo/.ipynb_checkpoints/a-checkpoint.yaml")
    monkeypatch.setattr(names, "configs", lambda: ours)
    assert list(names.config_names()) == list(before)


def test_tool_prints_the_reference_without_a_config(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_tool(monkeypatch, "--reference")
    assert capsys.readouterr().out == reference()
