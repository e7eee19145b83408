"""The authors' networks from their state alone: written from the papers, without ``kw``.

Slow and literal: one sample, one mixture at a time. Names are those of the released checkpoints;
what a checkpoint does not hold (strides, activations, which layer shares with which) is here.

Paper: KernelWarehouse (ICML 2024, arXiv 2406.07879).

Legend: n cells of a warehouse, m mixtures of a layer, b = n / sum of m the budget, tau temperature.
"""

from __future__ import annotations

import re
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
# MobileNetV2's inverted residuals, by their number in ``features``: those whose depthwise layer has
# stride 2, and the groups of those that share. A stage's first block belongs to the group before.
STRIDED = (2, 4, 7, 14)
GROUPS = ((1, 2), (3, 4), (5, 6, 7), (8, 9, 10, 11), (12, 13, 14), (15, 16, 17, 18))
LAST = 18  # no inverted residual but the last pointwise convolution


def warehouse_of(layer: str) -> str:
    """The name of a layer's warehouse, without "layer"; a final number may be missing in theirs."""
    if found := re.fullmatch(r"layer(\d)\.(\d+)\.(conv\d|downsample)(\.0)?", layer):
        stage, block, kind = int(found[1]), int(found[2]), found[3]
        handed_over = stage > 1 and block == 0 and kind in ("conv1", "downsample")
        return f"stage{stage - 1 - handed_over}_conv"
    if found := re.fullmatch(r"features\.(\d+)\.(?:conv\.)?(.+)", layer):
        number, part = int(found[1]), found[2]
        if number == 0:
            return "stage0_conv0"
        kinds = {"0.0": "pwconv0", "1.0": "dwconv0", "2": "pwconv1"}  # expand, depthwise, project
        if number == 1:
            kinds = {"0.0": "dwconv0", "1": "pwconv1"}
        kind = kinds[part] if number < LAST else "pwconv1"
        group = next(i for i, numbers in enumerate(GROUPS, 1) if number in numbers)
        return f"stage{group}_{kind}"
    if found := re.fullmatch(r"downsample_layers\.(\d)\.\d", layer):
        return f"stage{int(found[1]) - 1}_conv0" if found[1] != "0" else "stagestem_conv0"
    if found := re.fullmatch(r"stages\.(\d)\.\d+\.(dwconv|pwconv)\d?", layer):
        return f"stage{found[1]}_{found[2]}0"
    assert layer == "classifier.1.conv", layer
    return "classifier"


