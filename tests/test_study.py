"""Studies: what their files mean, that runs are skipped when done, and what pages say of them."""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from processes import Forked
from torch import nn

from kw.cli import run_study
from kw.config import Config, ConfigError, config_from_mapping, load_config
from kw.evaluation import ReportError, read_run
from kw.models import build_network
from kw.models.complexity import analyze
from kw.study import launch
from kw.study.files import load_study
from kw.study.settings import as_option
from kw.study.summary import (
    binomial_error,
    describe_study,
    join_earlier,
    name_of,
    plot_study,
    read_earlier,
    read_started,
    render_page,
    study_table,
    summarise_run,
)

ROOT = Path(__file__).parents[1]
STUDIES = [ROOT / f"configs/tiny_imagenet/tiny_imagenet_{kind}.yaml" for kind in ("cpu", "gpu")]
Tool = Callable[..., None]


# --- the shipped studies ---------------------------------------------------------------------

# Parameters: 7x7 against 3x3, and 1000 classes against 100, each with a bias.
OTHER_STEM, OTHER_CLASSES = 64 * 3 * (49 - 9), 513 * 900


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_rows_of_a_study_differ_in_the_network_alone(path: Path) -> None:
    study = load_study(path)
    assert len(study.rows) == 15
    configs = {}
    for run in study.runs[:15]:
        configs[run.row] = load_config(run.config, run.options, check_model_name=False)
    anneals = {row: config.temperature_epochs > 0 for row, config in configs.items()}
    dynamic = {row for row in configs if row.startswith("kw_")} | {
        "resnet18_dyconv4x",
        "resnet18_odconv4x",
    }
    assert {row for row, does in anneals.items() if does} == dynamic - {
        "kw_resnet18_1x_no_temperature"
    }
    assert len({c.temperature_epochs for c in configs.values() if c.temperature_epochs}) == 1
    base = configs["resnet18"]
    for config in configs.values():
        config.model, config.temperature_epochs = base.model, base.temperature_epochs
        assert config == base


@pytest.mark.slow
def test_rows_have_the_sizes_of_the_imagenet_models() -> None:
    """Of the same names, less what the classifier and the stem differ by."""
    for path in (ROOT / "configs/tiny_imagenet/resnet18").glob("*.yaml"):
        imagenet = ROOT / "configs/imagenet/resnet18" / path.name
        if not imagenet.exists():
            imagenet = imagenet.with_name(path.stem + "_100ep.yaml")
        if imagenet.exists():
            ours, theirs = (
                analyze(load_config(p, check_model_name=False)) for p in (path, imagenet)
            )
            assert theirs.params - ours.params == OTHER_STEM + OTHER_CLASSES, path.stem


# --- the stem --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stem", "side"), [({"stride": 1}, 64), ({"stride": 2}, 32), ({"stride": 2, "pool": True}, 16)]
)
def test_stem_leaves_the_first_stage_its_resolution(stem: dict[str, Any], side: int) -> None:
    network: Any = build_network(model(stem=stem))
    found = []
    network.layer1.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].shape))
    network(torch.zeros(1, 3, 64, 64))
    assert found == [(1, 64, side, side)]
    assert [info["reduction"] for info in network.feature_info] == [
        64 // side // (2 if stem.get("pool") else 1) if not i else (64 // side) * 2 ** (i - 1)
        for i in range(5)
    ]
    deviation = math.sqrt(2 / (64 * 9))  # Kaiming's, fan out
    assert network.conv1.weight.detach().std() == pytest.approx(deviation, rel=0.1)
    assert isinstance(network.maxpool, nn.MaxPool2d) == ("pool" in stem)


def test_stem_is_for_resnets() -> None:
    with pytest.raises(ConfigError, match=r"model\.stem, model\.name 'convnext_atto': exp"):
        build_network(model(name="convnext_atto", stem={"stride": 1}))


