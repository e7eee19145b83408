"""Ultralytics' trainers with dynamic networks: what they train, save, resume, load and export."""

from __future__ import annotations

import copy
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shapes_set import make_data
from torch import nn

import kw
from kw.integrations.core import Recipe
from kw.warehouse import KWConv2d, find_warehouses

YAMLS = {
    "detect": "yolo11n.yaml",
    "segment": "yolo11n-seg.yaml",
    "pose": "yolo11n-pose.yaml",
    "classify": "yolo11n-cls.yaml",
}
MODULE = "kw.integrations.ultralytics"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder for runs; Ultralytics keeps its settings in it and stays off the network."""
    folder = tmp_path_factory.mktemp("ultralytics")
    settings = {"YOLO_OFFLINE": "1", "YOLO_AUTOINSTALL": "false", "YOLO_CONFIG_DIR": str(folder)}
    os.environ.update(settings)
    pytest.importorskip("ultralytics", reason="for Ultralytics' trainers")
    return folder


@pytest.fixture(scope="module")
def host(place):
    return importlib.import_module(MODULE)


@pytest.fixture(scope="module")
def data(place):
    """The data of a task with two classes, or more."""
    return lambda task, classes=2: make_data(place / f"{task}{classes}", task, classes)


@pytest.fixture(scope="module")
def options(place, data):
    def of(task, classes=2, /, **changes):
        common = {"data": data(task, classes), "imgsz": 64, "batch": 4, "epochs": 1}
        common |= {"device": "cpu", "amp": False, "plots": False, "workers": 0, "verbose": False}
        return common | {"project": str(place), "exist_ok": True} | changes

    return of


@pytest.fixture(scope="module")
def trainer_of(host, options):
    """A trainer that has not begun, as YOLO.train would make it."""

    def of(task="detect", recipe=None, classes=2, **changes):
        overrides = options(task, classes, task=task, model=YAMLS[task], name="parts", **changes)
        return (recipe or host.trainer())(overrides=overrides)

    return of


@pytest.fixture(scope="module")
def trained(host, options):
    """By task, after one epoch: the file, and the average as it was when the file was written."""
    from ultralytics import YOLO

    done = {}

    def of(task):
        if task not in done:
            kept = []
            yolo = YOLO(YAMLS[task])
            yolo.add_callback("on_model_save", lambda t: kept.append(copy.deepcopy(t.ema.ema)))
            yolo.train(trainer=host.trainer(cell_num_ratio=1), name=task, **options(task))
            done[task] = yolo.trainer.best, kept[0]
        return done[task]

    return of


def static_network(task):
    from ultralytics.nn import tasks

    makers = {
        "detect": tasks.DetectionModel,
        "segment": tasks.SegmentationModel,
        "pose": tasks.PoseModel,
        "classify": tasks.ClassificationModel,
    }
    torch.manual_seed(0)
    settings = {"data_kpt_shape": [3, 3]} if task == "pose" else {}
    return makers[task](YAMLS[task], nc=2, verbose=False, **settings)


def dynamic_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, KWConv2d)]


@torch.no_grad()
def outputs(model, images):
    """The raw predictions in evaluation mode."""
    found = model.eval()(images)
    while isinstance(found, tuple | list):
        found = found[0]
    return found


def make_dynamic(model):
    """Give every image a kernel of its own: attention begins without."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, KWConv2d):
            scale = 0.1 * module.warehouse.start_scale
            weight = module.attention.fc2.weight.detach()
            weight.copy_(scale * torch.randn(weight.shape, generator=generator))
    return model


# --- training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("task", YAMLS)
def test_every_task_trains_and_its_file_is_the_average(task, trained, options):
    from ultralytics import YOLO

    file, average = trained(task)
    yolo = YOLO(file)
    names = dynamic_names(yolo.model)
    head = f"model.{len(yolo.model.model) - 1}."
    assert len(names) > 35
    assert task == "classify" or not any(name.startswith(head) for name in names)
    assert kw.get_temperature(yolo.model) == 0
    images = torch.rand(2, 3, 64, 64)
    expected = outputs(average.float(), images)
    # The file has 11 bits of every weight.
    error = (outputs(yolo.model, images) - expected).abs().max()
    assert error < 0.01 * expected.abs().max()
    fused = copy.deepcopy(yolo.model).fuse(verbose=False)
    assert dynamic_names(fused) == names
    torch.testing.assert_close(outputs(fused, images), outputs(yolo.model, images))
    metrics = yolo.val(**options(task, name="val"))
    assert all(map(math.isfinite, metrics.results_dict.values()))


