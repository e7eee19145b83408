"""nnU-Net's trainers, with the real package: ``make test-integrations``."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

pytest.importorskip("nnunetv2", reason="needs nnunetv2")
import SimpleITK
from dynamic_network_architectures.architectures import unet
from nnunetv2.experiment_planning import plan_and_preprocess_api as planning
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

import kw
from kw.integrations import nnunet
from kw.integrations.core import plans_of

TRAINERS = '''
import shutil, torch
import kw
from kw.integrations.core import Recipe
from kw.integrations.nnunet import KernelWarehouse, nnUNetTrainerKW
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

class Small(nnUNetTrainer):
    """Three epochs of two iterations; every epoch's checkpoint is kept."""
    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cpu")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch = 3, 2
        self.num_val_iterations_per_epoch = self.save_every = 1
        self.seen, self.losses = [], []

    def train_step(self, batch):
        result = super().train_step(batch)
        self.losses.append(float(result["loss"]))
        if kw.warehouse.has_temperature(self.network):
            self.seen.append(kw.get_temperature(self.network))
        return result

    def on_epoch_end(self):
        super().on_epoch_end()
        latest = f"{self.output_folder}/checkpoint_latest.pth"
        if self.current_epoch < self.num_epochs:
            shutil.copy(latest, f"{self.output_folder}/{self.current_epoch}.pth")

