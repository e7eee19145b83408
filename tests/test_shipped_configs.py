"""The configurations that are shipped: what they claim, their recipes and their models."""

from __future__ import annotations

import dataclasses
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from timm.layers import DropPath

from kw.config import Config, config_from_mapping, load_config, to_dict, to_yaml
from kw.config.schema import ModelConfig
from kw.models import PAPER_MODELS, build_network
from kw.warehouse import resolve_plan

ROOT = Path(__file__).parents[1]
IMAGENET = ROOT / "configs/imagenet"
PATHS = {path.stem: path for path in sorted(IMAGENET.rglob("*.yaml"))}
# name -> drop path in the 300-epoch recipe
DROP_PATH_300 = {
    "resnet18": 0,
    "kw_resnet18_1d4x": 0,
    "kw_resnet18_1d2x": 0,
    "kw_resnet18_1x": 0.1,
    "kw_resnet18_2x": 0.1,
    "kw_resnet18_4x": 0.1,
    "resnet50": 0.1,
    "kw_resnet50_1d2x": 0.1,
    "kw_resnet50_1x": 0.1,
    "kw_resnet50_4x": 0.1,
    "convnext_tiny": 0.1,
    "kw_convnext_tiny_1x": 0.3,
    "deit_tiny": 0.1,
    "kw_deit_tiny_1x": 0.1,
    "kw_deit_tiny_4x": 0.1,
    "deit_small": 0.1,
    "kw_deit_small_1x": 0.1,
}
STATIC = {
    "resnet18": "resnet18",
    "resnet50": "resnet50",
    "convnext_tiny": "convnext_tiny",
    "mobilenetv2_100": "mobilenetv2_100",
    "mobilenetv2_050": "mobilenetv2_050",
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
}
NAMES_100 = [name for name in PATHS if name.endswith("_100ep")]
NAMES_150 = [name for name in PATHS if "mobilenetv2" in name]
OURS = [name for name in PATHS if name.removesuffix("_100ep") in {*STATIC, *PAPER_MODELS}]
every_config = pytest.mark.parametrize("name", PATHS)


@cache
def load(name: str) -> Config:
    # timm's list of models takes seconds to import.
    return load_config(PATHS[name], check_model_name=False)


def test_every_model_has_its_configurations() -> None:
    expected = {*STATIC, *PAPER_MODELS}
    budgets = ("", "1d2x", "1x", "2x", "4x")
    expected |= {f"kw_resnet18_{b}_100ep" if b else "resnet18_100ep" for b in budgets}
    assert set(OURS) == expected
    assert {name for name in expected if "mobilenetv2" not in name} - set(NAMES_100) == set(
        DROP_PATH_300
    )


@every_config
def test_round_trip(name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    config = load_config(PATHS[name], check_model_name=False)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(config))
    assert "_base_" not in resolved.read_text()
    assert load_config(resolved, check_model_name=False) == config
    assert config_from_mapping(to_dict(config), check_model_name=False) == config
    assert not recwarn.list


@every_config
def test_head_says_what_the_file_claims(name: str) -> None:
    head = PATHS[name].read_text().split("\n\n")[0]
    command = " ".join(head.replace("\\\n#", "").split())
    path = PATHS[name].relative_to(ROOT).as_posix()
    assert re.match(
        rf"# Reproduces +{name.removesuffix('_100ep')} of\n#  +\"(ImageNet|Ablations), .+\"\.", head
    )
    assert f"torchrun --nproc-per-node 8 tools/train.py {path} --launcher pytorch" in command
    figure = r"\d\d\.\d\d"
    known = rf"top-1 {figure}(, top-5 {figure})? \([^)]+\)\."
    assert re.search(rf"# Expect ({known}|no figure: .+)", said(head))
    assert re.search(r"# Parameters +\d+\.\d\dM(; not| as) published\.", head)


def said(head: str) -> str:
    """A head as one line, without the marks of its continuation lines."""
    return " ".join(head.replace("\n#  ", " ").split())


@pytest.mark.parametrize("name", OURS)
def test_model(name: str) -> None:
    """The file's plan and ratios are those of the model that timm knows by the same name; it begins
    as the papers do."""
    config = load(name)
    model = name.removesuffix("_100ep")
    assert config.model.num_classes == 1000
    assert config.model.drop_rate == (0.2 if name == "kw_resnet18_4x_100ep" else 0)
    assert config.model.drop_path_rate == DROP_PATH_300.get(name, 0)
    constant = "resnet" in name
    assert config.model.drop_path_decay == ("constant" if constant else "linear")
    if not model.startswith("kw_"):
        assert config.model.name == STATIC[model]
        assert config.model.kernel_warehouse is None
        return
    released, conversion = PAPER_MODELS[model], config.model.kernel_warehouse
    assert config.model.name == released.backbone
    assert conversion is not None
    assert conversion.plan == released.plan
    ours = resolve_plan(released.plan).with_overrides({**released.settings, "start": "paper"})
    assert resolve_plan(conversion.plan).with_overrides(conversion.overrides()) == ours