@pytest.mark.parametrize("task", YAMLS)
def test_the_network_begins_as_the_static_one(task, trainer_of):
    static = static_network(task)
    for module in static.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
            module.weight.detach().uniform_(0.5, 2)
    model = trainer_of(task).get_model(YAMLS[task], copy.deepcopy(static), verbose=False)
    images = torch.rand(2, 3, 64, 64)
    expected = outputs(static, images)
    assert dynamic_names(model)
    torch.testing.assert_close(outputs(model, images), expected, rtol=1e-4, atol=1e-3)


def test_annealing_resumes_and_the_average_has_the_temperature(host, options, place):
    from ultralytics import YOLO

    seen = []

    def watch(trainer):
        seen.extend(map(kw.get_temperature, (trainer.model, trainer.ema.ema)))

    class Stop(Exception):
        pass

    def stop(trainer):
        watch(trainer)
        if trainer.epoch == 1:
            raise Stop

    yolo = YOLO(YAMLS["detect"])
    for event in ("on_train_batch_end", "on_train_epoch_end"):
        yolo.add_callback(event, watch)
    yolo.add_callback("on_fit_epoch_end", stop)  # after the epoch's file was written
    with pytest.raises(Stop):
        yolo.train(
            trainer=host.trainer(anneal=3), name="anneal", **options("detect", epochs=4, nbs=4)
        )
    steps = (1, *[5 / 6] * 3, 4 / 6, *[1 / 2] * 3)
    assert seen == pytest.approx([tau for tau in steps for _ in "ab"])

    last = place / "anneal" / "weights" / "last.pt"
    saved = torch.load(last, weights_only=False)
    assert kw.get_temperature(saved["ema"]) == 0.5
    state, kinds = saved["ema"].float().state_dict(), []

    def compare(trainer):
        kinds.append(trainer.recipe)
        assert (trainer.start_epoch, trainer.ema.updates) == (2, 4)
        for network in (trainer.model, trainer.ema.ema):
            found = network.state_dict()
            assert found.keys() == state.keys()
            assert all(torch.equal(found[name], value) for name, value in state.items())

    seen.clear()
    yolo = YOLO(last)
    yolo.add_callback("on_train_start", compare)
    yolo.add_callback("on_train_batch_end", watch)
    yolo.train(trainer=host.trainer(), resume=True)
    assert kinds == [Recipe("auto", {}, 3)]
    assert seen == pytest.approx([tau for tau in (2 / 6, 1 / 6, 0, 0) for _ in "ab"])
    assert kw.get_temperature(yolo.model) == 0


