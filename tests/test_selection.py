"""The selector: what it chooses, what can be told to it, and what it remembers."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from convolutions import problem
from torch import nn

from kw import peers
from kw.config import ConfigError
from kw.config.run_schema import ContractionConfig
from kw.training import set_contraction
from kw.warehouse import KWConv2d, explain, set_backend
from kw.warehouse.ops import CONTRACTIONS, Cost, assembly_precision, selector
from kw.warehouse.ops.contraction import Contraction
from kw.warehouse.ops.device import DeviceProfile, estimated_profile
from kw.warehouse.ops.selection import Selector


class Fake(Contraction):
    """A back end that counts its calls and claims a cost."""

    def __init__(self, name, cost, refusal=None):
        self.name, self._cost, self._refusal = name, cost, refusal
        self.calls = 0

    def refusal(self, problem):
        return self._refusal

    def cost(self, problem):
        forward, both = self._cost
        return both if problem.training else forward

    def forward(self, x, alpha, cells, spec):
        self.calls += 1
        return CONTRACTIONS["assembled"].forward(x, alpha, cells, spec)

    def backward(self, *args):
        self.calls += 1
        return CONTRACTIONS["assembled"].backward(*args)


def calls(number):
    return Cost(launches=number)


@pytest.fixture
def fakes():
    """``a`` is quick forward, ``b`` quick backward, ``c`` cannot."""
    a = Fake("a", (calls(1), calls(10)))
    b = Fake("b", (calls(2), calls(4)))
    c = Fake("c", (calls(0), calls(0)), "is for Tuesdays")
    return Selector({f.name: f for f in (a, b, c)}, fallback="b")


@pytest.fixture(autouse=True)
def restored():
    yield
    selector.mode = "model"


def test_the_cheapest_that_can_is_chosen_for_each_pass(fakes):
    assert fakes.choose(problem()).name == "a"
    assert fakes.choose(problem(training=True)).name == "b"  # 4 - 2 calls against 10 - 1


def test_predictions_are_sorted_and_refusals_last(fakes):
    forward, backward = fakes.predict(problem()), fakes.predict(problem(training=True))
    assert [p.name for p in forward] == ["a", "b", "c"]
    assert [p.name for p in backward] == ["b", "a", "c"]
    assert forward[-1].seconds is None
    assert forward[-1].refusal == "is for Tuesdays"


def test_images_of_ever_new_sizes_take_no_ever_growing_memory(fakes, monkeypatch):
    monkeypatch.setattr("kw.warehouse.ops.selection._MOST_CHOICES", 4)
    for size in range(3, 20):
        assert fakes.choose(problem(size=size)).name == "a"
        assert len(fakes._chosen) <= 4


def test_forced_and_refused(fakes):
    assert fakes.choose(problem(), "b").name == "b"
    with pytest.raises(ValueError, match="back end 'c' cannot do this: is for Tuesdays"):
        fakes.choose(problem(), "c")


@pytest.mark.parametrize("mode", ["model", "measure"])
def test_what_the_doctor_has_banned_is_used_where_nothing_is_left(fakes, mode):
    """As on CPUs whose libraries are told to round (DNNL_DEFAULT_FPMATH_MODE)."""
    fakes.mode = mode
    rates = estimated_profile("cpu")
    for banned, expected in (("a", "b"), ("b", "a"), ("ab", "b")):
        bans = {f"{name} float32": "output is off by 4e-03" for name in banned}
        fakes.use_profile("cpu", replace(rates, bans=bans))
        assert fakes.choose(problem()).name == expected


def test_off_takes_the_fallback(fakes):
    assert fakes.choose(problem()).name == "a"
    fakes.mode = "off"
    assert fakes.choose(problem()).name == "b"


def test_unknown_mode_is_refused(fakes):
    with pytest.raises(ValueError, match="'mesure' is unknown; did you mean 'measure'"):
        fakes.mode = "mesure"
    assert fakes.mode == "model"


def test_time_is_arithmetic_or_memory_and_calls():
    profile = DeviceProfile({torch.float32: 100.0}, slow=10.0, bandwidth=50.0, launch=0.5)
    assert profile.seconds(Cost(200, 10, 100, 2), torch.float32) == 2 + 1 + 1
    assert profile.seconds(Cost(0, 0, 200, 0), torch.float32) == 4


def test_measured_once_kept_in_a_file_and_read_by_others(fakes, tmp_path, monkeypatch):
    monkeypatch.setenv("KW_CACHE_DIR", str(tmp_path))
    fakes.mode = "measure"
    small = problem(8, 4, batch=3)
    fakes.choose(small)
    counted = [fakes.contractions[name].calls for name in "ab"]
    assert all(counted)
    assert fakes.contractions["c"].calls == 0
    fakes.choose(replace(small, batch=4))  # rounded up to the same power of two
    assert [fakes.contractions[name].calls for name in "ab"] == counted
    (path,) = tmp_path.glob("timings-*.json")
    times = json.loads(path.read_text())
    ((key, own),) = times.items()
    assert set(own) == {"a", "b"}
    own["a"], own["b"] = 1.0, 0.5  # as another process may have found
    path.write_text(json.dumps({key: own}))
    other = Selector(fakes.contractions, fallback="a")
    other.mode = "measure"
    assert other.choose(small).name == "b"
    assert [fakes.contractions[name].calls for name in "ab"] == counted


def test_times_of_back_ends_that_are_none_here_are_passed_over(fakes, tmp_path, monkeypatch):
    """Another process had a compiler, or Triton, or a setting that this one has not."""
    monkeypatch.setenv("KW_CACHE_DIR", str(tmp_path))
    fakes.mode = "measure"
    fakes.choose(problem(8, 4, batch=2))
    (path,) = tmp_path.glob("timings-*.json")
    ((key, own),) = json.loads(path.read_text()).items()
    path.write_text(json.dumps({key: {**own, "a": 2.0, "b": 1.0, "c": 0.1}}))
    other = Selector(fakes.contractions, fallback="a")
    other.mode = "measure"
    assert other.choose(problem(8, 4, batch=2)).name == "b"
    path.write_text(json.dumps({key: {"c": 0.1}}))
    third = Selector(fakes.contractions, fallback="b")
    third.mode = "measure"
    assert third.choose(problem(8, 4, batch=2)).name == "a"  # the predicted one


def test_times_are_those_of_the_threads_and_of_the_precision(fakes, tmp_path, monkeypatch):
    monkeypatch.setenv("KW_CACHE_DIR", str(tmp_path))
    measured = []
    times = {"a": 1.0, "b": 2.0}
    monkeypatch.setattr(
        "kw.warehouse.ops.selection.time_contraction", lambda *_: measured.append(1) or times
    )
    fakes.mode = "measure"
    case, threads = problem(8, 4, batch=2), torch.get_num_threads()
    try:
        for count in (threads, threads + 1, threads):
            torch.set_num_threads(count)
            fakes.choose(case)
    finally:
        torch.set_num_threads(threads)
    assert len(measured) == 2
    for allowed in (True, False, True):
        monkeypatch.setattr("kw.warehouse.ops.selection.allows_tf32", lambda _, a=allowed: a)
        monkeypatch.setattr("kw.warehouse.ops.timing.allows_tf32", lambda _, a=allowed: a)
        fakes.choose(replace(case, batch=16))
    assert len(measured) == 4


@pytest.mark.parametrize("content", ['{"cut off', "[]", '{"KEY": 3}', '{"KEY": {"a": []}}'])
def test_a_broken_cache_file_is_measured_anew(content, fakes, tmp_path, monkeypatch):
    monkeypatch.setenv("KW_CACHE_DIR", str(tmp_path))
    fakes.mode = "measure"
    fakes.choose(problem(8, 4, batch=2))
    (path,) = tmp_path.glob("timings-*.json")
    (key,) = json.loads(path.read_text())
    path.write_text(content.replace("KEY", key))
    other = Selector(fakes.contractions, fallback="a")
    other.mode = "measure"
    assert other.choose(problem(8, 4, batch=2)).name in "ab"
    assert set(json.loads(path.read_text())[key]) == {"a", "b"}


def test_no_place_to_write_is_no_error(fakes, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("KW_CACHE_DIR", str(blocked / "below"))
    fakes.mode = "measure"
    assert fakes.choose(problem(8, 4, batch=2)).name in "ab"


@pytest.mark.slow
def test_choices_are_the_same_in_another_process():
    script = (
        "import torch\n"
        "from torch import nn\n"
        "from kw.warehouse import KWConv2d, explain\n"
        "torch.set_num_threads(1)\n"
        "net = nn.Sequential(KWConv2d(3, 64, 7, 2), KWConv2d(64, 64, 3, groups=64),\n"
        "    KWConv2d(64, 256, 1), KWConv2d(256, 256, 3)).eval()\n"
        "for c in explain(net, torch.zeros(2, 3, 32, 32)): print(c.layer, c.forward, c.backward)\n"
    )
    runs = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout
    assert len(runs[0].stdout.splitlines()) == 4


def test_explain_names_layers_problems_and_back_ends():
    net = nn.Sequential(KWConv2d(3, 8, 3, padding=1), nn.ReLU(), KWConv2d(8, 8, 1, stride=2)).eval()
    first, second = explain(net, torch.zeros(2, 3, 5, 7))
    assert (first.layer, second.layer) == ("0", "2")
    assert first.problem.size == (5, 7)
    assert second.problem.batch == 2
    assert first.forward == first.forward_costs[0].name
    assert {p.name for p in second.backward_costs} == set(CONTRACTIONS)


def test_explain_shows_what_is_forced():
    net = nn.Sequential(KWConv2d(3, 8, 3), KWConv2d(8, 8, 1)).eval()
    net[0].set_backend("grouped")
    net[1].set_backend("bmm")
    first, second = explain(net, torch.zeros(2, 3, 5, 7))
    assert (first.forward, first.backward, first.problem) == ("grouped", "grouped", None)
    assert (second.forward, second.backward) == ("bmm", "bmm")


@pytest.mark.parametrize("method", ["odconv", "fdconv", "kerneldna"])
def test_explain_gives_no_layer_the_back_end_of_another(method):
    """A pointwise ODConv layer of one kernel, FDConv and KernelDNA compute without back ends."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)).eval()
    settings = {"kernels": 2} if method == "fdconv" else {}
    peers.convert(net, method, layers="1|2", announce=False, **settings)
    net[0] = KWConv2d(3, 8, 3).eval()
    own, *others = explain(net, torch.zeros(2, 3, 5, 7))
    assert own.problem.spec.partition.kernel == (3, 3)
    for choice in others:
        assert (choice.forward, choice.backward, choice.problem) == ("none", "none", None)