class Same(Small):
    """The same batch in every iteration: nnU-Net does not resume its loaders."""
    def on_train_start(self):
        super().on_train_start()
        torch.manual_seed(1)
        batch = next(self.dataloader_train)
        values = torch.rand(batch["data"].shape)
        target = [torch.zeros_like(t) for t in batch["target"]]
        for t in target:
            t[..., : t.shape[-1] // 2] = 1
        fixed = {"data": values, "target": target}
        self.dataloader_train = iter(lambda: fixed, None)

class Kept(KernelWarehouse, Small):
    recipe = Recipe()

class Annealed(KernelWarehouse, Same):
    match = "(?!encoder.stages.0.0.convs.0).*all_modules.0"
    recipe = Recipe({"rules": [{"match": match, "warehouse": "w"}], "norm": "layer"}, anneal=2)

class Softmax(KernelWarehouse, Same):
    recipe = Recipe(Annealed.recipe.plan, {"attention": "softmax"}, anneal=2)

class Short(KernelWarehouse, Same):
    recipe = Recipe(Annealed.recipe.plan, anneal=4)

class Static(Same):
    pass
'''


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """A data set of five volumes with a bright block, planned and preprocessed."""
    root = tmp_path_factory.mktemp("nnunet")
    raw = root / "raw" / "Dataset001_Blocks"
    folders = {f"nnUNet_{name}": str(root / name) for name in ("raw", "preprocessed", "results")}
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (raw / folder).mkdir(parents=True)
    random = numpy.random.default_rng(0)
    for i in range(6):
        label = numpy.zeros((20, 24, 28), numpy.uint8)
        z, y, x = random.integers(2, 10, 3)
        label[z : z + 8, y : y + 8, x : x + 10] = 1
        image = (label * 2 + random.normal(size=label.shape)).astype(numpy.float32)
        where = "imagesTr" if i < 5 else "imagesTs"
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(image), raw / where / f"c{i}_0000.nii.gz")
        if i < 5:
            SimpleITK.WriteImage(
                SimpleITK.GetImageFromArray(label), raw / "labelsTr" / f"c{i}.nii.gz"
            )
    description = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "block": 1},
        "numTraining": 5,
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(description))
    (root / "trainers").mkdir()
    (root / "trainers" / "small.py").write_text(TRAINERS)
    shipped = Path(kw.__file__).parent / "integrations" / "nnunet_trainers"
    with pytest.MonkeyPatch.context() as patch:
        more = {"nnUNet_extTrainer": os.pathsep.join(map(str, (shipped, root / "trainers")))}
        more |= {"nnUNet_def_n_proc": "1", "nnUNet_compile": "f"}
        for name, value in (folders | more).items():
            patch.setenv(name, value)
        fork = multiprocessing.get_context("fork")  # nnU-Net's processes import everything anew
        patch.setattr(multiprocessing, "get_context", lambda _: fork)
        patch.setenv("nnUNet_n_proc_DA", "1")
        planning.extract_fingerprints([1], num_processes=1)
        name = planning.plan_experiments([1])
        planning.preprocess([1], name, ("2d", "3d_fullres"), num_processes=(1, 1))
        patch.setenv("nnUNet_n_proc_DA", "0")
        file = root / "preprocessed" / "Dataset001_Blocks" / "nnUNetPlans.json"
        plans = json.loads(file.read_text())
        for name in ("2d", "3d_fullres"):
            settings = plans["configurations"][name]
            settings["batch_size"] = 2
            kwargs = settings["architecture"]["arch_kwargs"]
            stages = kwargs["n_stages"]
            kwargs["features_per_stage"] = [8, 16, 32, 32, 32, 32][:stages]
        file.write_text(json.dumps(plans))
        yield root


def trainer(name, configuration="3d_fullres"):
    torch.manual_seed(0)
    return get_trainer_from_args("1", configuration, 0, name, device=torch.device("cpu"))


def images(configuration):
    return torch.rand(2, 1, *{"2d": (24, 28), "3d_fullres": (20, 24, 28)}[configuration])


PREDICT = """
import multiprocessing, sys, torch
fork = multiprocessing.get_context("fork")
multiprocessing.get_context = lambda _: fork
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
folder, images, out = sys.argv[1:]
predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
predictor.initialize_from_trained_model_folder(folder, (0,), "checkpoint_final.pth")
x, outputs = torch.load(f"{out}/outputs.pt")
assert torch.equal(predictor.network.eval()(x), outputs)
predictor.predict_from_files(images, out, num_processes_preprocessing=1,
                             num_processes_segmentation_export=1)
"""


@pytest.mark.filterwarnings("ignore::UserWarning")  # transposed convolutions stay static
def test_two_dimensions_from_training_to_prediction_in_a_new_process(host, tmp_path):
    static, kept = trainer("Static", "2d"), trainer("Kept", "2d")
    x = images("2d")
    with torch.no_grad():
        for one in (static, kept):
            torch.manual_seed(0)
            one.initialize()
        for one, other in zip(static.network(x), kept.network(x), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    optimized = {id(p) for group in kept.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in kept.network.parameters()}
    assert plans_of(kept.network)
    kept.run_training()
    assert kept.seen == [0] * 6
    kept.set_deep_supervision_enabled(False)
    with torch.no_grad():
        torch.save((x, kept.network.eval()(x)), tmp_path / "outputs.pt")
    raw = host / "raw" / "Dataset001_Blocks" / "imagesTs"
    command = [sys.executable, "-c", PREDICT, kept.output_folder_base, raw, tmp_path]
    subprocess.run(command, check=True)
    found = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(tmp_path / "c5.nii.gz"))
    assert found.shape == (20, 24, 28)


def test_temperature_and_a_resumed_run_in_three_dimensions(host, tmp_path):
    whole = trainer("Annealed")
    whole.run_training()
    assert whole.seen == [1, 0.75, 0.5, 0.25, 0, 0]
    assert whole.losses[-1] < whole.losses[0]
    assert any(isinstance(m, kw.warehouse.KWConv3d) for m in whole.network.modules())
    torch.manual_seed(9)
    resumed = trainer("Annealed")
    resumed.load_checkpoint(str(Path(whole.output_folder) / "1.pth"))
    resumed.run_training()
    assert resumed.seen == whole.seen[2:]
    assert resumed.losses == whole.losses[2:]
    state = resumed.network.state_dict()
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, state[name])
    with pytest.raises(ValueError, match="by another plan or with other settings"):
        trainer("Softmax").load_checkpoint(str(Path(whole.output_folder) / "1.pth"))
    with pytest.raises(ValueError, match="anneal is 4 epochs; the run has 3"):
        trainer("Short").run_training()
    spoiled = trainer("Annealed")
    spoiled.initialize()
    load_pretrained_weights(
        spoiled.network, str(Path(whole.output_folder) / "checkpoint_final.pth")
    )
    with pytest.raises(ValueError, match="at temperature 0, but annealing starts at 1"):
        spoiled.run_training()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_weights_of_earlier_runs(host, tmp_path, monkeypatch):
    """Static ones start a kept run; converted ones go through nnU-Net's -pretrained_weights."""
    static = trainer("Static")
    static.initialize()
    file = str(tmp_path / "static.pth")
    static.save_checkpoint(file)
    monkeypatch.setenv("KW_STATIC_WEIGHTS", file)
    kept = trainer("Kept")
    torch.manual_seed(4)
    kept.initialize()
    x = images("3d_fullres")
    with torch.no_grad():
        for one, other in zip(static.network.encoder(x), kept.network.encoder(x), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="annealed start replaces the weights"):
        trainer("Annealed").initialize()
    with pytest.raises(AssertionError, match="shape of the parameters of key encoder"):
        trainer("Kept", "2d").initialize()
    monkeypatch.delenv("KW_STATIC_WEIGHTS")
    kept.save_checkpoint(file)
    torch.manual_seed(5)
    other = trainer("Kept")
    other.initialize()
    load_pretrained_weights(other.network, file)
    with torch.no_grad():
        for one, again in zip(kept.network.encoder(x), other.network.encoder(x), strict=True):
            assert torch.equal(one, again)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_networks_keep_function_structure_and_heads(kind, dims):
    """nnU-Net registers convolutions and the encoder twice; heads may be 12 channels wide."""
    blocks = "n_conv_per_stage" if kind == "PlainConvUNet" else "n_blocks_per_stage"
    settings = {
        "input_channels": 1,
        "n_stages": 3,
        "features_per_stage": [16, 32, 32],
        "conv_op": getattr(torch.nn, f"Conv{dims}d"),
        "kernel_sizes": 3,
        "strides": [1, 2, 2],
        blocks: 2,
        "num_classes": 12,
        "n_conv_per_stage_decoder": 2,
        "norm_op": getattr(torch.nn, f"InstanceNorm{dims}d"),
        "norm_op_kwargs": {"affine": True},
        "nonlin": torch.nn.LeakyReLU,
        "deep_supervision": True,
    }

    class Static:
        @classmethod
        def build_network_architecture(cls, *_):
            torch.manual_seed(0)
            return getattr(unet, kind)(**settings).eval()

    class Trainer(nnunet.KernelWarehouse, Static):
        pass

    class Plans:
        plans, patch_size = {}, [16] * dims

    static = Static.build_network_architecture()
    x = torch.rand(2, 1, *Plans.patch_size)
    converted = Trainer.build_network_architecture(Plans, Plans, 1, 12)
    for one, other in zip(static(x), converted(x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    names = [name for name, _ in static.named_modules(remove_duplicate=False)]
    now = [name for name, _ in converted.named_modules(remove_duplicate=False)]
    assert names == [name for name in now if name in set(names)]
    assert all(
        type(head) is type(static.decoder.seg_layers[0]) for head in converted.decoder.seg_layers
    )
    again = Trainer.build_network_architecture(Plans, Plans, 1, 12)  # as the stored plans say
    again.load_state_dict(converted.state_dict())
    assert all(map(torch.equal, again(x), converted(x)))


def test_shipped_trainers_are_found_by_name(host):
    for name in ("nnUNetTrainerKW", "nnUNetTrainerKWAnnealed"):
        assert recursive_find_trainer_class_by_name(name) is getattr(nnunet, name)
