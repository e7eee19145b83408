"""Layers, attention and temperature under everything that PyTorch does to modules."""

from __future__ import annotations

import copy
import io
import math
import pickle
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

from kw import convert, get_temperature, set_temperature
from kw.warehouse import (
    KernelShape,
    KWConv1d,
    KWConv2d,
    KWConv3d,
    KWLayer,
    KWLinear,
    Warehouse,
    annealed_temperature,
    find_warehouses,
)

LAYERS = {
    "conv1d": (lambda **kw: KWConv1d(6, 8, 3, padding=1, **kw), (4, 6, 9)),
    "conv2d": (lambda **kw: KWConv2d(6, 8, 3, padding=1, groups=2, **kw), (4, 6, 7, 5)),
    "conv3d": (lambda **kw: KWConv3d(6, 8, 3, padding=1, **kw), (4, 6, 3, 5, 4)),
    "linear": (lambda **kw: KWLinear(6, 8, **kw), (4, 5, 6)),
}
every_layer = pytest.mark.parametrize(("build", "shape"), LAYERS.values(), ids=LAYERS)
norms = pytest.mark.parametrize("norm", ["batch", "layer"])


def small(seed=0, **settings):
    """Three layers on two warehouses, with biases that are not zero."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Conv2d(8, 16, 1, stride=2),
    )
    rules = [{"match": "0|2", "warehouse": "spatial"}, {"match": "3", "warehouse": "pointwise"}]
    convert(model, {"rules": rules, **settings})
    set_temperature(model, 0.3)
    return model


def images(batch=3, seed=1, **factory):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, 8, 6, generator=generator).to(**factory)


def disturb(model):
    """Normalisation away from its initial state, so that forgetting it shows."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.LayerNorm):
            for name, value in module.state_dict().items():
                if value.is_floating_point():
                    noise = torch.rand(value.shape, generator=generator)
                    value.copy_(noise + 0.5 if name != "bias" else noise)
    return model


def assert_trains(model, x):
    """A backward pass reaches every parameter and leaves finite gradients."""
    model.zero_grad()
    y = model(x)
    y.float().square().mean().backward()
    assert y.isfinite().all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    return y


# --- attention ----------------------------------------------------------------------------------


def direct(z, function):
    """The four functions written out, the null cell still among the results."""
    total = z.abs().sum(-1, keepdim=True) + 1e-3
    return {
        "contrasting": lambda: z / total,
        "softmax": lambda: z.exp() / z.exp().sum(-1, keepdim=True),
        "sigmoid": lambda: 1 / (1 + (-z).exp()),
        "rectified": lambda: z.clamp(min=0) / total,
    }[function]()


@norms
@pytest.mark.parametrize("function", ["contrasting", "softmax", "sigmoid", "rectified"])
@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0])
@torch.no_grad()
def test_attention_formula(function, norm, tau):
    torch.manual_seed(0)
    layer = KWConv2d(
        40, 12, 3, attention=function, norm=norm, reduction=0.5, cell_num_ratio=2
    ).double()
    attention = disturb(layer).eval().attention
    pooled = torch.randn(5, 40, dtype=torch.float64)
    assert attention.fc1.weight.shape == (20, 40)
    assert (attention.fc1.bias is None) == (norm == "batch")
    hidden = pooled @ attention.fc1.weight.T
    if norm == "batch":
        mean, var = attention.norm1.running_mean, attention.norm1.running_var
        hidden = (hidden - mean) / (var + 1e-5).sqrt()
    else:
        hidden = hidden + attention.fc1.bias
        centred = hidden - hidden.mean(1, keepdim=True)
        hidden = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    hidden = (hidden * attention.norm1.weight + attention.norm1.bias).clamp(min=0)
    z = (hidden @ attention.fc2.weight.T + attention.fc2.bias).view(5, 9, 19)
    beta = torch.zeros(9, 18, dtype=torch.float64)
    for mixture in range(9):
        beta[mixture, 2 * mixture] = 1
    expected = (1 - tau) * direct(z, function)[..., :-1] + tau * beta
    torch.testing.assert_close(attention(pooled, torch.tensor(tau)), expected)


