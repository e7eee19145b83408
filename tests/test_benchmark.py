"""The benchmark: what is counted, how ratios are taken, files and tables; no times."""

from __future__ import annotations

import csv
import json
import runpy
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from kw.benchmark import machine
from kw.benchmark import memory as memory_of
from kw.benchmark import run as run_of
from kw.benchmark.cases import Case, LayerSource, load_cases, parse_layer
from kw.benchmark.conditions import BenchmarkError, Conditions
from kw.benchmark.memory import Event, measure_step, peak_beyond
from kw.benchmark.page import BEGIN, END, render_page, table_of
from kw.benchmark.results import Measured, Result, read_results, spread_of, write_result
from kw.benchmark.run import run_case
from kw.benchmark.steps import TrainingStep, build_step
from kw.benchmark.timing import Slow, interleave, iterations_for, warm_up
from kw.config import load_config
from kw.config.run_schema import OptimizerConfig
from kw.models import build_network
from kw.warehouse import KWLayer

DEMO = "configs/demo/kw_resnet18_1x.yaml"
SMALL = {"device": "cpu", "dtype": "float32", "batch_size": 2, "input_size": 16, "threads": 1}


def conditions(mode: str = "inference", **changes: object) -> Conditions:
    return Conditions(**{"mode": mode, "rounds": 2, **SMALL, **changes})  # type: ignore[arg-type]


def tiny(tmp_path: Path, name: str = "kw_tiny_1x", **model: object) -> str:
    """A configuration of a ResNet of one narrow block a stage."""
    settings = {
        "model": {
            "name": "resnet18",
            "num_classes": 4,
            "timm_args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]},
            "kernel_warehouse": {"plan": "resnet18", "start": "paper"},
            **model,
        },
        "data": {"root": "none", "input_size": 16},
        "optimizer": {"lr": 0.1},
        "epochs": 1,
        "total_batch_size": 2,
        "batch_size": 2,
    }
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def result_of(mode: str = "inference", **figures: object) -> Result:
    """A result with given figures of kw_resnet18_4x: total seconds, or bytes beyond."""
    networks = []
    for backend, figure in figures.items():
        model = "resnet18" if backend == "static" else "kw_resnet18_4x"
        network = Measured(model, backend)
        if isinstance(figure, str):
            network.problem = figure
        elif mode == "memory":
            kinds = ("parameters", "gradients", "optimizer", "beyond", "check")
            network.memory = dict.fromkeys(kinds, figure)
        else:
            network.iterations, network.seconds = 1, {"total": figure}
            if mode == "train":
                network.seconds |= dict.fromkeys(("forward", "backward", "optimizer"), figure)
        networks.append(network)
    shared = {"dtype": "float32", "input_size": 224, "threads": 2}
    batch = 32 if mode == "memory" else 8
    c = conditions(mode, **{**shared, "batch_size": batch})
    machine = {"device": "cpu", "cpu": "a CPU", "capability": "AVX2", "gpu": None}
    return Result(
        name=c.file_name("resnet18", "cpu"),
        family="resnet18",
        conditions=c,
        networks=networks,
        machine=machine,
        versions={"torch": "2.9", "triton": None},
        code={"commit": "abc", "dirty": False},
        date="2026-01-02T03:04:05+00:00",
    )


def test_file_names_carry_the_conditions() -> None:
    c = Conditions("inference", "cpu", "float32", 8, 224, 2)
    expected = "benchmark-infer-resnet18-cpu-float32-b8-224-t2-nchw-eager"
    assert c.file_name("resnet18", "cpu") == expected
    c = Conditions("train", "cuda", "bfloat16", 128, 224, 2, channels_last=True, compile=True)
    expected = "benchmark-train-resnet18-h200-bfloat16-b128-224-nhwc-compile"
    assert c.file_name("resnet18", "h200") == expected
    with pytest.raises(BenchmarkError, match="'a/b'"):
        c.file_name("a/b", "h200")


