"""Agreement with the authors' public implementation, on tensors that it computed.

``make_golden_fixture.py`` says what the files hold and how they were cut down.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from make_golden_fixture import FIXTURE, TAUS, digest, unpack
from torch import Tensor, nn

from kw import convert, set_temperature
from kw.warehouse import set_backend
from kw.warehouse.warehouse import with_names_now

CASES = (
    "conv1d",
    "conv3d",
    "depthwise_pointwise_ln",
    "linear_tokens",
    "nonlocal_basis",
    "stage_1x",
    "stage_4x",
    "stage_half",
    "stage_quarter",
)
BACKENDS = ("reference", "grouped", "auto")
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4


@dataclass
class Golden:
    """One file: how to build the layers, their weights by our names, and what must come out."""

    about: dict[str, Any]
    arrays: dict[str, np.ndarray]
    warehouse_of: list[str]
    state: dict[str, Tensor]
    input: Tensor

    def our_name(self, theirs: str) -> str:
        """In this project's first versions, which later ones still load."""
        if theirs.startswith("warehouse_manager.weights."):
            name = self.about["warehouses"][int(theirs.rsplit(".", 1)[1])]
            return f"warehouses.{name}.cells"
        return theirs.removeprefix("layers.").replace(".conv.", ".")

    def build(self, backend: str) -> nn.Sequential:
        """Static layers, converted; the weights are those of the file."""
        manager, layers = self.about["manager"], []
        for layer in self.about["layers"]:
            i, o, bias = layer["i"], layer["o"], layer.get("bias", False)
            if layer["type"] == "linear":
                layers.append(nn.Linear(i, o, bias))
                continue
            conv = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}[layer["type"]]
            size = (layer["k"], layer["s"], layer["p"], layer.get("d", 1), layer.get("g", 1))
            layers.append(conv(i, o, *size, bias=bias))
        model = nn.Sequential(*layers)
        rules = [
            {
                "match": "|".join(str(i) for i, own in enumerate(self.warehouse_of) if own == name),
                "warehouse": name,
            }
            for name in self.about["warehouses"]
        ]
        settings = {k: v for k, v in manager.items() if k not in ("sharing_range", "norm_layer")}
        norm = {"LayerNorm": "layer"}.get(manager.get("norm_layer"), "batch")
        convert(model, {"rules": rules, "norm": norm, "start": "paper", **settings})
        self.load(model)
        set_backend(model, backend)
        return model

    def load(self, model: nn.Module) -> None:
        temperatures = {f"warehouses.{n}.temperature": torch.zeros(()) for n in model.warehouses}
        model.load_state_dict({**self.state, **temperatures}, strict=True)


@cache
def read(case: str) -> Golden:
    with np.load(FIXTURE / f"{case}.npz", allow_pickle=False) as file:
        arrays = dict(file)
    about = json.loads(str(arrays.pop("about")))
    floats = unpack(arrays.pop("planes"), about["layout"])
    golden = Golden(about, arrays, [], {}, floats.pop("input"))
    counters = {k: torch.tensor(v) for k, v in about["counters"].items()}
    for theirs, value in {**floats, **counters}.items():
        is_cells = theirs.startswith("warehouse_manager")
        golden.state[golden.our_name(theirs)] = value.flatten(1) if is_cells else value
    # A layer's warehouse drops the layer's number, and the kind's where its kind is shared.
    for layer in about["layers"]:
        stage, _, kind = layer["name"].split("_")
        shared = kind.rstrip("0123456789")
        kind = shared if shared in about["manager"]["sharing_range"] else kind
        golden.warehouse_of.append(f"{stage}_layer_{kind}")
    return golden


def assert_agrees(actual: Tensor, expected: np.ndarray, tolerance: float, what: str) -> None:
    """Every kept element, and the projection of all, to ``tolerance`` of the largest value."""
    ours = digest(actual)
    assert ours.shape == expected.shape, what
    error = np.abs(ours - expected).max() / expected[0]
    assert error <= tolerance, f"{what}: {error:.2e} of the largest value"


def test_fixture_is_complete():
    assert sorted(path.stem for path in FIXTURE.glob("*.npz")) == sorted(CASES)


def test_digest_sees_what_the_sample_misses():
    """The comparison itself can fail: one element off, or two exchanged, outside the sample."""
    torch.manual_seed(0)
    tensor = torch.randn(40, 100)
    for rows in ([1, 2], [2, 1]):
        other = tensor.clone()
        other[rows] = tensor[[2, 1]] + (0.05 if rows == [2, 1] else 0)
        other[:, ::13] = tensor[:, ::13]
        with pytest.raises(AssertionError):
            assert_agrees(other, digest(tensor), GRADIENT_TOLERANCE, "changed")
    assert_agrees(tensor + 1e-6, digest(tensor), GRADIENT_TOLERANCE, "same")


@pytest.mark.parametrize("case", CASES)
def test_warehouses_have_the_authors_names_and_order(case):
    golden = read(case)
    assert list(dict.fromkeys(golden.warehouse_of)) == golden.about["warehouses"]
    assert list(golden.build("auto").warehouses) == golden.about["warehouses"]


@pytest.mark.parametrize("case", CASES)
def test_one_hot(case):
    """beta: cell for cell; a mixture that starts on the null cell has zeros in ours."""
    golden = read(case)
    model = golden.build("auto")
    for key in (k for k in golden.arrays if k.startswith("one_hot/")):
        attention = model.get_submodule(golden.our_name(key.removeprefix("one_hot/") + ".")[:-1])
        size = attention.mixtures * (attention.cells + 1)
        expected = np.unpackbits(golden.arrays[key], count=size).reshape(attention.mixtures, -1)
        np.testing.assert_array_equal(attention.one_hot.numpy(), expected[:, :-1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_eval_outputs(case, backend):
    golden = read(case)
    model = golden.build(backend).eval()
    with torch.no_grad():
        for tau in TAUS:
            set_temperature(model, tau)
            x = golden.input
            for i in range(len(golden.about["layers"])):
                x = model[i](x)
                expected = golden.arrays[f"eval/{tau}/{i}"]
                assert_agrees(x, expected, OUTPUT_TOLERANCE, f"tau {tau}, layer {i}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_training_output_and_gradients(case, backend):
    golden = read(case)
    model = golden.build(backend).train()
    set_temperature(model, 0.3)
    x = golden.input.clone().requires_grad_()
    y = model(x)
    assert_agrees(y, golden.arrays["train"], OUTPUT_TOLERANCE, "output")
    (y**2).mean().backward()
    assert_agrees(x.grad, golden.arrays["grad_input"], GRADIENT_TOLERANCE, "input")
    expected = {k.removeprefix("grad/"): v for k, v in golden.arrays.items() if "grad/" in k}
    gradients = with_names_now(model, {golden.our_name(k): g for k, g in expected.items()})
    assert gradients.keys() == {k for k, _ in model.named_parameters()}
    for name, gradient in gradients.items():
        parameter = model.get_parameter(name)
        assert_agrees(parameter.grad.view_as(parameter), gradient, GRADIENT_TOLERANCE, name)