def model(**settings: Any) -> Any:
    mapping = {
        "model": {"name": "resnet18", **settings},
        "data": {"root": "unused"},
        "optimizer": {"lr": 0.1},
        "epochs": 1,
        "total_batch_size": 2,
        "batch_size": 2,
    }
    return config_from_mapping(mapping, check_model_name=False).model


# --- files and runs --------------------------------------------------------------------------


@pytest.fixture
def study(settings: dict[str, Any], tmp_path: Path) -> Path:
    """Two rows, static and converted, two seeds."""
    settings |= {"epochs": 1, "temperature_epochs": 1}
    static = {**settings, "model": {**settings["model"]}, "temperature_epochs": 0}
    del static["model"]["kernel_warehouse"]
    for name, content in (("static", static), ("dynamic", settings)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    path = tmp_path / "small.yaml"
    content = {
        "rows": ["static.yaml", "dynamic.yaml"],
        "seeds": [3, 5],
        "options": {"data.memory": {"place": "host"}, "batch_size": 8},
        "temperature_epochs": 0.5,
    }
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_study_says_which_runs_there_are(study: Path) -> None:
    loaded = load_study(study, ["log_interval=2"])
    assert [run.name for run in loaded.runs] == [
        "static_seed3",
        "dynamic_seed3",
        "static_seed5",
        "dynamic_seed5",
    ]
    found: list[Config] = [
        load_config(run.config, run.options, check_model_name=False) for run in loaded.runs
    ]
    assert [(c.temperature_epochs, c.seed) for c in found] == [(0, 3), (0.5, 3), (0, 5), (0.5, 5)]
    assert all((c.batch_size, c.log_interval) == (8, 2) for c in found)
    assert all(c.data.memory is not None and c.data.memory.place == "host" for c in found)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": []}, r"small\.yaml:\d+: rows = \[\]: expected at least one"),
        ({"rows": ["static.yaml", "./static.yaml"]}, "expected at least one, none twice"),
        ({"rows": ["statc.yaml"]}, r"no such file.*did you mean.*static\.yaml"),
        ({"seeds": [1, -1]}, "seeds = .*: expected a list of numbers, each >= 0"),
        ({"options": {"epoch": 3}}, r"epoch = 3: expected a known key; did you mean epochs\?"),
        ({"row": ["static.yaml"]}, r"row = .*did you mean rows\?"),
        ({"temperature_epochs": 0}, r"temperature_epochs = 0: expected a number > 0"),
        (
            {"variants": {"more": {"config": "static.yaml"}}},
            "to stand in rows, which more does not",
        ),
        (
            {
                "rows": ["static.yaml", "more", "dynamic.yaml"],
                "variants": {"more": {"config": "static.yaml", "continues": "dynamic"}},
            },
            r"more\.continues to name a row before it \(static\)",
        ),
        (
            {
                "rows": ["static.yaml", "more"],
                "variants": {"more": {"config": "static.yaml", "options": {"epoch": 3}}},
            },
            r"epoch = 3: expected a known key; did you mean epochs\?",
        ),
    ],
)
def test_mistakes_in_a_study_are_named(study: Path, change: dict[str, Any], said: str) -> None:
    study.write_text(yaml.safe_dump({**yaml.safe_load(study.read_text()), **change}))
    with pytest.raises(ConfigError, match=said):
        load_study(study)


def continuing(study: Path) -> None:
    """Makes it a study of a static network, and of one that is converted from there."""
    content = {
        **yaml.safe_load(study.read_text()),
        "rows": ["static.yaml", "converted"],
        "variants": {
            "converted": {
                "config": "dynamic.yaml",
                "options": {
                    "model.kernel_warehouse.start": "keep",
                    "temperature_epochs": 0,
                    "optimizer.lr": 1e-9,
                    "schedule.final_lr": 0,
                },
                "continues": "static",
            }
        },
        "seeds": [3],
    }
    study.write_text(yaml.safe_dump(content))