def test_explain_wants_dynamic_layers():
    with pytest.raises(ValueError, match="Linear has no KernelWarehouse layer"):
        explain(nn.Linear(2, 2), torch.zeros(1, 2))


@pytest.mark.parametrize("name", CONTRACTIONS)
def test_costs_grow_with_the_problem(name):
    """More samples, or both passes, never cost less."""
    small = problem()
    contraction = CONTRACTIONS[name]
    if contraction.refusal(small):
        pytest.skip(f"{name} {contraction.refusal(small)}")

    def size(p):
        c = contraction.cost(p)
        return torch.tensor([c.dense_macs, c.slow_macs, c.bytes, c.launches])

    assert size(small).sum() > 0
    assert (size(replace(small, batch=16)) >= size(small)).all()
    assert (size(replace(small, training=True)) >= size(small)).all()


def test_set_backend_refuses_before_it_changes_anything():
    net = nn.Sequential(KWConv2d(4, 4, 3), KWConv2d(4, 4, 3, groups=4))
    with pytest.raises(ValueError, match="'groupd' is unknown; did you mean 'grouped'"):
        set_backend(net, "groupd")
    assert [layer.backend for layer in net] == ["auto", "auto"]


def test_a_configuration_says_how_layers_compute():
    net = nn.Sequential(KWConv2d(4, 4, 3))
    settings = ContractionConfig(backend="bmm", planner="off", assembly_precision="float32")
    try:
        set_contraction(settings, net)
        assert net[0].backend == "bmm"
        assert selector.mode == "off"
        assert assembly_precision() == "float32"
        with pytest.raises(ConfigError, match=r"contraction.backend: back end 'depthwise'"):
            set_contraction(ContractionConfig(backend="depthwise"), net)
        set_contraction(ContractionConfig(backend="bmm"), nn.Linear(2, 2))  # a static network
    finally:
        set_contraction(ContractionConfig(), nn.Identity())
    assert (selector.mode, assembly_precision()) == ("model", "autocast")
