"""Rates of devices: measured ones, one set for a run; what kw doctor finds."""

from __future__ import annotations

import json
import logging
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from convolutions import problem
from processes import in_processes
from test_admission import Compiled, wrong_cells
from torch import nn

from kw.benchmark import doctor
from kw.benchmark.machine import describe_versions
from kw.config import config_from_mapping
from kw.training import load_checkpoint, train
from kw.training.distributed import find_process
from kw.training.hooks import RatesHook
from kw.warehouse import KWConv2d
from kw.warehouse.ops import CONTRACTIONS, calibration, precision, selector
from kw.warehouse.ops.calibration import calibration_file, device_profile, write_calibration
from kw.warehouse.ops.device import DeviceProfile, estimated_profile
from kw.warehouse.ops.gpus import GPUS

PLAIN = DeviceProfile({torch.float32: 1e11}, slow=1e9, bandwidth=1e10, launch=1e-6)


@pytest.fixture(autouse=True)
def restored():
    yield
    selector.use_profile("cpu", None)


# --- measured rates ---------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KW_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("KW_CALIBRATION")
    return tmp_path / "cache"


def test_a_file_says_what_is_chosen(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = problem(channels=64, size=14)
    assert device_profile("cpu") == estimated_profile("cpu")
    first, second = (each.name for each in selector.predict(case)[:2])
    measured = replace(PLAIN, factors={first: (100.0, 1.0)}, origin="measured")
    path = write_calibration("cpu", measured)
    assert path == calibration_file("cpu")
    assert path.parent == cache
    assert device_profile("cpu") == measured
    forward = [each.name for each in selector.predict(case)]
    assert forward[0] != first
    write_calibration("cpu", replace(PLAIN, bans={f"{first} float32": "wrong"}))
    refusals = {each.name: each.refusal for each in selector.predict(case)}
    assert refusals[first] == "wrong"
    assert not refusals[second]
    monkeypatch.setenv("KW_CALIBRATION", "0")
    assert device_profile("cpu") == estimated_profile("cpu")


@pytest.mark.parametrize("content", ["{", "{}", '{"multiply_adds_a_second": 3}', "[]"])
def test_a_broken_file_is_said_and_not_used(
    cache: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_calibration("cpu", PLAIN)
    path.write_text(content)
    calibration._read.cache_clear()
    assert device_profile("cpu") == estimated_profile("cpu")
    assert f"{path}: " in caplog.text
    assert "kw doctor" in caplog.text
    calibration._read.cache_clear()


def test_rates_survive_a_file() -> None:
    whole = replace(PLAIN, tf32=3.5, factors={"bmm": (1.5, 0.25)}, bans={"native float32": "x"})
    assert DeviceProfile.from_json(json.loads(json.dumps(whole.to_json()))) == whole


# --- one set for a run ------------------------------------------------------------------------


def trainer_of(process: Any, folder: Path) -> Any:
    task = SimpleNamespace(network=nn.Sequential(KWConv2d(4, 4, 1)))
    return SimpleNamespace(process=process, task=task, work_dir=folder)


def check_broadcast(process: Any, folder: Path) -> None:
    selector.use_profile("cpu", replace(PLAIN, launch=1e-6 * (process.rank + 1)))
    hook = RatesHook()
    hook.before_training(trainer_of(process, folder))
    assert selector.profile("cpu").launch == 1e-6
    hook.close(trainer_of(process, folder))
    assert selector.profile("cpu") == estimated_profile("cpu")


def test_all_processes_have_the_rates_of_the_first(tmp_path: Path) -> None:
    in_processes(check_broadcast, 2, tmp_path)
    assert json.loads((tmp_path / "rates.json").read_text())["rates"]["seconds_a_call"] == 1e-6


def test_a_resumed_run_keeps_its_rates(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings["epochs"] = 1
    selector.use_profile("cpu", replace(PLAIN, origin="of the first day"))
    train(config_from_mapping(settings), tmp_path)
    kept = load_checkpoint(tmp_path / "last.pth")["ranks"][0]["hooks"]["RatesHook"]
    assert kept["rates"]["origin"] == "of the first day"
    settings["epochs"] = 2
    train(config_from_mapping(settings), tmp_path, resume=True)
    again = load_checkpoint(tmp_path / "last.pth")["ranks"][0]["hooks"]["RatesHook"]
    assert again == kept
    assert selector.profile("cpu") == estimated_profile("cpu")  # of the run alone


def test_another_device_has_its_own(tmp_path: Path) -> None:
    hook = RatesHook()
    hook.load_state_dict({"machine": "another", "rates": PLAIN.to_json()})
    trainer = trainer_of(find_process("none"), tmp_path)
    hook.before_training(trainer)
    assert selector.profile("cpu") == estimated_profile("cpu")
    hook.close(trainer)


# --- precisions -----------------------------------------------------------------------------------


def test_contractions_round_as_convolutions_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert precision.allows_tf32("cuda")
    assert not precision.allows_tf32("cpu")
    case = problem(512, 7, batch=128, device="cuda")
    rounded = {each.name: each.seconds for each in selector.predict(case, GPUS["h100"].profile())}
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert not precision.allows_tf32("cuda")
    exact = {each.name: each.seconds for each in selector.predict(case, GPUS["h100"].profile())}
    assert exact["assembled"] > 2 * rounded["assembled"]


def test_threads_share_the_setting_and_restore_it() -> None:
    """As backward passes of several GPUs do; a tensor that says it is on one stands in."""
    x: Any = SimpleNamespace(dtype=torch.float32, device=SimpleNamespace(type="cuda"))
    products: Any = torch.backends.cuda.matmul
    before, met = products.fp32_precision, threading.Barrier(3)

    def contract(seconds: float) -> None:
        with precision.as_convolutions_round(x):
            met.wait()
            time.sleep(seconds)
            found.append(products.fp32_precision)

    found: list[Any] = []
    threads = [threading.Thread(target=contract, args=(n / 50,)) for n in (1, 3, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["tf32"] * 3
    assert products.fp32_precision == before


@pytest.fixture
def newer_setting() -> Any:
    """Torch's newer interface, after which it refuses to be read through the older one."""
    places: Any = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [place.fp32_precision for place in places]
    places[0].fp32_precision, places[1].fp32_precision = "ieee", "tf32"
    yield
    for place, value in zip(places, before, strict=True):
        place.fp32_precision = value


def test_torchs_newer_setting_does_no_harm(newer_setting: None) -> None:
    with pytest.raises(RuntimeError):
        torch.get_float32_matmul_precision()
    assert not precision.allows_tf32("cuda")
    assert describe_versions("cpu")["float32_matmul_precision"] == "tf32"
    KWConv2d(4, 4, 3)(torch.randn(2, 4, 5, 5)).sum().backward()


def test_products_still_follow_the_setting_for_everything(newer_setting: None) -> None:
    everything: Any = torch.backends
    x: Any = SimpleNamespace(dtype=torch.float32, device=SimpleNamespace(type="cuda"))
    everything.cudnn.conv.fp32_precision = everything.cuda.matmul.fp32_precision = "none"
    try:
        for value in ("tf32", "ieee"):
            everything.fp32_precision = value
            assert everything.cuda.matmul.fp32_precision == value
            with precision.as_convolutions_round(x):
                assert everything.cuda.matmul.fp32_precision == value
    finally:
        everything.fp32_precision = "none"


# --- kw doctor --------------------------------------------------------------------------------


@pytest.fixture
def few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SHAPES", ((16, 16, 3, 1, 1, 6, 1), (16, 16, 3, 1, 16, 6, 1)))


def test_the_doctor_measures(
    tool: Any, tmp_path: Path, cache: Path, few_shapes: None, capsys: pytest.CaptureFixture[str]
) -> None:
    tool("kw doctor", "--json", tmp_path / "report.json")
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "report.json").read_text())["devices"]["cpu"]
    assert found["versions"]["torch"] == torch.__version__
    assert {each["backend"] for each in found["findings"]} == set(CONTRACTIONS)
    done = [each for each in found["findings"] if each["deviations"]]
    assert {"assembled", "bmm", "mix_inputs", "depthwise"} <= {each["backend"] for each in done}
    gradients = {name for each in done if each["backward"] for name in each["deviations"]}
    assert len(gradients) == 3
    assert not found["profile"]["bans"]
    assert max(v for e in done if e["dtype"] == "float32" for v in e["deviations"].values()) < 1e-4
    assert found["calibration"] == str(calibration_file("cpu"))
    measured = device_profile("cpu")
    assert measured.origin == "measured by kw doctor"
    assert set(measured.factors) >= {"assembled", "bmm"}
    assert "runs on CUDA devices" in out
    assert "cuda: torch sees no GPU" in out or torch.cuda.is_available()


def test_a_wrong_back_end_is_found_and_banned(
    tool: Any,
    cache: Path,
    few_shapes: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(CONTRACTIONS, "compiled", Compiled(wrong_cells))
    tool("kw doctor")
    out = capsys.readouterr().out
    assert "BANNED: compiled float32: 16->16 3x3 @6: gradient of the cells is off by 1e-02" in out
    monkeypatch.delitem(CONTRACTIONS, "compiled")
    assert "compiled float32" in device_profile("cpu").bans


def test_without_time_nothing_is_kept(
    tool: Any, cache: Path, capsys: pytest.CaptureFixture[str], caplog: Any
) -> None:
    caplog.set_level(logging.WARNING)
    tool("kw doctor", "--seconds", 0)
    out = capsys.readouterr().out
    assert "0 of 12 shapes in 0 s" in out
    assert "no rates are kept" in out
    assert not list(cache.glob("calibration*"))