def test_names_of_folders_reach_the_runs_as_they_are(study: Path) -> None:
    continuing(study)
    home = Path("runs #2: \N{GRINNING FACE}")
    *_, run = load_study(study, [as_option("data.root", str(home))], home).runs
    config = load_config(run.config, run.options, check_model_name=False)
    assert config.data.root == str(home)
    assert config.model.weights == str(home / "static_seed3" / "last.pth")


@pytest.mark.parametrize(
    ("ends", "status", "told"),
    [
        ([75], 75, "static_seed3: interrupted; run the same command again"),
        ([75], 75, "converted_seed3: left out, static_seed3 is not done"),
        ([2], 1, "converted_seed3: left out, static_seed3 failed"),
        ([0, 75], 75, "converted_seed3: interrupted; run the same command again"),
        ([0, 0], 0, "converted_seed3: finished in"),
    ],
)
def test_a_study_ends_with_its_runs_status(
    study: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    ends: list[int],
    status: int,
    told: str,
) -> None:
    """A run that saved its work and left with 75 has not failed, and can be run again."""
    continuing(study)
    runs = load_study(study, home=tmp_path / "runs").runs
    codes = iter(ends)

    def command(chosen: Any, **_: Any) -> list[str]:
        if not chosen[0].needs:
            (chosen[0].work_dir / "last.pth").touch()
        return ["sh", "-c", f"exit {next(codes)}"]

    monkeypatch.setattr(launch, "command_for", command)
    assert launch.run_all(runs) == status
    assert told in "".join(capfd.readouterr())
    assert next(codes, None) is None
    if status == 75:
        assert all(state.kind != "failed" for _, state in launch.unfinished(runs))


@pytest.mark.slow
def test_a_row_whose_start_failed_is_left_out(
    study: Path, tmp_path: Path, tool: Tool, capfd: pytest.CaptureFixture[str]
) -> None:
    continuing(study)
    settings = ("--cfg-options", f"data.root={tmp_path / 'nowhere'}")
    with pytest.raises(SystemExit) as end:
        tool("kw study run", study, "--work-dir", tmp_path / "runs", *settings)
    said = capfd.readouterr().err
    assert end.value.code == 1
    assert re.search(r"static_seed3: failed \(status 2\): .*nowhere", said)
    assert "converted_seed3: left out, static_seed3 failed" in said
    assert "2 of 2 runs failed: static_seed3, converted_seed3" in said


@pytest.mark.long
def test_a_study_is_run_once_and_summarised(
    study: Path,
    tmp_path: Path,
    tool: Tool,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subprocess, "Popen", Forked)
    continuing(study)
    runs, docs = tmp_path / "runs", tmp_path / "docs"
    monkeypatch.setattr("kw.config.imports.GIVEN", [])
    tool("kw study run", study, "--work-dir", runs, "--jobs", 2, "--import", "colorsys")
    assert "converted_seed3: finished in" in capfd.readouterr().out
    assert " --import colorsys " in (runs / "converted_seed3/output.txt").read_text()
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*.pth")}
    tool("kw study run", study, "--work-dir", runs)
    assert "converted_seed3: done already" in capfd.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*.pth")} == before
    # What other code goes on with is noted with that code; here nothing is left to train.
    monkeypatch.setattr(run_study, "describe_code", lambda: {"commit": "bbb", "dirty": True})
    tool("kw study run", study, "--work-dir", runs)
    assert "later" not in read_started(runs)["code"]
    monkeypatch.setattr(run_study, "unfinished", iter)
    monkeypatch.setattr(run_study, "run_all", lambda *_, **__: 0)
    for _ in range(2):
        tool("kw study run", study, "--work-dir", runs)
    assert read_started(runs)["code"]["later"] == [{"commit": "bbb", "dirty": True}]

    summary_file, plot = docs / "results/small.json", tmp_path / "curves.svg"
    files = ("--json", summary_file, "--plot", plot)
    tool("kw study summarize", study, "--work-dir", runs, *files)
    summary = json.loads(summary_file.read_text())
    static, results = (
        json.loads((runs / f"{row}_seed3/results.json").read_text())
        for row in ("static", "converted")
    )
    assert results["params"] > static["params"]
    # It starts from the weights of its seed's run, at a rate of next to nothing.
    assert results["loss"] == pytest.approx(static["loss"], rel=1e-4)
    found = summary["runs"][1]
    assert (found["row"], found["params"]) == ("converted", results["params"])
    assert found["top1"] == pytest.approx(results["top1"], abs=1e-4)
    assert (found["temperature"], found["images"], found["epochs"]) == (0, 19, 1)
    assert str(tmp_path / "runs") not in summary_file.read_text()
    assert "converted" in plot.read_text()
    (line,) = [text for text in load_study(study).options if text.startswith("converted: ")]
    assert line.startswith("converted: continues static model.kernel_warehouse.start=")

    page = docs / "results.md"
    page.write_text("Before\n<!-- study small: begin --><!-- study small: end -->\nAfter\n")
    with pytest.raises(SystemExit) as stale:
        tool("scripts/render_results.py", "--root", docs, "--check")
    assert stale.value.code == 1
    tool("scripts/render_results.py", "--root", docs)
    tool("scripts/render_results.py", "--root", docs, "--check")
    text = page.read_text()
    assert f" {results['params']:,} |" in text
    assert "; later bbb with changes." in text
    assert text.startswith("Before\n")
    assert text.endswith("\nAfter\n")