@pytest.mark.parametrize("name", DROP_PATH_300)
def test_300_epoch_recipe(name: str) -> None:
    config = load(name)
    assert (config.epochs, config.total_batch_size, config.batch_size) == (300, 4096, 128)
    assert config.temperature_epochs == (20 if name.startswith("kw_") else 0)
    assert config.label_smoothing == 0.1
    assert config.precision == "fp32"
    optimizer, schedule, data = config.optimizer, config.schedule, config.data
    assert (optimizer.name, optimizer.lr, optimizer.weight_decay) == ("adamw", 4e-3, 0.05)
    assert (optimizer.eps, optimizer.clip_grad) == (1e-8, None)
    assert optimizer.exempt_from_decay == "norm_and_bias"
    assert (schedule.name, schedule.warmup_epochs, schedule.final_lr) == ("cosine", 20, 1e-6)
    assert (data.root, data.input_size, data.interpolation) == ("data/imagenet", 224, "bicubic")
    assert (data.auto_augment, data.color_jitter) == ("rand-m9-mstd0.5-inc1", 0.4)
    assert (data.mixup, data.cutmix) == (0.8, 1.0)
    assert (data.mix_probability, data.mix_switch_probability) == (1.0, 0.5)
    assert data.random_erasing is not None
    assert dataclasses.astuple(data.random_erasing) == (0.25, "pixel", 1)
    assert data.test_crop_ratio == 224 / 256
    decay = None if config.ema is None else config.ema.decay
    assert decay == (None if "resnet" in name else 0.9999)


@pytest.mark.parametrize("name", NAMES_100)
def test_100_epoch_recipe(name: str) -> None:
    config = load(name)
    assert (config.epochs, config.total_batch_size, config.batch_size) == (100, 256, 32)
    anneals = name.startswith("kw_") or "dyconv" in name or "odconv" in name
    assert config.temperature_epochs == (10 if anneals else 0)
    optimizer, schedule = config.optimizer, config.schedule
    assert (optimizer.name, optimizer.lr, optimizer.weight_decay) == ("sgd", 0.1, 1e-4)
    assert (optimizer.momentum, optimizer.nesterov) == (0.9, False)
    assert (schedule.name, schedule.milestones, schedule.gamma) == ("step", [30, 60, 90], 0.1)
    assert_plain_augmentation(config)


@pytest.mark.parametrize("name", NAMES_150)
def test_150_epoch_recipe(name: str) -> None:
    config = load(name)
    assert (config.epochs, config.total_batch_size) == (150, 256)
    assert config.temperature_epochs == (15 if name.startswith("kw_") else 0)
    optimizer, schedule = config.optimizer, config.schedule
    assert (optimizer.name, optimizer.lr, optimizer.weight_decay) == ("sgd", 0.05, 4e-5)
    assert (optimizer.momentum, optimizer.nesterov) == (0.9, True)
    assert (schedule.name, schedule.warmup_epochs, schedule.final_lr) == ("cosine", 0, 1e-6)
    assert_plain_augmentation(config)


def assert_plain_augmentation(config: Config) -> None:
    data = config.data
    assert (data.interpolation, data.horizontal_flip) == ("bilinear", 0.5)
    assert data.test_crop_ratio == 224 / 256
    assert (data.auto_augment, data.color_jitter, data.random_erasing) == (None, None, None)
    assert (data.mixup, data.cutmix, config.label_smoothing) == (0, 0, 0)
    assert config.ema is None


@pytest.mark.parametrize(
    ("name", "args", "branches"),
    [
        ("resnet18", {"channels": [8, 8, 16, 16]}, 8),
        ("deit_tiny_patch16_224", {"depth": 3, "embed_dim": 24}, 6),
        ("convnext_tiny", {"dims": [8, 8, 16, 16], "depths": [1, 1, 2, 1]}, 5),
    ],
)
def test_a_constant_rate_is_that_of_every_branch(
    name: str, args: dict[str, Any], branches: int
) -> None:
    settings = {"num_classes": 4, "drop_path_rate": 0.2, "drop_path_decay": "constant"}
    network = build_network(ModelConfig(name, **settings, timm_args=args))
    rates = [m.drop_prob for m in network.modules() if isinstance(m, DropPath)]
    assert rates == [0.2] * branches


# What the recipes of configs/recipes/ are for, by dotted key.
RECIPES: dict[str, dict[str, Any]] = {
    "kw_resnet50_1x_a2": {
        "data.repeats": 3,
        "loss.name": "bce",
        "loss.args": {"threshold": 0.2},
        "optimizer.name": "lamb",
        "optimizer.lr": 5e-3,
        "optimizer.weight_decay": 0.02,
        "total_batch_size": 2048,
        "epochs": 300,
        "schedule.warmup_epochs": 5,
        "data.auto_augment": "rand-m7-mstd0.5-inc1",
        "data.mixup": 0.1,
        "data.cutmix": 1.0,
        "data.random_erasing": None,
        "data.test_crop_ratio": 0.95,
        "label_smoothing": 0,
        "model.drop_path_rate": 0.05,
    },
    "kw_resnet18_1x_from_resnet50": {
        "distillation.teacher": "resnet50",
        "distillation.weights": "timm:tv_in1k",
        "distillation.kind": "soft",
        "model.name": "resnet18",
        "epochs": 300,
    },
    "kw_resnet18_1x_class_weights": {"loss.class_weights": "balanced", "data.sampling": "shuffle"},
    "kw_resnet18_1x_balanced": {"data.sampling": "balanced", "loss.class_weights": None},
    "kw_resnet18_1x_multilabel": {
        "loss.name": "bce",
        "metrics": {"multilabel": {}},
        "data.dataset": "csv",
        "data.dataset_args": {"separator": ";"},
    },
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str, recwarn: pytest.WarningsRecorder) -> None:
    path = ROOT / f"configs/recipes/{name}.yaml"
    config = load_config(path)
    assert not recwarn.list  # of settings without effect
    assert path.relative_to(ROOT).as_posix() in path.read_text().split("\n\n")[0]
    assert config.model.kernel_warehouse is not None
    for key, expected in RECIPES[name].items():
        found: Any = config
        for part in key.split("."):
            found = getattr(found, part)
        assert found == expected, key