def test_several_processes_get_the_recipe(host, options, place, monkeypatch):
    """Ultralytics' own launcher, with its own file; on CPUs by gloo, which it would not choose."""
    (place / "cpu_trainer.py").write_text(CPU_TRAINER)
    monkeypatch.syspath_prepend(place)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    overrides = options("detect", model=YAMLS["detect"], name="several")
    recipe = Recipe("auto", {"cell_num_ratio": 2}, 1)
    trainer = importlib.import_module("cpu_trainer").CpuTrainer(overrides=overrides, recipe=recipe)
    trainer.train()
    assert not [name for name in os.environ if name.startswith("KW_ULTRALYTICS")]
    first, second = (json.loads((place / f"seen{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["wrapper"] == "CpuParallel"
    assert first["settings"] == {"cell_num_ratio": 2}
    assert first["temperatures"] == [1, 1, 0.5, 0.5]
    saved = torch.load(place / "several" / "weights" / "last.pt", weights_only=False)["ema"]
    assert all(w.settings.cell_num_ratio == 2 for w in find_warehouses(saved))


CPU_TRAINER = """
import json
import os
from pathlib import Path

import kw
from kw.integrations.ultralytics import DetectionTrainer
from torch import distributed, nn

RANK = int(os.environ.get("RANK", -1))


class CpuParallel(nn.parallel.DistributedDataParallel):
    def __init__(self, module, device_ids=None, **settings):
        super().__init__(module, **settings)


nn.parallel.DistributedDataParallel = CpuParallel


class CpuTrainer(DetectionTrainer):
    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.world_size, self.ddp, self.temperatures = 2, RANK == -1, []

    def _setup_ddp(self):
        distributed.init_process_group("gloo", rank=RANK, world_size=2)

    def run_callbacks(self, event):
        super().run_callbacks(event)
        if event == "on_train_batch_end":
            both = self.model, self.ema.ema
            self.temperatures.extend(map(kw.get_temperature, both))

    def final_eval(self):  # asks for a GPU
        sums = [parameter.detach().double().sum().item() for parameter in self.model.parameters()]
        seen = {
            "wrapper": type(self.model).__name__,
            "settings": self.recipe.settings,
            "temperatures": self.temperatures,
            "sums": sums,
        }
        Path(__file__).with_name(f"seen{RANK}.json").write_text(json.dumps(seen))
"""


def test_muon_and_fast_biases_leave_attention_alone(trainer_of, capsys):
    trainer = trainer_of()
    model = trainer.get_model(YAMLS["detect"], verbose=False)
    names = {id(value): name for name, value in model.named_parameters()}
    for name, iterations in (("auto", 20_000), ("auto", 100), ("SGD", 100)):
        optimizer = trainer.build_optimizer(model, name=name, iterations=iterations, decay=1e-3)
        groups = {}
        for group in optimizer.param_groups:
            for value in group["params"]:
                groups.setdefault(names.pop(id(value)), group)
        assert not names  # every parameter is in one group
        names = {id(value): name for name, value in model.named_parameters()}
        muon = iterations > 10_000
        assert (type(optimizer).__name__ == "MuSGD") is muon
        assert ("without Muon" in capsys.readouterr().err) is muon
        for key, group in groups.items():
            own = ".warehouse." in key or ".attention." in key
            if own and key.endswith("bias"):
                assert group["param_group"] == "bn"
                assert group["weight_decay"] == 0
            elif own and ".norm1." not in key:
                assert not group.get("use_muon")
                assert group["weight_decay"] == 1e-3
        assert groups["model.0.conv.weight"]["param_group"] == ("muon" if muon else "weight")
        assert groups["model.0.bn.bias"]["param_group"] == "bias"


def test_a_teacher_keeps_its_temperature(host, trainer_of):
    trainer = trainer_of("classify", recipe=host.trainer(anneal=1))
    networks = [trainer.get_model(YAMLS["classify"], verbose=False) for _ in range(2)]
    kw.set_temperature(networks[1], 0)  # trained
    trainer.model = nn.Module()  # as Ultralytics wraps them for distillation
    trainer.model.student_model, trainer.model.teacher_model = networks
    trainer.epoch, trainer.train_loader = 0, range(4)
    for event in ("on_train_epoch_start", "on_train_batch_start", "on_train_batch_start"):
        trainer.run_callbacks(event)
    assert list(map(kw.get_temperature, networks)) == [0.75, 0]


def test_one_image_of_changing_size(host, options):
    from ultralytics import YOLO

    yolo = YOLO(YAMLS["detect"])
    losses = []
    yolo.add_callback("on_train_batch_end", lambda t: losses.append(t.loss.item()))
    changes = {"batch": 1, "imgsz": 96, "multi_scale": 0.3, "optimizer": "MuSGD", "fraction": 0.5}
    yolo.train(trainer=host.trainer(), name="sizes", **options("detect", **changes))
    assert len(losses) == 4
    assert all(map(math.isfinite, losses))


# --- going on from a converted network ----------------------------------------------------------


def test_other_classes_keep_the_dynamic_layers(trained, trainer_of):
    file, _ = trained("detect")
    weights = torch.load(file, weights_only=False)["model"].float()
    trainer = trainer_of(classes=3)
    model = trainer.get_model(weights.yaml, weights, verbose=False)
    assert (model.yaml["nc"], len(model.names)) == (3, 3)
    assert dynamic_names(model) == dynamic_names(weights)
    state, last = weights.state_dict(), len(model.model) - 1
    for name, value in model.state_dict().items():
        if not name.startswith(f"model.{last}."):
            assert torch.equal(value, state[name])
    for before, after in zip(weights.model[last].cv3, model.model[last].cv3, strict=True):
        assert (before[-1].out_channels, after[-1].out_channels) == (2, 3)
    assert model.warehouses.keys() == weights.warehouses.keys()


def test_what_cannot_go_on_is_refused(host, trained, trainer_of, options):
    from ultralytics import YOLO

    file, _ = trained("detect")
    yolo = YOLO(file)
    with pytest.raises(KeyError, match=r"kw\.integrations\.ultralytics\.trainer"):
        yolo.train(name="refused", **options("detect"))  # would load what fits the static network
    for changes in ({"freeze": 10}, {"freeze": [4]}):
        with pytest.raises(ValueError, match=r"'model\.\d.*frozen"):
            trainer_of(**changes).get_model(yolo.model.yaml, yolo.model, verbose=False)
    annealed = trainer_of(recipe=host.trainer(anneal=1))
    with pytest.raises(ValueError, match="anneal=0"):
        annealed.get_model(yolo.model.yaml, yolo.model, verbose=False)
    with pytest.raises(ValueError, match=r"has no .*another size"):
        trainer_of().get_model("yolo11s.yaml", yolo.model, verbose=False)
    fused = copy.deepcopy(yolo.model).fuse(verbose=False)
    with pytest.raises(ValueError, match="open its file again"):
        trainer_of().get_model(fused.yaml, fused, verbose=False)


def test_bad_settings(host, trainer_of):
    with pytest.raises(ValueError, match="obb"):
        host.trainer()(overrides={"task": "obb"})
    with pytest.raises(ValueError, match="the run has 1"):
        trainer_of(recipe=host.trainer(anneal=2))
    with pytest.raises(ValueError, match="quantize=8"):
        trainer_of(quantize=8)
    plan = {"rules": [{"match": r"model\.23\.cv2\..*conv", "warehouse": "head"}]}
    with pytest.raises(ValueError, match=r"'model\.23\.cv2.*head"):
        trainer_of(recipe=host.trainer(plan)).get_model(YAMLS["detect"], verbose=False)


def test_frozen_modules_stay_static(trainer_of):
    model = trainer_of(freeze=10).get_model(YAMLS["detect"], verbose=False)
    places = {int(name.split(".")[1]) for name in dynamic_names(model)}
    assert places == {10, 13, 16, 17, 19, 20, 22}  # the others have no layers


def test_a_static_pattern_comes_on_top(host, trainer_of):
    recipe = host.trainer(static=r"model\.(10|22)\..+")
    model = trainer_of(recipe=recipe, freeze=10).get_model(YAMLS["detect"], verbose=False)
    assert {int(name.split(".")[1]) for name in dynamic_names(model)} == {13, 16, 17, 19, 20}


@pytest.mark.parametrize("name", ["yolov8n", "yolov9t", "yolov10n", "yolo26n"])
def test_other_families_fuse(name, trainer_of):
    """YOLOv9 and v10 have modules whose kernels are added up, which have to stay static."""
    model = make_dynamic(trainer_of().get_model(f"{name}.yaml", verbose=False))
    assert len(dynamic_names(model)) > 40
    images = torch.rand(2, 3, 64, 64)
    expected = outputs(model, images)
    torch.testing.assert_close(
        outputs(model.fuse(verbose=False), images), expected, rtol=1e-3, atol=1e-3
    )


def test_the_gflops_count_dynamic_layers(trainer_of):
    from ultralytics.utils.torch_utils import get_flops

    static = static_network("classify")
    model = trainer_of("classify").get_model(YAMLS["classify"], verbose=False)
    before = set(model.state_dict())
    extra = 0
    for module in model.modules():
        if isinstance(module, KWConv2d):
            kernel = math.prod(module.partition.kernel_shape)
            linear = (module.attention.fc1, module.attention.fc2)
            extra += module.warehouse.partition.cells * kernel
            extra += sum(layer.weight.numel() for layer in linear)
    difference = (get_flops(model, 224) - get_flops(static, 224)) * 1e9 / 2
    assert difference == pytest.approx(extra, rel=0.01)
    assert set(model.state_dict()) == before


# --- files ------------------------------------------------------------------------------------


def test_a_file_opens_where_nothing_was_imported(trained, place):
    file, _ = trained("detect")
    images = torch.rand(2, 3, 64, 64)
    torch.save(images, place / "images.pt")
    found = in_a_process(
        "import sys, torch; from ultralytics import YOLO\n"
        f"yolo = YOLO({str(file)!r})\n"
        "assert 'kw.integrations.ultralytics' in sys.modules\n"
        f"y = yolo.model.eval()(torch.load({str(place / 'images.pt')!r}))[0]\n"
        f"torch.save(y, {str(place / 'y.pt')!r})\n"
    )
    assert found.returncode == 0, found.stderr
    from ultralytics import YOLO

    torch.testing.assert_close(torch.load(place / "y.pt"), outputs(YOLO(file).model, images))


def test_a_file_without_kernelwarehouse_says_what_is_missing(trained):
    file, _ = trained("detect")
    found = in_a_process(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'kw': raise ModuleNotFoundError('No module named kw', name='kw')\n"
        "sys.meta_path.insert(0, Absent())\n"
        f"from ultralytics import YOLO; YOLO({str(file)!r})\n"
    )
    assert found.returncode == 1
    assert "ModuleNotFoundError: No module named kw" in found.stderr


def in_a_process(code):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)


@pytest.fixture(scope="module")
def some_dynamic(trainer_of, place):
    """A file of a detector whose last layers are dynamic, and attend."""
    model = make_dynamic(trainer_of(freeze=16).get_model(YAMLS["detect"], verbose=False))
    torch.save({"model": model.half()}, place / "dynamic.pt")
    return place / "dynamic.pt"


@pytest.mark.parametrize("dynamic", [True, False], ids=["any", "fixed"])
def test_onnx_gives_what_torch_gives(dynamic, some_dynamic, options):
    runtime = pytest.importorskip("onnxruntime", reason="runs exported files")
    from ultralytics import YOLO

    yolo = YOLO(some_dynamic)
    model = copy.deepcopy(yolo.model)
    images = torch.rand(2, 3, 64, 64)
    each = torch.cat([outputs(model, image[None]) for image in images])
    torch.testing.assert_close(each, outputs(model, images), rtol=1e-4, atol=1e-3)
    exported = yolo.export(format="onnx", imgsz=64, dynamic=dynamic, simplify=False)
    session = runtime.InferenceSession(exported)
    for shape in ((1, 3, 64, 64), (3, 3, 96, 128))[: 1 + dynamic]:
        images = torch.rand(shape)
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        expected = outputs(model, images)
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-3)
    metrics = YOLO(exported, task="detect").val(**options("detect", name="onnx", batch=1))
    assert all(map(math.isfinite, metrics.results_dict.values()))


def test_an_exported_classifier_predicts_alike(trained, place, data):
    from ultralytics import YOLO

    yolo = YOLO(trained("classify")[0])
    make_dynamic(yolo.model)
    yolo.model.pt_path = str(place / "classifier.pt")
    exported = YOLO(yolo.export(format="torchscript", imgsz=64), task="classify")
    for image in sorted(Path(data("classify"), "val").rglob("*.png")):
        (expected,), (found,) = (
            network.predict(str(image), imgsz=64, device="cpu", verbose=False)
            for network in (yolo, exported)
        )
        torch.testing.assert_close(found.probs.data, expected.probs.data, rtol=1e-3, atol=1e-4)


# --- Ultralytics itself -------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["ultralytics", "ultralytics.nn.modules.block"])
def test_without_ultralytics_the_import_says_which_works(missing, monkeypatch):
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"needs Ultralytics 8\.4.*'ultralytics>=8\.4\.190"):
        importlib.import_module(MODULE)


@pytest.mark.parametrize("version", ["8.3.250", "8.4.100", "8.5.0"])
def test_another_version_is_refused(version, host, monkeypatch):
    import ultralytics

    monkeypatch.setattr(ultralytics, "__version__", version)
    monkeypatch.delitem(sys.modules, MODULE)
    with pytest.raises(ImportError, match=rf"8\.4\.190.*this is {version}"):
        importlib.import_module(MODULE)