def test_runs_of_another_machine_count_as_done(
    study: Path, tmp_path: Path, tool: Tool, capfd: pytest.CaptureFixture[str]
) -> None:
    loaded = load_study(study)
    there = {
        "command": "kw study run there", "machine": {"gpu": None, "cpu": "A", "cores": 2},
        "versions": {"torch": "2"}, "code": {"commit": "aaa", "dirty": False},
    }  # fmt: skip
    here = there | {"machine": {"gpu": "B", "cpu": "C", "cores": 4}}
    rest = {"options": list(loaded.options), "images": 19, "missing": []}
    all_runs = [
        run(row, seed, 30.0) | {"images": 19, "temperature": None}
        for seed in (3, 5)
        for row in ("static", "dynamic")
    ]
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps({**there, **rest, "runs": all_runs}))
    tool("kw study run", study, "--work-dir", tmp_path / "runs", "--earlier", earlier)
    assert f"4 of 4 runs are in {earlier}" in capfd.readouterr().out
    assert not list((tmp_path / "runs").glob("*_seed*"))

    # Of two parts, one of which knows of a third.
    earlier.write_text(json.dumps({**there, **rest, "runs": all_runs[:3]}))
    first = read_earlier(earlier, loaded)
    both = join_earlier({**here, **rest, "runs": [all_runs[3] | {"top1": 31.0}]}, first, loaded)
    assert [name_of(each) for each in both["runs"]] == [each.name for each in loaded.runs]
    assert (both["missing"], both["machine"]["gpu"]) == ([], "B")
    assert [part["runs"] for part in both["earlier"]] == [[each.name for each in loaded.runs[:3]]]
    again = {**here, **rest, "runs": [all_runs[0] | {"top1": 32.0}]}
    third = join_earlier(again, both, loaded)
    assert [each["top1"] for each in third["runs"]] == [32.0, 30.0, 30.0, 31.0]
    assert [part["runs"] for part in third["earlier"]] == [
        ["dynamic_seed3", "static_seed5"], ["dynamic_seed5"]
    ]  # fmt: skip
    page = render_page("<!-- study s: begin --><!-- study s: end -->", [("s", third)])
    assert "Earlier, dynamic_seed3, static_seed5: Machine: A, 2 cores. torch 2. Commit aaa" in page

    with pytest.raises(ReportError, match="other images"):
        join_earlier(again | {"images": 20}, first, loaded)
    earlier.write_text(json.dumps({**there, **rest, "runs": all_runs, "options": ["epochs=3"]}))
    with pytest.raises(ReportError, match=r"other settings: .*epochs=3"):
        read_earlier(earlier, loaded)
    earlier.write_text(json.dumps({**there, **rest, "runs": [run("third", 3, 30.0)]}))
    with pytest.raises(ReportError, match="no runs third_seed3"):
        read_earlier(earlier, loaded)


