"""What a reproduction reports: figures, marks and plots, of runs that are made up."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kw.evaluation import paper_tables
from kw.evaluation.paper import read_tables
from kw.evaluation.report import ReportError
from kw.study.published import Reproduction
from kw.study.report import collect, write_report
from kw.study.runs import record
from kw.study.scale import FULL
from kw.study.settings import differences, resolved_text

TABLE = paper_tables()["imagenet_resnet18_100ep"]
UPDATES = 5004  # of 256 images an epoch


def write_result(task: Reproduction, model: str, seed: int, top1: Sequence[float]) -> None:
    """A finished run as the engine leaves it: of ``len(top1)`` epochs, half an hour each."""
    task = dataclasses.replace(task, options=(*task.options, f"epochs={len(top1)}"))
    run = task.resolve(task.runs(task.table.row(model), more=True)[seed])
    text = resolved_text(run.config, run.options)
    run.work_dir.mkdir(parents=True)
    (run.work_dir / "config.yaml").write_text(text)
    lines: list[dict[str, Any]] = []
    for n, value in enumerate(top1, 1):
        line = {"epoch": n, "iter": UPDATES * n}
        half = {**line, "iter": UPDATES * n - UPDATES // 2}
        lines.append({"mode": "train", **half, "seconds": 900.0, "loss": 3.0 / n})
        lines.append({"mode": "train", **line, "seconds": 900.0, "loss": 1.0 / n})
        lines.append({"mode": "val", **line, "top1": value, "top5": 90.0, "images": 50000})
    (run.work_dir / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    best = {"top1": max(top1), "top5": 90.0, "weights": "model", "params": 11_689_512}
    (run.work_dir / "results.json").write_text(json.dumps(best))
    record(run, 0)


@pytest.fixture
def task(tmp_path: Path) -> Reproduction:
    """resnet18 with two seeds, kw_resnet18_1x with other settings, one run that failed."""
    task = Reproduction(TABLE, FULL, tmp_path, seeds=2)
    write_result(task, "resnet18", 0, [60.0, 71.0])
    write_result(task, "resnet18", 1, [61.0, 69.0])
    one = Reproduction(TABLE, FULL, tmp_path)
    half = dataclasses.replace(one, options=("precision=bf16",))
    write_result(half, "kw_resnet18_1x", 0, [50.0, 70.17])
    record(one.runs(TABLE.row("resnet18_se"))[0], 2, "out of memory")
    return one


def test_figures(task: Reproduction) -> None:
    rows = [TABLE.row(model) for model in ("resnet18", "kw_resnet18_1x")]
    plain, dynamic = collect(task, rows)
    assert (plain.runs, plain.state) == (2, "2 x done")
    assert plain.figures["top1"] == pytest.approx(70.0)  # (71 + 69) / 2
    assert plain.spread["top1"] == pytest.approx(2**0.5)
    assert plain.difference("top1") == pytest.approx(70.0 - 70.25)
    assert plain.hours == pytest.approx(1.0)  # 2 epochs of 2 x 900 seconds
    assert plain.costs[1] == 1_814_073_344
    assert list(plain.curves[1].score) == [(1, 61.0), (2, 69.0)]
    assert list(plain.curves[0].loss) == [(1, 2.0), (2, 1.0)]
    assert dynamic.difference("top1") == pytest.approx(-3.5)
    assert dynamic.deviations == (
        "epochs 100 -> 2",
        "schedule.milestones [30, 60, 90] -> [0.6, 1.2, 1.8]",
        "temperature_epochs 10 -> 0.2",
        "precision 'fp32' -> 'bf16'",
    )
    assert plain.deviations == dynamic.deviations[:2]


def cells_of(markdown: str) -> dict[str, list[str]]:
    rows = [line for line in markdown.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {row[0].split()[0]: row for row in cells}


def test_forms_say_the_same_and_mark_what_is_doubtful(task: Reproduction, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert [path.name for path in write_report(task, task.rows(), out)] == [
        "table.txt",
        "table.md",
        "accuracy.svg",
        "curves.svg",
    ]
    markdown, text = (out / "table.md").read_text(), (out / "table.txt").read_text()
    cells = cells_of(markdown)
    assert cells["resnet18"][5:8] == ["70.25", "70.00 ± 1.41", "-0.25"]
    assert cells["resnet18"][-3:] == ["1.000", "reprinted in a later paper", "2 x done"]
    # Recalled: marked, and so is the difference from it.
    assert cells["kw_resnet18_1x"][1] == "11.93M?"
    assert cells["kw_resnet18_1x"][5:8] == ["73.67?", "70.17", "-3.50?"]
    assert cells["kw_resnet18_1x"][-2] == "unconfirmed"
    assert cells["kw_resnet18_4x"][5] == "74.16"
    # Not run, with the network's costs; failed; published only.
    assert cells["kw_resnet18_2x"][2:8] == ["23.24M", "1.814G", "0.770G", "74.03?", "not run", "-"]
    assert cells["resnet18_se"][-1] == "failed: out of memory"
    assert cells["resnet18_dcd"][2:8] == ["-", "-", "-", "72.33", "-", "-"]
    assert cells["resnet18_dcd"][-1] == "no configuration: published only"
    marks = dict(re.findall(r"^- \[(\w)\] (.*)$", markdown, re.MULTILINE))
    of_row = {model: re.findall(r"\[(\w)\]", row[0]) for model, row in cells.items()}
    assert [marks[m] for m in of_row["resnet18"]] == [
        "differs from the shipped configuration: epochs 100 -> 2; schedule.milestones "
        "[30, 60, 90] -> [0.6, 1.2, 1.8]",
        "mean and standard deviation of 2 seeds",
    ]
    assert "precision 'fp32' -> 'bf16'" in marks[of_row["kw_resnet18_1x"][0]]
    assert "- ? recalled and unconfirmed" in markdown
    for model, row in cells.items():
        if not model.startswith(("row", "--")):
            words = [w for cell in row for w in cell.split()]
            line = next(line for line in text.splitlines() if line.split(" ")[0] == model)
            assert line.split() == words


@pytest.mark.slow
def test_plots_stand_beside_the_table(task: Reproduction, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    write_report(task, task.rows(), out)
    markdown = (out / "table.md").read_text()
    assert "![accuracy](accuracy.svg)" in markdown
    assert "![curves](curves.svg)" in markdown
    accuracy, curves = ((out / f"{name}.svg").read_text() for name in ("accuracy", "curves"))
    # matplotlib writes every text as a comment beside its glyphs.
    for said in ("published", "recalled", "measured", "resnet18_dcd", "hours of training"):
        assert f"<!-- {said} -->" in accuracy
    assert "<!-- kw_resnet18_1x -->" in curves
    assert "<!-- resnet18_se -->" not in curves
    write_report(task, task.rows(), out)
    assert (out / "curves.svg").read_text() == curves


def test_without_matplotlib_there_are_tables(
    task: Reproduction,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    paths = write_report(task, task.rows(["resnet18"]), tmp_path / "out")
    assert [path.name for path in paths] == ["table.txt", "table.md"]
    assert "svg" not in paths[1].read_text()
    assert "pip install 'kernelwarehouse[demo]'" in capsys.readouterr().err


def test_what_may_change_a_result_is_compared() -> None:
    shipped = {"seed": 0, "data": {"root": "a", "workers": 8}, "ema": None, "list": [1, 2]}
    run = {"seed": 4, "data": {"root": "b", "workers": 0}, "ema": {"decay": 0.9}, "list": (1, 2)}
    assert differences(shipped, run, seed=False) == ["ema null -> unset", "ema.decay unset -> 0.9"]
    assert differences(shipped, {**shipped, "seed": 4}) == ["seed 0 -> 4"]
    seen = {"loggers": {"csv": {}}, "pictures": {"interval": 1}, "distributed.timeout_minutes": 3}
    assert differences(shipped, {**shipped, **seen}) == []
    weights = {"model": {"backbone": {"weights": "a.pth"}}}
    assert differences(weights, {"model": {"backbone": {"weights": "b.pth"}}}) == []
    gone = differences(weights, {"model": {"backbone": {"weights": None}}})
    assert gone == ["model.backbone.weights 'a.pth' -> null"]
    # Files may lie elsewhere; a name is that of other weights.
    named = {"model": {"weights": "timm:a1_in1k"}}
    for other in ("timm:a2_in1k", "mine.pth"):
        (found,) = differences(named, {"model": {"weights": other}})
        assert found == f"model.weights 'timm:a1_in1k' -> {other!r}"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("figures: classification", "figures: clasification", "did you mean 'classification'?"),
        ("source: repo", "source: rumour", "source is 'rumour', expected one of 'repo'"),
        ("top1: 70.25", "top1: high", "model 'resnet18': top1 = 'high': expected float"),
        ("top1: 70.25", "top_1: 70.25", "key 'top_1': there is none of that name; did you mean"),
        ("weights: imagenet_300ep/resnet50", "weights: imagenet_300ep/resnet51", "'resnet50'"),
    ],
)
def test_wrong_tables_are_named(old: str, new: str, expected: str, tmp_path: Path) -> None:
    from kw.evaluation.paper import PAPER_TABLES

    path = tmp_path / "tables.yaml"
    text = PAPER_TABLES.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ReportError) as error:
        read_tables(path)
    assert expected in str(error.value)
    assert str(path) in str(error.value)


def test_detectors_are_in_percent(tmp_path: Path) -> None:
    """COCO's figures are fractions in results.json and percent in the paper."""
    pytest.importorskip("mmdet", exc_type=ImportError)
    options = ("epochs=1", "model.backbone.weights=w.pth")
    task = Reproduction(paper_tables()["coco_mask_rcnn_1x"], FULL, tmp_path, options=options)
    row = task.table.row("mask_rcnn_kw_resnet50_1x")
    (run,) = map(task.resolve, task.runs(row))
    run.work_dir.mkdir(parents=True)
    (run.work_dir / "config.py").write_text(resolved_text(run.config, run.options))
    at, figures = {"epoch": 1, "iter": 7329}, {"bbox_mAP": 0.4150, "segm_mAP": 0.3861}
    train = {"mode": "train", **at, "seconds": 7200, "loss": 1.0}
    lines = [train, {"mode": "val", **at, **figures, "bbox_mAP_l": None}]
    (run.work_dir / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    results = {**figures, "weights": "model", "params": 46_000_000}
    (run.work_dir / "results.json").write_text(json.dumps(results))
    record(run, 0)
    write_report(task, [row], tmp_path / "out")
    cells = cells_of((tmp_path / "out/table.md").read_text())[row.model]
    assert cells[1:4] == ["46.00M", "-", "-"]  # nothing published of its size
    assert cells[4:7] == ["41.8", "41.5", "-0.3"]
    assert cells[7:10] == ["38.4", "38.6", "+0.2"]  # 38.61 - 38.4
    assert cells[10] == "2.000"
    notes = (tmp_path / "out/table.md").read_text()
    assert "differs from the shipped configuration: epochs 12 -> 1;" in notes
    assert "backbone.weights" not in notes
    assert "training images an epoch" not in notes  # 7,329 updates of 16: COCO's