class Reference:
    """A released network at one temperature.

    Args:
        state: tensors by the authors' names.
        warehouses: names of the warehouses, in the order in which the cells are numbered.
        tau: the temperature.
        calibrate: set the running statistics of the backbone's BatchNorms to those of the input, in
            ``state``: with random weights, activations would vanish otherwise.

    Attributes:
        outputs: of every convolution and linear layer that ran, by name.
    """

    def __init__(
        self, state: State, warehouses: list[str], tau: float, calibrate: bool = False
    ) -> None:
        self.state, self.tau, self.calibrate = state, tau, calibrate
        self.outputs: State = {}
        self.number: dict[str, int] = {}  # of a layer's warehouse
        self.mixtures: dict[str, int] = {}  # m of a layer, in module order
        short = [re.sub("_l(ayer)?_", "_", name) for name in warehouses]
        for key in state:
            layer, _, part = key.partition(".attention.")
            if part == "fc1.weight":
                name = warehouse_of(layer)
                name = name if name in short else name.rstrip("0123456789")
                self.number[layer] = short.index(name)
                branch = f"{layer}.attention."
                logits = state.get(branch + "basis_bias", state.get(branch + "fc2.bias"))
                self.mixtures[layer] = len(logits) // (len(self.cells(layer)) + 1)

    def forward(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` -> ``[B, classes]``."""
        if "features.0.1.weight" in self.state:
            return self.mobilenet(images)
        if "downsample_layers.0.1.weight" in self.state:
            return self.convnext(images)
        return self.resnet(images)

    def cells(self, layer: str) -> Tensor:
        """``[n, c_out, c_in]`` of a layer's warehouse."""
        cells = self.state[f"warehouse_manager.weights.{self.number[layer]}"]
        return cells.reshape(cells.shape[:3])

    def resnet(self, x: Tensor) -> Tensor:
        x = self.norm("bn1", self.conv("conv1", x, 7, stride=2)).relu()
        x = F.max_pool2d(x, 3, 2, 1)
        for stage in (1, 2, 3, 4):
            block = 0
            while f"layer{stage}.{block}.bn1.weight" in self.state:
                name, shortcut = f"layer{stage}.{block}", x
                stride = 2 if block == 0 and stage > 1 else 1
                # A bottleneck strides in its 3x3 convolution.
                plan = ((3, stride), (3, 1))
                if f"{name}.bn3.weight" in self.state:
                    plan = ((1, 1), (3, stride), (1, 1))
                if f"{name}.downsample.1.weight" in self.state:
                    shortcut = self.conv(f"{name}.downsample.0", x, 1, stride=stride)
                    shortcut = self.norm(f"{name}.downsample.1", shortcut)
                for i, (kernel, step) in enumerate(plan, 1):
                    x = self.conv(f"{name}.conv{i}", x.relu(), kernel, stride=step)
                    x = self.norm(f"{name}.bn{i}", x)
                x = (x + shortcut).relu()
                block += 1
        return self.linear("fc", x.mean((2, 3)))

    def mobilenet(self, x: Tensor) -> Tensor:
        x = F.relu6(self.norm("features.0.1", self.conv("features.0.0", x, 3, stride=2)))
        for number in range(1, LAST):
            name, shortcut = f"features.{number}.conv", x
            stride = 2 if number in STRIDED else 1
            first = 0  # of the block's parts; the first block does not expand
            if number > 1:
                x = F.relu6(self.norm(f"{name}.0.1", self.conv(f"{name}.0.0", x, 1)))
                first = 1
            x = self.conv(f"{name}.{first}.0", x, 3, stride=stride, groups=x.shape[1])
            x = F.relu6(self.norm(f"{name}.{first}.1", x))
            x = self.norm(f"{name}.{first + 2}", self.conv(f"{name}.{first + 1}", x, 1))
            x = x + shortcut if x.shape == shortcut.shape else x
        x = F.relu6(self.norm(f"features.{LAST}.1", self.conv(f"features.{LAST}.0", x, 1)))
        x = x.mean((2, 3))
        if "classifier.1.conv.bias" in self.state:
            return self.conv("classifier.1.conv", x[..., None, None], 1)[..., 0, 0]
        return self.linear("classifier.1" if "classifier.1.bias" in self.state else "classifier", x)

    def convnext(self, x: Tensor) -> Tensor:
        for stage in range(4):
            down = f"downsample_layers.{stage}"
            if stage == 0:
                x = self.norm(f"{down}.1", self.conv(f"{down}.0", x, 4, stride=4, padding=0))
            else:
                x = self.conv(f"{down}.1", self.norm(f"{down}.0", x), 2, stride=2, padding=0)
            block = 0
            while f"stages.{stage}.{block}.gamma" in self.state:
                name, shortcut = f"stages.{stage}.{block}", x
                x = self.conv(f"{name}.dwconv", x, 7, groups=x.shape[1])
                x = F.gelu(self.conv(f"{name}.pwconv1", self.norm(f"{name}.norm", x), 1))
                x = self.conv(f"{name}.pwconv2", x, 1)
                x = x * self.state[f"{name}.gamma"].view(-1, 1, 1) + shortcut
                block += 1
        return self.linear("head", self.norm("norm", x.mean((2, 3), keepdim=True))[..., 0, 0])

    def norm(self, name: str, x: Tensor) -> Tensor:
        """BatchNorm in evaluation, or LayerNorm over channels where no statistics are kept."""
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        if f"{name}.running_mean" not in self.state:
            x = F.layer_norm(x.movedim(1, -1), weight.shape, weight, bias, 1e-6)
            return x.movedim(-1, 1)
        if self.calibrate:
            self.state[f"{name}.running_mean"] = x.mean((0, 2, 3))
            self.state[f"{name}.running_var"] = x.var((0, 2, 3)) + 0.1
        mean, variance = (self.state[f"{name}.running_{what}"] for what in ("mean", "var"))
        return F.batch_norm(x, mean, variance, weight, bias)

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])
        self.outputs[name] = y
        return y

    def conv(
        self,
        name: str,
        x: Tensor,
        size: int,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
    ) -> Tensor:
        """A convolution, dynamic if the state has an attention branch for it."""
        padding = size // 2 if padding is None else padding
        bias = self.state.get(f"{name}.bias")
        if name in self.mixtures:
            kernels = self.kernels(name, x, size, groups)
        else:
            weight = self.state[f"{name}.weight"]
            kernels = [weight.view(*weight.shape[:2], size, size)] * len(x)
        samples = zip(x.split(1), kernels, strict=True)
        y = torch.cat([F.conv2d(s, k, bias, stride, padding, groups=groups) for s, k in samples])
        self.outputs[name] = y
        return y

    def kernels(self, name: str, x: Tensor, size: int, groups: int) -> list[Tensor]:
        """Every sample's kernel, block by block."""
        cells, mixtures = self.cells(name), self.mixtures[name]
        _, c_out, c_in = cells.shape
        in_blocks = x.shape[1] // groups // c_in
        out_blocks = mixtures // in_blocks // size**2
        kernels = []
        for alpha in self.attention(name, x.mean((2, 3))):
            kernel = cells.new_zeros(out_blocks * c_out, in_blocks * c_in, size, size)
            for i, block in enumerate((alpha @ cells.flatten(1)).view(-1, c_out, c_in)):
                i_out, i_in = i // in_blocks % out_blocks, i % in_blocks
                row, column = divmod(i // in_blocks // out_blocks, size)
                out = slice(i_out * c_out, (i_out + 1) * c_out)
                into = slice(i_in * c_in, (i_in + 1) * c_in)
                kernel[out, into, row, column] = block
            kernels.append(kernel)
        return kernels

    def one_hot(self, name: str) -> tuple[Tensor, int, int]:
        """beta ``[m, n + 1]`` of a layer, the null cell last; its first cell; its number of cells.

        Layer after layer takes the next cells: b for a mixture, the first of which it starts on; or
        one for every 1/b mixtures, along diagonals, the others starting on the null cell.
        """
        n, number = len(self.cells(name)), self.number[name]
        sharing = {k: m for k, m in self.mixtures.items() if self.number[k] == number}
        budget = Fraction(n, sum(sharing.values()))
        assert 1 in (budget.numerator, budget.denominator)
        cell = 0
        for layer, mixtures in sharing.items():
            first, beta = cell, self.cells(name).new_zeros(mixtures, n + 1)
            for i in range(mixtures):
                period = budget.denominator
                if i % period == (i // period) % period:
                    beta[i, cell] = 1
                    cell += budget.numerator
                else:
                    beta[i, n] = 1
            if layer == name:
                break
        return beta, first, int(mixtures * budget)

    def attention(self, name: str, pooled: Tensor) -> Tensor:
        """``(1 - tau) z / (sum |z| + 1e-3) + tau beta``, the null cell dropped: ``[B, m, n]``."""
        beta, first, own = self.one_hot(name)
        branch = f"{name}.attention."
        part = {k.removeprefix(branch): v for k, v in self.state.items() if k.startswith(branch)}
        hidden = F.linear(pooled, part["fc1.weight"], part.get("fc1.bias"))
        scale, shift = part["norm1.weight"], part["norm1.bias"]
        if "norm1.running_mean" in part:
            mean, variance = part["norm1.running_mean"], part["norm1.running_var"]
            hidden = (hidden - mean) / (variance + 1e-5).sqrt() * scale + shift
        else:
            hidden = F.layer_norm(hidden, scale.shape, scale, shift)
        z = F.linear(hidden.relu(), part["fc2.weight"], part.get("fc2.bias"))
        z = z.view(len(pooled), len(beta), -1)
        if "fc3.weight" in part:  # own logits, a basis of the others', the null cell's
            others = F.linear(z[..., own:-1], part["fc3.weight"])
            parts = (others[..., :first], z[..., :own], others[..., first:], z[..., -1:])
            z = torch.cat(parts, -1) + part["basis_bias"].view(len(beta), -1)
        alpha = (1 - self.tau) * z / (z.abs().sum(-1, keepdim=True) + 1e-3) + self.tau * beta
        return alpha[..., :-1]
