"""The conditions of a measurement, and the file name that carries them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from ..errors import UserError

# The values stand in file names.
MODES = {"inference": "infer", "train": "train", "memory": "memory"}
WORDS = {"inference": "inference", "train": "training step", "memory": "training memory"}
# The values are the names in a configuration.
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


class BenchmarkError(UserError):
    """A benchmark that cannot be done as it was asked for."""


@dataclass(frozen=True)
class Conditions:
    """Everything that is the same for all networks of a run."""

    mode: str  # a key of MODES
    device: str  # "cpu" or "cuda"
    dtype: str  # a key of DTYPES: float32, or autocast to a 16-bit type as in training
    batch_size: int  # images per forward pass
    input_size: int | tuple[int, int]  # side of the square input, or height and width, pixels
    threads: int  # of PyTorch's operators on CPU
    channels_last: bool = False  # NHWC memory layout of images and 4-D weights
    compile: bool = False  # torch.compile of the network, static ones included
    rounds: int = 20  # interleaved rounds; each gives one time per network and part

    def words(self) -> list[str]:
        """All but the mode, for people."""
        threads = [f"{self.threads} threads"] if self.device == "cpu" else []
        size = "x".join(map(str, self.shape))
        words = [f"batch {self.batch_size}", self.dtype, size, *threads]
        return [*words, self.layout, self.execution]

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the input."""
        size = self.input_size
        return (size, size) if isinstance(size, int) else size

    @property
    def layout(self) -> str:
        """``"nchw"`` or ``"nhwc"``."""
        return "nhwc" if self.channels_last else "nchw"

    @property
    def execution(self) -> str:
        """``"eager"`` or ``"compile"``."""
        return "compile" if self.compile else "eager"

    def file_name(self, subject: str, machine_device: str) -> str:
        """The name of the result's files, without suffix.

        Args:
            subject: what is measured.
            machine_device: the device as :func:`device_slug` names it.

        Raises:
            BenchmarkError: ``subject`` cannot stand in a file's name.
        """
        if not re.fullmatch(r"[\w.+-]+", subject):
            raise BenchmarkError(f"name {subject!r}: expected letters, digits and any of _ . + -")
        words = ["benchmark", MODES[self.mode], subject, machine_device, self.dtype]
        words += [f"b{self.batch_size}", "x".join(map(str, dict.fromkeys(self.shape)))]
        if self.device == "cpu":
            words.append(f"t{self.threads}")
        return "-".join([*words, self.layout, self.execution])


def device_slug(device: str) -> str:
    """``"cpu"``, or the GPU's own name as a word: two GPUs never share a result file."""
    if device == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name().lower().replace("nvidia", "")
    return re.sub(r"[^a-z0-9]+", "_", name).strip("_")