@torch.no_grad()
def test_contrasting_attention_has_negative_coefficients():
    layer = KWConv2d(8, 8, 3).eval()
    alpha = layer.attention(torch.randn(4, 8), torch.tensor(0.0))
    assert (alpha < 0).any()
    assert (alpha > 0).any()
    assert (alpha.abs().sum(-1) < 1).all()


@pytest.mark.parametrize(("channels", "reduction", "hidden"), [(64, 1 / 16, 16), (512, 1 / 16, 32)])
def test_hidden_units(channels, reduction, hidden):
    assert KWConv2d(channels, 8, 1, reduction=reduction).attention.fc1.out_features == hidden


@pytest.mark.parametrize("slot", [0, 1, 2])
@torch.no_grad()
def test_nonlocal_basis_formula(slot):
    """Own cells directly, the others through the low-rank map, put back in cell order."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(8, 8, 3), nn.Conv2d(8, 16, 1), nn.Conv2d(8, 8, (3, 1))]
    plan = {"rules": [{"match": r"\d", "warehouse": "w"}], "nonlocal_basis_ratio": 0.5}
    model = convert(
        nn.Sequential(*convs), {**plan, "cell_num_ratio": 4, "cell_inplane_ratio": 0.5}
    ).double()
    start, own, mixtures = [(0, 72, 18), (72, 16, 4), (88, 24, 6)][slot]
    total = 112
    attention = disturb(model[slot]).eval().attention
    attention.basis_bias.normal_()
    foreign = total - own
    rank = foreign // 2
    assert attention.fc3.weight.shape == (foreign, rank)
    assert attention.fc2.bias is None
    pooled = torch.randn(3, 8, dtype=torch.float64)
    hidden = attention.norm1(attention.fc1(pooled)).relu()
    raw = (hidden @ attention.fc2.weight.T).view(3, mixtures, own + rank + 1)
    z = torch.empty(3, mixtures, total + 1, dtype=torch.float64)
    others = [cell for cell in range(total) if not start <= cell < start + own]
    for mixture in range(mixtures):
        z[:, mixture, start : start + own] = raw[:, mixture, :own]
        z[:, mixture, others] = raw[:, mixture, own:-1] @ attention.fc3.weight.T
        z[:, mixture, -1] = raw[:, mixture, -1]
    z += attention.basis_bias.view(mixtures, total + 1)
    expected = 0.7 * direct(z, "contrasting")[..., :-1] + 0.3 * attention.one_hot
    torch.testing.assert_close(attention(pooled, torch.tensor(0.3)), expected)


def test_nonlocal_basis_without_foreign_cells():
    """A layer alone in its warehouse has direct logits only, and no empty map."""
    layer = KWConv2d(8, 8, 3, nonlocal_basis_ratio=0.5)
    assert layer.attention.fc3 is None
    assert layer.attention.fc2.weight.shape == (9 * 10, 16)
    assert_trains(layer, torch.randn(2, 8, 5, 5))


def test_nonlocal_rank_is_at_least_16():
    layer = convert(
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)),
        {"rules": [{"match": r"\d", "warehouse": "w"}], "nonlocal_basis_ratio": 1 / 16},
    )[0]
    assert layer.attention.fc3.in_features == 16


@torch.no_grad()
def test_initialisation():
    """Kaiming normal, fan out, ReLU: linear weights, and cells by the slice of each layer."""
    torch.manual_seed(0)
    shapes = [KernelShape(64, 64, (3, 3), name="a"), KernelShape(256, 128, (3, 3), name="b")]
    warehouse = Warehouse(shapes)
    for own, cells in zip(warehouse.partition.slices, (9, 72), strict=True):
        part = warehouse.cells[own.start : own.stop]
        assert len(part) == cells
        assert part.std().item() == pytest.approx(math.sqrt(2 / (cells * 64)), rel=0.02)
    whole = Warehouse([KernelShape(64, 32, (3, 3))], name="whole")
    assert whole.cells.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.03)
    attention = warehouse.build_attention(1)
    for linear in (attention.fc1, attention.fc2):
        deviation = math.sqrt(2 / linear.out_features)
        assert linear.weight.std().item() == pytest.approx(deviation, rel=0.05)
    assert not attention.fc2.bias.any()
    assert warehouse.temperature == 0


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"attention": "relu"}, ["'relu' is unknown", "contrasting, softmax, sigmoid, rectified"]),
        ({"norm": "instance"}, ["'instance' is unknown", "'batch' or 'layer'"]),
        ({"nonlocal_basis_ratio": 1.5}, ["nonlocal_basis_ratio is 1.5", "(0, 1]"]),
        ({"nonlocal_basis_ratio": 0}, ["nonlocal_basis_ratio is 0", "(0, 1]"]),
        ({"reduction": 0}, ["reduction is 0", "above 0"]),
        ({"reduction": -0.1}, ["reduction is -0.1", "above 0"]),
    ],
)
def test_impossible_attention_settings_are_refused(settings, facts):
    with pytest.raises(ValueError, match="'stem'") as error:
        KWConv2d(8, 8, 3, name="stem", **settings)
    assert all(fact in str(error.value) for fact in (*facts, "'warehouse'"))


# --- precision ----------------------------------------------------------------------------------


def watch_dtypes(model):
    """Every dtype that enters or leaves a module of an attention branch."""
    seen = set()
    for name, module in model.named_modules():
        if "attention" in name:
            module.register_forward_hook(
                lambda _, inputs, output: seen.update(t.dtype for t in (*inputs, output))
            )
    return seen


@norms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_is_float32_under_autocast(norm, dtype):
    """Although the second layer's input and all convolutions have 16 bits."""
    model = small(norm=norm)
    exact = copy.deepcopy(model).double()
    seen, outputs = watch_dtypes(model), []
    for layer in (model[0], model[2]):
        layer.register_forward_hook(lambda _, __, output: outputs.append(output.dtype))
    coefficients = []
    model[0].attention.register_forward_hook(lambda _, __, output: coefficients.append(output))
    with torch.autocast("cpu", dtype):
        y = assert_trains(model, images())
    assert outputs == [dtype, dtype]
    assert seen == {torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    pooled = images().double().mean((2, 3))
    alpha = exact[0].attention(pooled, exact[0].warehouse.temperature)
    torch.testing.assert_close(coefficients[0].double(), alpha, rtol=1e-4, atol=1e-6)
    expected = exact(images().double())
    assert (y - expected).abs().max() < 0.03 * expected.abs().max()


def test_coefficients_of_a_16_bit_input_are_pooled_in_float32():
    """A mean of 16-bit values in 16 bits would be off by a hundred times this tolerance."""
    layer = KWConv2d(4, 8, 1).eval()
    x = (images() + 30).bfloat16()
    pooled = []
    layer.attention.register_forward_hook(lambda _, inputs, __: pooled.append(inputs[0]))
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    torch.testing.assert_close(pooled[0], x.double().mean((2, 3)).float(), rtol=1e-6, atol=1e-6)


@every_layer
@norms
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_model(build, shape, norm, dtype):
    torch.manual_seed(0)
    layer = build(norm=norm)
    set_temperature(layer, 0.25)
    x = torch.randn(shape)
    expected = copy.deepcopy(layer)(x)
    layer = layer.half() if dtype == torch.float16 else layer.bfloat16()
    coefficients = []
    layer.attention.register_forward_hook(lambda _, __, output: coefficients.append(output.dtype))
    y = assert_trains(layer, x.to(dtype))
    assert y.dtype == dtype
    assert coefficients == [torch.float32]
    assert (y - expected).abs().max() < 0.05 * expected.abs().max()
    assert get_temperature(layer) == 0.25


@every_layer
def test_double_precision_stays_double(build, shape):
    layer = build(dtype=torch.float64)
    coefficients = []
    layer.attention.register_forward_hook(lambda _, __, output: coefficients.append(output.dtype))
    assert layer(torch.randn(shape, dtype=torch.float64)).dtype == torch.float64
    assert coefficients == [torch.float64]


# --- copies, files, formats ---------------------------------------------------------------------


def test_channels_last():
    expected = small()(images())
    model = small().to(memory_format=torch.channels_last)
    y = assert_trains(model, images().to(memory_format=torch.channels_last))
    torch.testing.assert_close(y, expected)


@every_layer
def test_channels_last_never_raises(build, shape):
    """5-D parameters would: that is why cells have two dimensions."""
    model = build().to(memory_format=torch.channels_last)
    assert_trains(model, torch.randn(shape))


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
@torch.no_grad()
def test_a_copy_stands_alone(duplicate):
    """Its layers use its own warehouses, and nothing that is done to it reaches the original."""
    model = small().eval()
    expected = model(images())
    twin = duplicate(model)
    assert torch.equal(twin(images()), expected)
    names = {0: "spatial", 2: "spatial", 3: "pointwise"}
    for i, name in names.items():
        assert twin[i].warehouse is twin.warehouses[name]
        assert twin[i].warehouse is not model[i].warehouse
        assert twin[i].attention.one_hot is not model[i].attention.one_hot
    set_temperature(twin, 1.0)
    assert get_temperature(model) == pytest.approx(0.3)
    for parameter in twin.parameters():
        parameter.zero_()
    assert torch.equal(model(images()), expected)
    assert not twin(images()).any()


@torch.no_grad()
def test_state_dict_round_trip():
    model = disturb(small()).eval()
    other = small(seed=7).eval()
    set_temperature(other, 1.0)
    expected = model(images())
    assert not torch.allclose(other(images()), expected, atol=1e-3)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(other(images()), expected)
    assert get_temperature(other) == pytest.approx(0.3)


def test_state_dict_keys():
    """Cells and temperature once a warehouse; beta, which the partition gives, not at all."""
    state = small().state_dict()
    own = [key for key in state if "attention" not in key]
    assert own == ["0.bias", "2.bias", "3.bias"] + [
        f"warehouses.{name}.{tensor}"
        for name in ("spatial", "pointwise")
        for tensor in ("cells", "temperature")
    ]
    assert not [key for key in state if "one_hot" in key]


@norms
@pytest.mark.parametrize("way", ["to_empty", "assign", "reset"])
@torch.no_grad()
def test_built_on_the_meta_device(norm, way):
    source = disturb(small(norm=norm, cell_num_ratio=2)).eval()
    with torch.device("meta"):
        model = small(norm=norm, cell_num_ratio=2).eval()
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
    if way == "assign":
        model.load_state_dict(source.state_dict(), assign=True)
    else:
        model.to_empty(device="cpu")
        for buffer in model.buffers():
            buffer.fill_(7)  # what memory may hold
    if way == "to_empty":
        model.load_state_dict(source.state_dict())
    if way == "reset":
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        assert get_temperature(model) == 0
        model.load_state_dict(source.state_dict(), strict=True)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cpu"}
    assert torch.equal(model(images()), source(images()))


@torch.no_grad()
def test_reset_alone_makes_a_meta_model_whole():
    """For loops that materialise shards and call ``reset_parameters``: beta is right, bias zero."""
    with torch.device("meta"):
        layer = KWConv2d(4, 8, 3)
    layer.to_empty(device="cpu")
    for tensor in (*layer.buffers(), *layer.parameters()):
        tensor.fill_(7)
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert torch.equal(layer.attention.one_hot, torch.eye(9))
    assert not layer.bias.any()
    assert layer(torch.ones(2, 4, 5, 5)).abs().max() < 7


def test_meta_forward_gives_shapes():
    with torch.device("meta"):
        model = small()
    for context in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            assert model(images(device="meta")).shape == (3, 16, 4, 3)


def test_functional_call_replaces_cells():
    model = small().eval()
    cells = {k: torch.zeros_like(v) for k, v in model.named_parameters() if k.endswith("cells")}
    assert len(cells) == 2
    y = torch.func.functional_call(model, cells, (images(),))
    torch.testing.assert_close(y, model[3].bias.view(-1, 1, 1).expand_as(y))


# --- training and evaluation --------------------------------------------------------------------


@every_layer
@norms
def test_training_at_batch_1(build, shape, norm):
    torch.manual_seed(0)
    layer = disturb(build(norm=norm))
    set_temperature(layer, 0.3)
    before = {k: v.clone() for k, v in layer.named_buffers()}
    x = torch.randn(1, *shape[1:])
    y = assert_trains(layer.train(), x)
    # One sample has no batch statistics: the running ones serve, and are not moved by it.
    torch.testing.assert_close(y, layer.eval()(x))
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert (layer.attention.fc1.weight.grad != 0).any()


def test_batch_statistics_from_two_samples_on():
    layer = KWConv2d(4, 8, 3).train()
    layer(images(2))
    norm = layer.attention.norm1
    assert norm.num_batches_tracked == 1
    assert (norm.running_mean != 0).any()
    layer.eval()
    mean = norm.running_mean.clone()
    layer(images(2))
    assert torch.equal(norm.running_mean, mean)


@norms
@torch.no_grad()
def test_eval_is_per_sample_and_train_is_not(norm):
    model = disturb(small(norm=norm)).eval()
    together = model(images(3))
    one_by_one = torch.cat([model(x[None]) for x in images(3)])
    torch.testing.assert_close(together, one_by_one, rtol=1e-4, atol=1e-6)
    differ = not torch.allclose(model.train()(images(3)), together, atol=1e-4)
    assert differ == (norm == "batch")


def test_gradients_at_temperature_1():
    """A static network: attention rests, each layer's own cells learn, no others."""
    torch.manual_seed(0)
    model = small(cell_num_ratio=2)
    set_temperature(model, 1.0)
    assert_trains(model, images())
    for layer in (model[0], model[2], model[3]):
        assert all(not p.grad.any() for p in layer.attention.parameters())
    owned = model.warehouses["spatial"].cells.grad.any(1)
    assert owned.tolist() == [True, False] * (len(owned) // 2)


def test_cells_stand_once_among_the_parameters():
    model = small()
    cells = [p for p in model.parameters() if p is model[0].warehouse.cells]
    assert len(cells) == 1
    assert len(list(model.parameters())) == len({id(p) for p in model.parameters()})
    assert "warehouse" not in dict(model[0].named_children())


# --- temperature --------------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def ema_with_copied_buffers(model):
    return ModelEmaV3(model, exclude_buffers=True)


WRAPPERS = [
    copy.deepcopy,
    ModelEmaV3,
    ema_with_copied_buffers,
    AveragedModel,
    DistributedDataParallel,
    lambda model: torch.compile(model, backend="eager"),
    lambda model: AveragedModel(DistributedDataParallel(torch.compile(model, backend="eager"))),
]
WRAPPER_NAMES = ["deepcopy", "ema", "ema buffers", "averaged", "ddp", "compile", "all"]


@pytest.mark.parametrize("wrap", WRAPPERS, ids=WRAPPER_NAMES)
@pytest.mark.usefixtures("one_process")
@torch.no_grad()
def test_temperature_through_wrappers(wrap):
    """The wrapper starts at its model's temperature; setting it changes what it computes."""
    model = small().eval()
    expected = {}
    for tau in (0.8, 0.3):
        set_temperature(model, tau)
        expected[tau] = model(images())
    wrapped = wrap(model).eval()
    assert get_temperature(wrapped) == pytest.approx(0.3)
    torch.testing.assert_close(wrapped(images()), expected[0.3])
    set_temperature(wrapped, 0.8)
    torch.testing.assert_close(wrapped(images()), expected[0.8])


@pytest.mark.parametrize("average", [ema_with_copied_buffers, AveragedModel])
def test_averages_receive_the_temperature(average):
    """An average whose buffers are copied follows the model, with no call of its own."""
    model = small()
    averaged = average(model)
    set_temperature(model, 0.6)
    update = getattr(averaged, "update", None) or averaged.update_parameters
    update(model)
    assert get_temperature(averaged) == pytest.approx(0.6)


@pytest.mark.parametrize("tau", [-0.1, 1.1, math.nan, math.inf])
def test_temperature_out_of_range_is_refused(tau):
    model = small()
    with pytest.raises(ValueError, match=r"expected a value in \[0, 1\]"):
        set_temperature(model, tau)
    assert get_temperature(model) == pytest.approx(0.3)


def test_temperature_of_a_static_model_is_refused():
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match="Sequential has no KernelWarehouse layer"):
        set_temperature(model, 0.5)
    with pytest.raises(ValueError, match="KernelWarehouse layer"):
        get_temperature(model)


def test_unequal_temperatures_are_no_temperature():
    model = small()
    set_temperature(model[0], 0.5)
    with pytest.raises(ValueError, match="no single temperature") as error:
        get_temperature(model)
    assert "0.5" in str(error.value)


def test_a_part_of_a_model_reaches_its_warehouses():
    model = small()
    assert find_warehouses(model) == list(model.warehouses.values())
    assert find_warehouses(model[:3]) == [model.warehouses["spatial"]]
    set_temperature(model[3], 1.0)
    assert get_temperature(model.warehouses["pointwise"]) == 1
    assert get_temperature(model.warehouses["spatial"]) == pytest.approx(0.3)


def test_setting_the_temperature_writes_into_the_buffer():
    """In place: a captured graph or a flattened buffer keeps pointing at it."""
    model = small()
    buffers = [w.temperature for w in find_warehouses(model)]
    set_temperature(model, 0.7)
    assert all(w.temperature is b for w, b in zip(find_warehouses(model), buffers, strict=True))


def test_temperature_may_change_before_the_backward_pass():
    model, other = small(), small()
    gradients = []
    for network, tau in ((model, 0.3), (other, 0.9)):
        y = network(images()).square().mean()
        set_temperature(network, tau)
        y.backward()
        gradients.append([p.grad for p in network.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_annealing():
    values = [annealed_temperature(step, 4) for step in (0, 1, 2, 3, 4, 5, 100)]
    assert values == [1, 0.75, 0.5, 0.25, 0, 0, 0]
    assert annealed_temperature(0, 0) == 0
    assert annealed_temperature(1, 2.5) == pytest.approx(0.6)


# --- compiled and without synchronisation -------------------------------------------------------


@norms
def test_compiled_once_for_all_temperatures(norm):
    """One full graph in training, whatever the temperature, with the eager outputs."""
    torch._dynamo.reset()
    model, eager = small(norm=norm), small(norm=norm)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for tau in (1.0, 0.7, 0.25, 0.0):
        set_temperature(compiled, tau)
        set_temperature(eager, tau)
        torch.testing.assert_close(assert_trains(compiled, images()), eager(images()))
    assert counter.frame_count == 1


@torch.no_grad()
def test_compiled_by_aot_autograd():
    torch._dynamo.reset()
    model = small().eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()), model(images()))


class Recorder(TorchDispatchMode):
    """Names of all operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


SYNCHRONISING = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal"}
CONSTANTS = {"lift_fresh", "lift_fresh_copy", "scalar_tensor", "tensor", "eye", "arange", "full"}


@pytest.mark.parametrize("precision", ["float32", "autocast", "half"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_neither_synchronises_nor_makes_constants(batch, precision):
    """No value is read by the host, and no tensor is made of Python numbers to be sent over."""
    model = small(cell_num_ratio=2, nonlocal_basis_ratio=0.5)
    x = images(batch)
    if precision == "half":
        model, x = model.bfloat16(), x.bfloat16()
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast")
    with Recorder() as recorder:
        set_temperature(model, 0.6)
        with autocast:
            y = model(x)
        y.backward(torch.ones_like(y))
    seen = set(recorder.names)
    assert {"lerp", "convolution"} <= seen  # the recorder sees the step
    assert not seen & SYNCHRONISING
    assert not seen & CONSTANTS


def test_the_recorder_would_notice():
    with Recorder() as recorder:
        torch.tensor([1.0]).sum().item()
    assert {"lift_fresh", "_local_scalar_dense"} <= set(recorder.names)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_on_the_gpu_never_synchronises():
    model, x = small().cuda(), images(device="cuda")
    model(x).square().mean().backward()  # libraries set themselves up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        set_temperature(model, 0.6)
        with torch.autocast("cuda", torch.bfloat16):
            model(x).square().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- what a layer refuses -----------------------------------------------------------------------


@every_layer
def test_private_warehouse(build, shape):
    """A layer by itself owns its cells; its state is whole without a model around it."""
    layer = build()
    assert [w for w in layer.modules() if isinstance(w, Warehouse)] == [layer.warehouse]
    assert {"warehouse.cells", "warehouse.temperature", "bias"} <= set(layer.state_dict())
    assert layer(torch.randn(shape)).shape[:1] == shape[:1]


def test_shared_warehouse():
    """Two layers made by hand on one warehouse: the second's slot is the second shape's."""
    shapes = [KernelShape(8, 4, (3, 3)), KernelShape(8, 8, (1, 1))]
    warehouse = Warehouse(shapes, name="mine")
    first = KWConv2d(4, 8, 3, padding=1, warehouse=warehouse, slot=0)
    second = KWConv2d(8, 8, 1, warehouse=warehouse, slot=1)
    assert first.warehouse is second.warehouse is warehouse
    assert not any(isinstance(m, Warehouse) for m in (*first.modules(), *second.modules()))
    assert (first.attention.mixtures, second.attention.mixtures) == (9, 2)
    assert second.attention.own.start == 9
    assert second(first(images())).shape == (3, 8, 8, 6)
    assert first.bias.dtype == warehouse.cells.dtype


@pytest.mark.parametrize(
    ("layer", "facts"),
    [
        (lambda w: KWConv2d(4, 8, 3, warehouse=w, slot=1), ["slot 1", "'mine'", "(1, 1)"]),
        (lambda w: KWConv2d(8, 8, (1, 3), warehouse=w, slot=1), ["slot 1", "'mine'"]),
        (lambda w: KWConv2d(8, 8, 1, groups=2, warehouse=w, slot=1), ["slot 1", "groups"]),
        (lambda w: KWConv2d(4, 8, 3, warehouse=w, slot=2), ["no slot 2", "2 layers"]),
        (lambda w: KWConv2d(8, 8, 1, warehouse=w, slot=-1), ["no slot -1", "2 layers"]),
        (lambda w: KWConv2d(4, 8, 3, warehouse=w, cell_num_ratio=2), ["cell_num_ratio", "given"]),
        (lambda _: KWConv2d(4, 8, 3, cell_num_ratoi=2), ["did you mean 'cell_num_ratio'"]),
        (lambda _: KWLinear(4, 8, nrom="layer"), ["KWLinear", "did you mean 'norm'"]),
        (lambda _: KWConv2d(4, 8, 3, groups=3), ["3 groups", "4 input channels"]),
        (lambda _: KWConv2d(4, 8, (3, 3, 3)), ["KWConv2d", "one size per axis"]),
        (lambda _: KWConv1d(4, 8, 3, stride=(1, 2)), ["KWConv1d", "one size per axis"]),
    ],
)
def test_layers_that_cannot_be_are_refused(layer, facts):
    shapes = [KernelShape(8, 4, (3, 3)), KernelShape(8, 8, (1, 1))]
    warehouse = Warehouse(shapes, name="mine")
    with pytest.raises(ValueError, match=r"slot|settings|setting|groups|size") as error:
        layer(warehouse)
    for fact in facts:
        assert fact in str(error.value)


@every_layer
def test_input_without_a_batch_is_refused(build, shape):
    layer = build()
    x = torch.randn(shape[-1] if isinstance(layer, KWLinear) else shape[1:])
    with pytest.raises(ValueError, match=rf"{type(layer).__name__} takes \[batch, ") as error:
        layer(x)
    assert str(list(x.shape)) in str(error.value)


def test_repr_names_the_warehouse():
    lines = repr(small())
    assert "8, 16, kernel=1x1, groups=1, bias=True, warehouse='pointwise'" in lines
    assert "(spatial): Warehouse(cells=27, cell_shape=8x4x1x1, layers=2)" in lines
    assert isinstance(small()[0], KWLayer)
