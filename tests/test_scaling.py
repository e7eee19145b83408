"""The scaling model: DDP's own buckets, cases reckoned by hand, and the files behind its page."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from kw import convert
from kw.benchmark.cases import NetworkSource
from kw.benchmark.conditions import BenchmarkError, Conditions
from kw.benchmark.scaling.buckets import MIB, Gradient, fill_buckets, in_order, reduce_in_buckets
from kw.benchmark.scaling.files import (
    Profile,
    provenance,
    read_folder,
    read_profile,
    read_step,
    to_dict,
)
from kw.benchmark.scaling.links import CLUSTERS, Cluster, Link
from kw.benchmark.scaling.model import Step, memory_of, scale_ddp, scale_fsdp
from kw.benchmark.scaling.page import render_page
from kw.benchmark.scaling.predict import predict_step
from kw.benchmark.scaling.processes import Plan, measure_processes
from kw.benchmark.scaling.profile import profile_step
from kw.benchmark.scaling.validation import fit_link
from kw.cli import run_tool
from kw.config import load_config
from kw.warehouse.ops.device import DeviceProfile

ROOT = Path(__file__).parents[1]
# One byte a second and no latency: a ring of two takes as many seconds as there are bytes.
PLAIN = Cluster("plain", 2, Link(1.0, 0.0), Link(1.0, 0.0))
GRADIENTS = [  # as registered: the cells first, complete late
    Gradient("cells", 4, 0.9, used=0.1),
    Gradient("first", 1, 1.0),
    Gradient("middle", 2, 0.5),
    Gradient("last", 1, 0.2),
]


@pytest.fixture
def source() -> NetworkSource:
    options = ("data.input_size=32", "model.num_classes=10")
    path = ROOT / "configs/imagenet/resnet18/kw_resnet18_1d4x.yaml"
    return NetworkSource("kw_resnet18_1d4x", load_config(path, options))


@pytest.mark.parametrize("limits", [(1 << 10, 1 << 14), (1 << 14, 1 << 14), (1, 1), (1 << 30,) * 2])
def test_buckets_are_filled_as_torch_fills_them(limits: tuple[int, int]) -> None:
    draw = random.Random(1)
    tensors = [torch.empty(draw.choice((1, 64, 700, 5000))) for _ in range(60)]
    expected, _ = dist._compute_bucket_assignment_by_size(tensors, list(limits), [False] * 60)
    assert fill_buckets([4 * t.numel() for t in tensors], limits[1], limits[0]) == expected


@pytest.mark.parametrize("bucket_mb", [None, 0.25, 1])
def test_the_rule_gives_the_buckets_that_ddp_ends_up_with(tmp_path: Path, bucket_mb) -> None:
    """Cells shared by several layers come after the first of them, whatever their registration."""
    torch.manual_seed(0)
    blocks = [nn.Conv2d(64, 64, 3, padding=1) for _ in range(4)]
    network = convert(
        nn.Sequential(nn.Conv2d(3, 64, 3), *blocks), "auto", cell_num_ratio=2, start="paper"
    )
    assert any("warehouse" in name for name, _ in network.named_parameters())
    images = torch.randn(2, 3, 8, 8)
    came: list[int] = []
    parameters = list(network.parameters())
    hooks = [
        p.register_post_accumulate_grad_hook(lambda _, i=i: came.append(i))
        for i, p in enumerate(parameters)
    ]
    network(images).sum().backward()
    for hook in hooks:
        hook.remove()
    network.zero_grad()
    gradients = [
        Gradient(str(i), 4 * p.numel(), came.index(i) / len(came)) for i, p in enumerate(parameters)
    ]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ddp = nn.parallel.DistributedDataParallel(network, bucket_cap_mb=bucket_mb)
        for _ in range(3):
            ddp(images).sum().backward()
        log = ddp._get_ddp_logging_data()
    finally:
        dist.destroy_process_group()
    found = [int(size) for size in log["rebuilt_bucket_sizes"].split(",")]
    limit, first = (25 * MIB, MIB) if bucket_mb is None else (int(bucket_mb * MIB), None)
    timeline = reduce_in_buckets(gradients, 1.0, lambda size: 0.0, limit=limit, first=first)
    assert found == list(timeline.buckets)
    assert len(found) > (bucket_mb != 1)


@pytest.mark.parametrize(
    ("order", "limit", "buckets", "exposed"),
    [
        # Arrival: last at 2, middle at 5, cells at 9, first at 10; ends 3, 7, 13, 14.
        ("arrival", 1, (1, 2, 4, 1), 4.0),
        # Bucket (last, middle) at 5 ends at 8; (cells) at 9 ends at 13; (first) ends at 14.
        ("arrival", 3, (3, 4, 1), 4.0),
        # Registration reversed: last, middle, first, cells: first holds up the cells until 11.
        ("registration", 1, (1, 2, 1, 4), 5.0),
        ("single", 1, (8,), 8.0),
    ],
)
def test_a_timeline_reckoned_by_hand(order, limit, buckets, exposed) -> None:
    found = reduce_in_buckets(GRADIENTS, 10.0, float, limit=limit, order=order)
    assert (found.buckets, found.exposed, found.seconds) == (buckets, pytest.approx(exposed), 8.0)


def test_communication_that_ends_before_the_pass_is_not_exposed() -> None:
    assert reduce_in_buckets(GRADIENTS, 10.0, lambda size: 0.0, limit=1).exposed == 0


def test_equal_arrivals_keep_the_backward_order() -> None:
    alike = [Gradient(name, 1, 0.5) for name in "abc"]
    assert [g.name for g in in_order(alike, "arrival")] == ["c", "b", "a"]


def test_all_reduce_by_hand() -> None:
    cluster = Cluster("two levels", 4, Link(100.0, 0.1), Link(10.0, 1.0), call=0.5)
    # In a node of 4: 6 steps of 1/4 of 400 bytes at 100 bytes a second, and 6 latencies.
    assert cluster.all_reduce(400, 4) == pytest.approx(0.5 + 6.0 + 0.6)
    # 2 nodes: a quarter each, in a ring of 2: 2 * 1/2 * 100 / 10 and 2 latencies.
    assert cluster.all_reduce(400, 8) == pytest.approx(7.1 + 10 + 2)
    # 16 nodes: ring 2 * 15/16 * 10 + 30 = 48.75, tree 20 + 2 * 4 = 28.
    assert cluster.all_reduce(400, 64) == pytest.approx(7.1 + 28)
    assert cluster.all_gather(400, 64) == pytest.approx(0.5 + (6.6 + 28) / 2)
    assert cluster.all_reduce(400, 1) == 0


@pytest.mark.parametrize("gpus", [0, 3 * 8 + 1, 12])
def test_nodes_are_filled(gpus: int) -> None:
    with pytest.raises(BenchmarkError, match=f"{gpus} GPUs: expected"):
        CLUSTERS["h100-ndr"].all_reduce(1.0, gpus)


def test_links_have_sources() -> None:
    for cluster in CLUSTERS.values():
        assert cluster.between.source
        assert cluster.inside.source or cluster.gpus_per_node == 1


def test_ddp_by_hand() -> None:
    step = Step(images=6, forward=5.0, backward=10.0, optimizer=1.0)
    found = scale_ddp(step, GRADIENTS, PLAIN, 2, limit=1)
    assert (found.exposed, found.seconds) == (pytest.approx(4.0), pytest.approx(20.0))
    assert found.efficiency == pytest.approx(16 / 20)
    assert found.images_per_second == pytest.approx(12 / 20)
    assert scale_ddp(step, GRADIENTS, PLAIN, 1, limit=1).efficiency == 1


def test_fsdp_by_hand() -> None:
    """Gathers take half: rest 2 s, cells 2 s from the start of their gather."""
    step = Step(images=6, forward=5.0, backward=10.0, optimizer=1.0)
    # Rest until 2; cells 2 to 4, first used at 0.1 * 5 + 2 = 2.5: a stall of 2 + 1.5. Backward:
    # cells scattered from 9 to 11, rest from 11 to 13: 3 exposed.
    found = scale_fsdp(step, GRADIENTS, PLAIN, 2)
    assert found.exposed == pytest.approx(3.5 + 3)
    assert found.seconds == pytest.approx(15 + 0.5 + 6.5)
    # Again in the backward pass: rest until 2, cells until 4, wanted at 2.
    again = scale_fsdp(step, GRADIENTS, PLAIN, 2, reshard=True)
    assert again.exposed == pytest.approx(6.5 + 4)


def test_memory_by_hand() -> None:
    held = memory_of(GRADIENTS, 4, average=True)  # 8 bytes of parameters, AdamW
    assert (held.total, held.gathered) == (8 * 5, 0)
    # A quarter of it, all parameters whole, and the largest whole gradient: 4 of the cells.
    assert memory_of(GRADIENTS, 4, average=True, sharded=True).total == 10 + 8 + 4
    assert memory_of(GRADIENTS, 4, states=1).total == 8 * 3


def test_a_link_is_found_again_from_its_times() -> None:
    link = Link(bandwidth=2e9, latency=30e-6)
    cluster = Cluster("here", 3, link, link)
    found = fit_link({size: cluster.all_reduce(size, 3) for size in (4096, MIB, 64 * MIB)}, 3)
    assert found.bandwidth == pytest.approx(2e9)
    assert found.latency == pytest.approx(30e-6)


def test_prediction_of_a_static_network_by_hand() -> None:
    """A device of 1e9 multiply-adds a second and endless memory: arithmetic alone."""
    path = ROOT / "configs/imagenet/resnet18/resnet18.yaml"
    source = NetworkSource("resnet18", load_config(path))
    profile = DeviceProfile({torch.float32: 1e9}, slow=1e9, bandwidth=float("inf"), launch=0.0)
    step = predict_step(source, 2, torch.float32, profile)
    assert step.forward == pytest.approx(2 * 1.814073344, rel=1e-6)  # G multiply-adds an image
    assert step.backward == pytest.approx(2 * step.forward)


@pytest.fixture
def profile(source: NetworkSource) -> Profile:
    measured = profile_step(source, Conditions("train", "cpu", "float32", 2, 32, 1, rounds=2))
    return Profile(source.name, 32, "float32", 1, measured, provenance("cpu"))


def test_a_profile_follows_every_gradient(source: NetworkSource, profile: Profile) -> None:
    found = {gradient.name: gradient for gradient in profile.measured.gradients}
    expected = dict(source.build("auto").named_parameters())
    assert {name: g.bytes for name, g in found.items()} == {
        name: 4 * p.numel() for name, p in expected.items()
    }
    assert all(0 < gradient.ready <= 1 for gradient in found.values())
    cells = [gradient for name, gradient in found.items() if name.endswith(".warehouse.weight")]
    assert cells
    assert {g.name for g in found.values() if g.used is not None} == {g.name for g in cells}
    # Of layer 4's cells: after the attention of its last layers, before the stem.
    last, stem = found["layer4.0.conv2.warehouse.weight"], found["conv1.weight"]
    assert found["layer4.1.conv2.attention.fc1.weight"].ready < last.ready < stem.ready
    assert last.used is not None
    assert last.used > (found["layer1.0.conv1.warehouse.weight"].used or 1)


def test_files_come_back_as_they_were(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / f"{profile.name}.json"
    path.write_text(json.dumps(to_dict(profile)))
    assert read_profile(path) == profile
    assert read_folder(tmp_path).profiles == {profile.model: profile}
    (tmp_path / "profile-other.json").write_text(path.read_text())
    with pytest.raises(BenchmarkError, match="is there twice"):
        read_folder(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"measured": 3}'])
def test_files_that_are_none(content: str, tmp_path: Path) -> None:
    path = tmp_path / "profile-x.json"
    path.write_text(content)
    for read in (read_profile, lambda path: read_step(path, "x"), lambda p: read_folder(p.parent)):
        with pytest.raises(BenchmarkError, match="profile-x"):
            read(path)


def test_a_step_of_the_benchmark() -> None:
    name = "benchmark-{}-resnet18-cpu-float32-b8-224-t2-nchw-eager.json"
    folder = ROOT / "docs/benchmarks"
    step, device = read_step(folder / name.format("train"), "kw_resnet18_4x")
    assert (step.images, device) == (8, "cpu")
    assert step.backward > step.forward > step.optimizer > 0
    with pytest.raises(BenchmarkError, match="has no training step of kw_resnet50_4x"):
        read_step(folder / name.format("train"), "kw_resnet50_4x")
    with pytest.raises(BenchmarkError, match="it has inference of"):
        read_step(folder / name.format("infer"), "kw_resnet18_4x")


def test_a_step_that_was_predicted() -> None:
    path = ROOT / "docs/scaling/step-kw_resnet18_4x-h100-bfloat16-b128.json"
    step, device = read_step(path, "kw_resnet18_4x")
    assert (step.images, device) == (128, "h100, predicted")
    with pytest.raises(BenchmarkError, match="a step of kw_resnet18_4x; expected one of resnet18"):
        read_step(path, "resnet18")


def test_processes_that_cannot_be(source: NetworkSource, monkeypatch) -> None:
    with pytest.raises(BenchmarkError, match="expected at least 1"):
        Plan(source.config, (0, 2)).check()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BenchmarkError, match=r"has 1 GPU\(s\)"):
        Plan(replace(source.config), (2,)).check()


def test_two_processes_take_the_engines_update(source: NetworkSource) -> None:
    config = replace(source.config, batch_size=2)
    found = measure_processes(Plan(config, (1, 2), rounds=1, warm_up=2, updates=1))
    for times in (found.together, found.apart):
        assert set(times) == {1, 2}
        assert all(len(own) == 1 and own[0] > 0 for own in times.values())
    gradients = sum(4 * p.numel() for p in source.build("auto").parameters())
    assert sum(found.buckets[2]) == gradients
    assert found.reduce[2][2**26] > found.reduce[2][2**20] > 0


def test_the_page_is_up_to_date() -> None:
    page = ROOT / "docs/scaling.md"
    text = page.read_text()
    assert render_page(text, read_folder(ROOT / "docs/scaling", ROOT / "docs/benchmarks")) == text
    with pytest.raises(BenchmarkError, match="expected each of"):
        render_page(text.replace("<!-- table: memory -->", ""), read_folder(page.parent / "none"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["project", "none.json"], "none.json: cannot be read"),
        (["measure", "x.py", "--processes", "2"], "x.py: a detector's configuration"),
        (["measure", "x.yaml", "--processes", "0"], "expected an integer >= 1"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, monkeypatch, capsys) -> None:
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "tools/scaling.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(sys, "argv", ["tools/scaling.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        run_tool(tool.main)
    assert message in capsys.readouterr().err