def test_another_projects_commit_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An environment within somebody's repository, in which this project is installed."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / "site-packages").mkdir()
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.describe_code()["commit"]
    monkeypatch.setattr(machine, "ROOT", tmp_path / "site-packages")
    assert machine.describe_code() == {"commit": None, "dirty": None}


def test_spreads_and_ratios_are_taken_over_rounds() -> None:
    assert spread_of([4, 1, 3, 2, 5]) == spread_of([1, 2, 3, 4, 5])
    spread = spread_of([1.0, 2, 3, 4, 5])
    assert (spread.median, spread.q1, spread.q3, spread.min, spread.max) == (3, 2, 4, 1, 5)
    # The machine slows down to a third in the third round: no ratio sees it.
    result = result_of(static=[1.0, 1, 3], grouped=[4.0, 4, 12], auto=[2.0, 2, 6])
    static, grouped, auto = result.networks
    assert result.ratio(auto, static) == spread_of([2.0] * 3)
    assert result.ratio(grouped, auto).median == 2
    rows = {row["backend"]: row for row in result.rows()}
    assert rows["auto"]["ms_median"] == 2000
    assert rows["auto"]["x_static_median"] == 2
    assert rows["auto"]["x_faster_than_grouped"] == 2
    # The median of ratios, which is not the ratio of medians.
    result = result_of(static=[1.0, 2, 4], auto=[4.0, 2, 4])
    assert result.ratio(result.networks[1], result.static).median == 1
    memory = result_of("memory", static=100, auto=150)
    assert memory.ratio(memory.networks[1], memory.static).median == 1.5


def test_rounds_are_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def time_one(step: str, iterations: int) -> list[float]:
        order.append(step)
        return [float(len(order) * iterations)]

    monkeypatch.setattr("kw.benchmark.timing.time_step", time_one)
    found = interleave([("a", 1), ("b", 10)], 3)  # type: ignore[list-item]
    assert order == ["a", "b"] * 3
    assert found == [[[1], [3], [5]], [[20], [40], [60]]]
    assert [iterations_for(t) for t in (0.5, 0.03, 1e-9)] == [1, 4, 50]


def test_peak_counts_what_is_left_over_and_not_what_is_kept() -> None:
    events = [
        Event(0, 1, 100),  # a buffer that the first step leaves behind
        Event(1, 2, 1000),
        Event(2, 2, -1000),
        Event(3, 9, -50),  # was there before
        Event(10, 2, 10),  # the window: a block at an address that a gradient takes later
        Event(11, 2, -10),
        Event(12, 2, 70),  # the gradient
        Event(13, 3, 5),
    ]
    assert peak_beyond(events, 10, {}) == 175
    assert peak_beyond(events, 10, {2: 0}) == 110
    assert peak_beyond(events, 10, {2: 60}) == 165  # of a block only ten bytes are a gradient
    assert peak_beyond(events, 0, {2: 0}) == 1100
    assert peak_beyond(events, 99, {2: 0}) == 105  # an empty window: what is there