# --- figures ---------------------------------------------------------------------------------


def run(row: str, seed: int, top1: float) -> dict[str, Any]:
    curve = [{"epoch": 1, "train_loss": 2.5, "top1": top1, "top5": 60.0, "loss": 2.0}]
    figures = {"top1": top1, "top5": 60.0, "loss": 2.0, "best_top1": top1, "hours": 0.25}
    return {"row": row, "seed": seed, "params": 1_250_000, **figures, "curve": curve}


def test_seeds_are_averaged_and_shown() -> None:
    summary = {"runs": [run("a", 0, 30.0), run("b", 0, 33.5), run("a", 1, 31.0), run("b", 1, 33.0)]}
    lines = [[c.strip() for c in x.split("|")[1:-1]] for x in study_table(summary).splitlines()]
    assert lines[2][:4] == ["a", "1.25M", "30.50 ± 0.50 (30.00, 31.00)", ""]
    assert lines[3][:4] == ["b", "1.25M", "33.25 ± 0.25 (33.50, 33.00)", "+2.75 ± 0.75"]
    assert lines[3][-1] == "0.50"


def test_a_study_says_how_far_chance_goes() -> None:
    one = {"runs": [run("a", 0, 50.0)], "images": 2500}
    assert "the standard error of one figure is 1.00 points" in describe_study(one)
    assert "±" not in describe_study(one) + study_table(one)
    # Errors of differences are over seeds that both rows have.
    several = [run("a", 0, 50.0), run("a", 1, 52.0), run("b", 1, 53.0), run("b", 0, 52.0)]
    text = describe_study({"runs": several, "images": 2500})
    assert "± is the standard error over seeds" in text
    assert "+1.50 ± 0.50" in study_table({"runs": several})
    assert " +2.00 |" in study_table({"runs": [several[0], several[3], run("b", 1, 90.0)]})


def test_small_networks_are_counted_exactly() -> None:
    table = study_table({"runs": [{**run("a", 0, 50.0), "params": 101_968}]})
    assert " 101,968 |" in table


def test_binomial_error() -> None:
    assert binomial_error(50, 2500) == pytest.approx(1.0)
    assert binomial_error(20, 5000) == pytest.approx(0.5657, abs=1e-4)


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(ReportError, match="study other: begin"):
        render_page("<!-- study some: begin -->", [("other", {})])


def test_a_run_that_never_evaluated_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"no results\.json"):
        summarise_run(tmp_path, "row", 0)