class Toy:
    """``loss = mean(exp(x * w))`` with a scratch buffer that it keeps."""

    name = static_name = "toy"
    optimizer = OptimizerConfig(name="sgd", lr=0.1)

    def __init__(self, scratch: int) -> None:
        self.scratch = scratch

    def build(self, backend: str) -> nn.Module:
        source = self

        class Network(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.ones(1000))
                self.kept: Tensor | None = None

            def forward(self, x: Tensor) -> Tensor:
                if self.kept is None and source.scratch:
                    self.kept = torch.empty(source.scratch, dtype=torch.uint8)
                return (x * self.weight).exp()

        return Network()

    def example(self, batch_size: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return torch.ones(batch_size, 1000), torch.empty(0)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.mean()


def test_memory_is_exact_to_the_byte() -> None:
    """4 samples of 1000 float32: 16000 bytes each for x * w (freed), its exponential (saved)."""
    found = []
    for scratch in (0, 12345):
        step = build_step(Toy(scratch), "static", conditions("memory", batch_size=4))
        assert isinstance(step, TrainingStep)
        found.append(measure_step(step))
    memory, with_scratch = found
    assert (memory.parameters, memory.gradients, memory.optimizer) == (4000, 4000, 4000)
    # Backward holds most: the exponential, the gradient at the product, and that times x, before it
    # is summed over samples. The loss, what guards against one that is not finite, and their
    # gradients are scalars: a handful of them.
    assert 48000 <= memory.beyond <= 48064
    assert with_scratch.beyond == memory.beyond + 12345  # made in the first step, counted in all


def test_networks_of_one_static_form_share_a_run(tmp_path: Path) -> None:
    half = {"kernel_warehouse": {"plan": "resnet18", "cell_num_ratio": 2, "start": "paper"}}
    paths = [tiny(tmp_path), tiny(tmp_path, "kw_tiny_2x", **half)]
    paths.append(tiny(tmp_path, "kw_tiny_5", num_classes=5))
    first, second = load_cases(paths)
    assert first.subject == "resnet18_1x_2x"
    assert second.subject == "kw_tiny_5"
    variants = [(v.model, v.backend) for v in first.variants(["auto", "grouped"])]
    assert variants == [
        ("resnet18", "static"),
        ("kw_tiny_1x", "grouped"),
        ("kw_tiny_1x", "auto"),
        ("kw_tiny_2x", "grouped"),
        ("kw_tiny_2x", "auto"),
    ]
    source = first.sources[1]
    assert not any(isinstance(m, KWLayer) for m in source.build("static").modules())
    layers = [m for m in source.build("grouped").modules() if isinstance(m, KWLayer)]
    assert {layer.backend for layer in layers} == {"grouped"}


def test_a_run_writes_its_files(tmp_path: Path, tool, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["--input-size", 16, "--batch-size", 2, "--rounds", 2, "--threads", 1]
    modes = ["--mode", "inference", "train", "--device", "cpu", "--backend", "auto", "depthwise"]
    tool("tools/benchmark.py", DEMO, *arguments, *modes, "--output-dir", out)
    printed = capsys.readouterr().out
    stem = "kw_resnet18_1x-cpu-float32-b2-16-t1-nchw-eager"
    names = [f"benchmark-{mode}-{stem}" for mode in ("infer", "train")]
    expected = sorted(f"{name}.{suffix}" for name in names for suffix in ("csv", "json"))
    assert sorted(path.name for path in out.iterdir()) == expected

    content = json.loads((out / f"{names[1]}.json").read_text())
    assert content["conditions"]["rounds"] == 2
    assert {"cpu", "cores", "device", "environment"} <= set(content["machine"])
    assert content["versions"]["torch"] == str(torch.__version__)
    assert {"commit", "dirty"} == set(content["code"])
    networks = content["networks"]
    assert [network["backend"] for network in networks] == [
        "static",
        "grouped",
        "auto",
        "depthwise",
    ]
    for network in networks[:3]:
        times = network["seconds"]
        assert set(times) == {"forward", "backward", "optimizer", "total"}
        for i in range(2):
            parts = sum(times[part][i] for part in ("forward", "backward", "optimizer"))
            assert times["total"][i] == pytest.approx(parts, abs=1e-8)
    # the network has no depthwise layers: no figures, and the run goes on.
    assert networks[3]["problem"].startswith("unavailable: back end 'depthwise'")
    assert "unavailable: back end 'depthwise'" in printed

    with (out / f"{names[1]}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["part"] for row in rows].count("total") == 3
    static = [row for row in rows if row["backend"] == "static"]
    assert {float(row["x_static_median"]) for row in static} == {1.0}


@pytest.mark.slow
def test_memory_is_the_same_in_a_process_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = parse_layer("in=8,out=8,size=8")
    c = conditions("memory", input_size=8, batch_size=4)
    apart = memory_of.measure_apart(layer, "auto", c)
    monkeypatch.setattr(memory_of, "measure_apart", memory_of.measure_here)
    static, grouped, auto = run_case(Case((layer,)), c).networks
    assert static.memory["parameters"] == static.memory["gradients"] == 8 * 8 * 9 * 4
    for network in (grouped, auto):
        assert network.memory["beyond"] > static.memory["beyond"] > 0
    assert isinstance(apart, memory_of.Memory)
    assert auto.memory["beyond"] == apart.beyond
    with pytest.raises(BenchmarkError, match="unavailable: back end 'depthwise'"):
        run_case(Case((layer,)), c, ["depthwise"])


def test_layers() -> None:
    layer = parse_layer("in=16, out=32, size=7, stride=2, ratio=4, share=2")
    assert layer == LayerSource(16, 32, 3, 2, 1, 1, 7, 4.0, 2)
    assert layer.name == "kw_conv_16x32_k3_s2_p1_4x_share2"
    dynamic = layer.build("grouped")
    assert isinstance(dynamic, KWLayer)
    assert dynamic.warehouse.cells.shape == (4 * 2 * 9, 16 * 32)
    assert {name for name, _ in dynamic.named_parameters()} >= {"warehouse.weight"}
    inputs, _ = layer.example(2, (7, 7))
    assert dynamic(inputs).shape == layer.build("static")(inputs).shape == (2, 32, 4, 4)
    assert parse_layer("in=8,out=8,size=7,kernel=1").padding == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("in=8,out=8", ["size missing"]),
        ("in=8,out=8,size=7,strid=2", ["strid=2", "did you mean 'stride'"]),
        ("in=8,out=8,size=7,in=9", ["in is given twice"]),
        ("in=8,out=8,size=seven", ["size is 'seven'", "a number"]),
        ("in=8,out=8,size=7,groups=3", ["groups"]),
        ("in=8,out=8,size=7,ratio=1.5", ["cell_num_ratio"]),
        ("in=8,out=8,size=2,kernel=5,padding=0", ["--layer"]),
        ("in=8,out=8,size=2,stride=0", ["--layer"]),
    ],
)
def test_wrong_layers_are_refused(text: str, words: list[str]) -> None:
    with pytest.raises(BenchmarkError) as caught:
        parse_layer(text)
    assert all(word in str(caught.value) for word in words), caught.value


def test_what_cannot_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = load_cases([tiny(tmp_path)])[0]
    with pytest.raises(BenchmarkError, match="'groupd' is unknown; did you mean 'grouped'"):
        run_case(case, conditions(), ["groupd"])
    with pytest.raises(BenchmarkError, match="unavailable: back end 'depthwise'"):
        run_case(case, conditions(), ["depthwise"])
    with pytest.raises(BenchmarkError, match="static network"):
        load_cases(["configs/demo/resnet18.yaml"])
    with pytest.raises(BenchmarkError, match="kw_tiny_1x: named twice"):
        load_cases([tiny(tmp_path)] * 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BenchmarkError, match="no GPU"):
        run_case(case, conditions(device="cuda"))

    # An input that is too small for the static network is a mistake, in every mode.
    monkeypatch.setattr(memory_of, "measure_apart", memory_of.measure_here)
    layer = Case((parse_layer("in=8,out=8,size=7,kernel=5,padding=0"),))
    for mode in ("train", "memory"):
        with pytest.raises(BenchmarkError, match=r"the static network: unavailable: .*[Kk]ernel"):
            run_case(layer, conditions(mode, input_size=2))

    # Memory that runs out, and an iteration that takes too long, are findings.
    def warm_up_badly(step: object) -> int:
        backend = next((m.backend for m in step.network.modules() if isinstance(m, KWLayer)), None)
        if backend == "grouped":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if backend == "auto":
            raise Slow("99 s an iteration")
        return 1

    monkeypatch.setattr(run_of, "warm_up", warm_up_badly)
    result = run_case(case, conditions())
    problems = [network.problem for network in result.networks]
    assert problems == [None, "out of memory", "too slow: 99 s an iteration"]
    assert "out of memory" in table_of(result)
    monkeypatch.setattr(memory_of, "measure_apart", lambda *_: "out of memory")
    with pytest.raises(BenchmarkError, match="resnet18, the static network: out of memory"):
        run_case(case, conditions("memory"))
    monkeypatch.setattr("kw.benchmark.timing.LIMIT_SECONDS", -1.0)
    with pytest.raises(Slow):
        warm_up(build_step(case.sources[0], "static", conditions()))


def test_the_static_network_of_a_runtime_is_static() -> None:
    """Of a peer, too; and a static one is not compared with itself."""
    script = runpy.run_path("scripts/benchmark_runtimes.py", run_name="read")
    peer = load_config("configs/imagenet/resnet18/resnet18_odconv4x_100ep.yaml")
    found = script["static_twin"](peer)
    assert not any(isinstance(m, KWLayer) for m in build_network(found.model).modules())
    with pytest.raises(BenchmarkError, match="static network"):
        script["static_twin"](found)


def test_render_makes_the_same_page_from_files(tmp_path: Path, tool) -> None:
    pytest.importorskip("matplotlib")
    folder, page = tmp_path / "benchmarks", tmp_path / "benchmarks.md"
    results = [
        result_of(static=[1.0, 1.1], grouped=[3.0, 3.1], auto=[1.5, 1.6]),
        result_of("train", static=[1.0, 1.1], grouped="out of memory", auto=[2.5, 2.6]),
        result_of("memory", static=100, grouped=400, auto=150),
    ]
    for result in results:
        write_result(result, folder)
    with pytest.raises(BenchmarkError, match="expected once"):
        render_page(folder, results, page)
    page.write_text(f"Before.\n{BEGIN}\nold\n{END}\nAfter.\n")
    read = read_results(folder)
    assert sorted(read, key=lambda r: r.name) == sorted(results, key=lambda r: r.name)
    written = render_page(folder, read, page)
    assert [path.name for path in written] == ["resnet18-cpu.svg", "benchmarks.md"]
    text, picture = page.read_text(), written[0].read_bytes()
    assert text.startswith(f"Before.\n{BEGIN}\n\n## a CPU (AVX2)")
    assert text.endswith(f"{END}\nAfter.\n")
    assert "](benchmarks/resnet18-cpu.svg)" in text
    assert "old" not in text
    for result in results:
        assert table_of(result) in text
    render_page(folder, read_results(folder), page)
    assert page.read_text() == text
    assert written[0].read_bytes() == picture
    folder = folder.rename(tmp_path / "v1.2")
    page.rename(tmp_path / "v1.2.md")
    tool("tools/benchmark.py", "--render", folder)
    assert "](v1.2/resnet18-cpu.svg)" in (tmp_path / "v1.2.md").read_text()

    with pytest.raises(BenchmarkError, match="no files"):
        read_results(tmp_path)
    for content in ("{}", "[]"):
        (folder / "benchmark-x.json").write_text(content)
        with pytest.raises(BenchmarkError, match=r"benchmark-x\.json is no benchmark result"):
            read_results(folder)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "expected one of"),
        ([DEMO, "--render", "docs"], "expected one of"),
        (["--render", "docs", "--dtype", "bfloat16"], "--dtype"),
        ([DEMO, "--mode", "latency"], "latency"),
        ([DEMO, "--dtype", "int8"], "int8"),
        ([DEMO, "--device", "tpu"], "tpu"),
        (["none.yaml"], "none.yaml"),
    ],
)
def test_mistakes_are_one_message(
    tool, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        tool("tools/benchmark.py", *arguments)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err