def test_a_run_with_an_average_is_judged_by_it(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    for epoch, (own, average) in enumerate([(40.0, 10.0), (30.0, 50.0), (20.0, 50.0)], 1):
        figures = {"top1": own, "top5": 90.0, "loss": 2.0}
        figures |= {"ema_top1": average, "ema_top5": 80.0, "ema_loss": 1.5}
        at = {"epoch": epoch, "iter": epoch}
        lines.append({"mode": "train", **at, "seconds": 1.0, "loss": 3.0})
        lines.append({"mode": "val", **at, **figures, "images": 10, "ema_images": 10})
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    results = {"params": 7, "weights": "ema", "top1": 50.0, "model_top1": 30.0}
    (tmp_path / "results.json").write_text(json.dumps(results))
    found = summarise_run(tmp_path, "row", 0)
    assert (found["top1"], found["top5"], found["loss"]) == (50.0, 80.0, 1.5)
    assert (found["best_top1"], found["best_epoch"]) == (50.0, 2)  # the first
    assert [point["top1"] for point in found["curve"]] == [10.0, 50.0, 50.0]
    # The average came with the second epoch, when the run was resumed.
    for key in ("ema_top1", "ema_top5", "ema_loss"):
        del lines[1][key]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [point["epoch"] for point in summarise_run(tmp_path, "row", 0)["curve"]] == [2, 3]
    assert read_run(tmp_path).curve("val", "ema_top1") == [(2, 50.0), (3, 50.0)]


@pytest.mark.parametrize("before", [0, 3])
def test_an_epoch_s_mean_weighs_lines_by_their_updates(tmp_path: Path, before: int) -> None:
    """Also of a run that went on in another folder, after some epochs."""
    lines = [  # epochs of 12 updates, a line every 5 of them and after the last
        {
            "mode": "train",
            "epoch": before + epoch,
            "iter": 12 * before + update,
            "seconds": 1.0,
            "loss": loss,
        }
        for epoch, update, loss in [
            (1, 5, 4.0),
            (1, 10, 3.0),
            (1, 12, 1.0),
            (2, 17, None),
            (2, 22, 2.0),
            (2, 24, 0.6),
        ]
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "results.json").write_text(
        json.dumps({"params": 7, "weights": "model", "top1": 1.0})
    )
    first, second = read_run(tmp_path).curve("train", "loss")
    assert first == (before + 1, pytest.approx((5 * 4 + 5 * 3 + 2 * 1) / 12))
    # Of lines with a finite loss.
    assert second == (before + 2, pytest.approx((5 * 2 + 2 * 0.6) / 7))


def test_runs_of_a_kind_are_compared(
    tmp_path: Path, tool: Tool, capfd: pytest.CaptureFixture[str]
) -> None:
    for score, value in (("top1", 50.0), ("mAP", 40.0), ("bbox_mAP", 0.25)):
        run, at = tmp_path / score, {"epoch": 1, "iter": 1}
        run.mkdir()
        lines = [{"mode": "train", **at, "seconds": 1.0, "loss": 3.0}, {"mode": "val", **at}]
        lines[1] |= {score: value}
        (run / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
        results = {"params": 7, "weights": "model", score: value}
        (run / "results.json").write_text(json.dumps(results))
        tool("kw study compare", run, "--plot", tmp_path / "curves.svg")
    said = capfd.readouterr().out
    for shown in (" top-1 (%) ", " 50.00 ", " mAP (%) ", " 40.00 ", " box AP (%) ", " 25.00 "):
        assert shown in said
    with pytest.raises(SystemExit):
        tool("kw study compare", tmp_path / "bbox_mAP", tmp_path / "top1")
    assert "top1 is judged by top-1 (%)" in capfd.readouterr().err


def test_a_loss_that_was_not_finite_leaves_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logs have it as null, and a study's table and curves are drawn without it."""
    lines: list[dict[str, Any]] = []
    for epoch, loss in enumerate([3.0, None], 1):
        at = {"epoch": epoch, "iter": epoch}
        lines.append({"mode": "train", **at, "seconds": 1.0, "loss": loss})
        figures = {"top1": 40.0, "top5": 90.0, "loss": loss, "images": 10}
        lines.append({"mode": "val", **at, **figures})
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    results = {"params": 7, "weights": "model", "top1": 40.0}
    (tmp_path / "results.json").write_text(json.dumps(results))
    found = summarise_run(tmp_path, "row", 0)
    monkeypatch.chdir(tmp_path)
    assert read_run(".").name == tmp_path.name
    assert [point["train_loss"] for point in found["curve"]] == [3.0, None]
    (line,) = study_table({"runs": [found]}).splitlines()[2:]
    assert [cell.strip() for cell in line.split("|")][-4:-2] == ["-", "-"]
    # A run that stopped early has fewer points.
    other = {**found, "seed": 1, "curve": found["curve"][:1]}
    plot_study({"runs": [found, other]}, tmp_path / "curves.svg")


def test_the_page_of_results_is_up_to_date(tool: Tool) -> None:
    tool("scripts/render_results.py", "--check")
