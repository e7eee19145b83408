"""Configurations with one random mistake each, from a seed: what the tests of bad input try."""

from __future__ import annotations

import random
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kw.config import Config
from kw.config.describe import UNIONS, key_hints
from kw.config.loading import _Reader
from kw.config.printing import _Dumper

__all__ = ["MISSING", "Case", "file_cases", "setting_cases", "text_cases", "unknown_cases"]

MISSING = object()

# Values of all kinds: a key takes few of them.
VALUES: list[Any] = [
    *(None, True, False, "", "ten", "1e-3", "-1", "null", "é☃", "a" * 3000, "resnet18"),
    *(-1, 0, 1, 2, 3, 7, 31, 10**6, 10**12, 10**400, -(10**400)),
    *(-0.5, 0.0, 1e-300, 1e-12, 0.5, 0.999, 1.0, 1.5, 3.7, 1e300, float("nan"), float("inf")),
    *([], [1], [0.5, 0.5], [0.1, 0.2, 0.3], ["a"], [None], [[1]], [0, float("nan")], [1] * 500),
    *({}, {"a": 1}, {"name": 3}, {"plan": None}, {"a": {"b": [None]}}, {"layer1": {}}),
]
TIMM_ARGS: list[Any] = [
    *({"unknown": 1}, {"channels": []}, {"channels": "x"}, {"channels": [8, 8, 16]}),
    *({"channels": [-8, 8, 8, 8]}, {"channels": [0, 8, 8, 8]}, {"layers": [1]}, {"layers": 3}),
    *({"in_chans": 1}, {"in_chans": 0}, {"in_chans": None}, {"num_classes": 3}),
    *({"features_only": True}, {"global_pool": ""}, {"global_pool": "none"}, {"global_pool": 3}),
    *({"norm_layer": "nonorm"}, {"act_layer": "relu7"}, {"block": "x"}, {"img_size": 7}),
    *({"img_size": 64}, {"patch_size": 0}, {"patch_size": 5}, {"embed_dim": 7}, {"depth": -1}),
    *({"num_heads": 7}, {"dims": [8]}, {"depths": [1]}, {"depths": "ab"}, {"drop_rate": 0.5}),
    *({"pretrained_cfg_overlay": {"file": "none.pth"}, "pretrained": True},),
    *({"checkpoint_path": "none.pth"}, {"checkpoint_path": 7}, {"exportable": "x"}),
    *({"pretrained_cfg": "none"}, {"pretrained_cfg": 3}, {"pretrained_cfg": {"a": 1}}),
    *({"act_layer": "silu"}, {"stem_width": 0}, {"output_stride": 3}, {"base_width": 1e9}),
]
CONVERSIONS: list[Any] = [
    *({"plan": "vgg"}, {"plan": "convnext_tiny"}, {"plan": "deit"}, {"plan": "mobilenetv2_050_1x"}),
    *({"plan": {}}, {"plan": {"rules": []}}, {"plan": {"layers": 3}}, {"plan": {"warehouses": {}}}),
    *({"plan": "auto"}, {"plan": ""}, {"plan": "resnet18", "warehouses": {"nowhere": {}}}),
    {"plan": "resnet18", "warehouses": {"nowhere": {"cell_num_ratio": 2}}},
    *(
        {"plan": "resnet18", "cell_num_ratio": 1e-9},
        {"plan": "resnet18", "cell_num_ratio": 1000},
    ),
    *({"plan": "resnet18", "cell_num_ratio": 0.333}, {"plan": "resnet18", "cell_num_ratio": 1.7}),
    *({"plan": "resnet18", "cell_inplane_ratio": 0.3}, {"plan": "resnet18", "reduction": 1e-9}),
    *({"plan": "resnet18", "cell_outplane_ratio": 999}, {"plan": "resnet18", "reduction": 64}),
    *({"plan": "resnet18", "nonlocal_basis_ratio": 1e-9}, {"plan": "resnet18", "norm": "group"}),
    {"plan": "resnet18", "spatial_partition": True, "cell_num_ratio": 0.01},
]
PEERS: list[Any] = [
    *({"method": "dyconv", "layers": "("}, {"method": "dyconv", "layers": "nothing"}),
    *({"method": "odconv", "kernels": 1024}, {"method": "odconv", "reduction": 1e-9}),
    *({"method": "condconv", "kernels": 1}, {"method": "dyconv", "layers": ""}),
    *({"method": "odconv", "layers": ".*"}, {"method": "condconv", "layers": "layer1.*"}),
    *({"method": "fdconv", "kernels": 1024}, {"method": "kerneldna", "kernels": 1024}),
]
ODD = "\t{}[]:#&*!|>%@`\"'\\,-?=~ \x00\u2028é"


@dataclass(frozen=True)
class Case:
    """A mistake.

    Attributes:
        name: for messages.
        file: the configuration to load.
        options: ``--cfg-options`` that make it fit a small data set, and perhaps the mistake.
        key: the setting that was changed, or "" where the text was.
        value: what it was set to.
    """

    name: str
    file: Path
    options: list[str]
    key: str = ""
    value: Any = MISSING


class Writer:
    """Writes variants of shipped files beside them, so that what they inherit is found."""

    def __init__(self, folder: Path, fitting: dict[str, Any]) -> None:
        self.folder = folder
        self.fitting = fitting
        self.count = 0

    def text(self, shipped: Path, text: str | bytes) -> Path:
        self.count += 1
        path = shipped.with_name(f"mutant_{self.count}{shipped.suffix}")
        path.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
        return path

    def options(self, key: str = "") -> list[str]:
        """What makes a configuration fit, but for a key that is under test."""
        return [
            f"{name}={dump(value)}"
            for name, value in self.fitting.items()
            if not (name == key or name.startswith(f"{key}.") or key.startswith(f"{name}."))
        ]

    def setting(self, rng: random.Random, shipped: Path, key: str, value: Any, name: str) -> Case:
        """A file, or an option, that sets a key."""
        options = self.options(key)
        if rng.random() < 0.5 and "_" not in (key[:1], key[-1:]):
            return Case(name, shipped, [*options, f"{key}={dump(value)}"], key, value)
        content = _Reader("").read(shipped.read_text()).plain()
        inner = content
        *groups, last = key.split(".")
        for group in groups:
            if not isinstance(inner.get(group), dict):
                inner[group] = {}
            inner = inner[group]
        inner[last] = value
        return Case(name, self.text(shipped, dump(content, flow=False)), options, key, value)


def dump(value: Any, flow: bool = True) -> str:
    """YAML that reads back as it was."""
    text = yaml.dump(
        value,
        Dumper=_Dumper,
        default_flow_style=flow or None,
        width=10**9,
        allow_unicode=True,
        sort_keys=False,
    )
    return text.removesuffix("...\n").strip()


def setting_cases(
    writer: Writer, shipped: list[Path], seed: int, count: int, cls: Any = Config
) -> Iterator[Case]:
    """Any value for any key; half of them of the key's own type, which may be in order."""
    rng = random.Random(seed)
    hints = {key: hint for key, (hint, _) in key_hints(cls).items()}
    special = {"model.timm_args": TIMM_ARGS, "model.kernel_warehouse": CONVERSIONS}
    special["model.peer"] = PEERS
    choices = {key: field.metadata.get("choices") for key, (_, field) in key_hints(cls).items()}
    keys = [*hints, *[key for key, values in special.items() if key in hints for _ in range(8)]]
    for i in range(count):
        key = rng.choice(keys)
        value = rng.choice(VALUES)
        if rng.random() < 0.6:
            value = _of_type(rng, hints[key], choices[key])
        if key in special and rng.random() < 0.9:
            value = rng.choice(special[key])
        key = key.replace("<name>", "layer1")
        yield writer.setting(rng, rng.choice(shipped), key, value, f"{i}: {key} = {value!r:.60}")


def _of_type(rng: random.Random, hint: Any, choices: Any) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in UNIONS else (hint,)
    hint = rng.choice(options)
    if hint is type(None):
        return None
    if hint is bool:
        return rng.random() < 0.5
    if hint is int:
        return int(10 ** rng.uniform(0, 13)) if rng.random() < 0.5 else rng.randint(-2, 40)
    if hint is float:
        return rng.choice([-1, 1, 1, 1]) * 10 ** rng.uniform(-12, 12)
    if hint is str:
        return rng.choice([*(choices or ["images", "none", "rand-m9", "resnet19", "native"])])
    if typing.get_origin(hint) is list:
        return [round(rng.uniform(-0.2, 1.2), 3) for _ in range(rng.randint(0, 4))]
    return rng.choice([{}, {"a": rng.random()}])


def unknown_cases(
    writer: Writer, shipped: list[Path], seed: int, count: int, cls: Any = Config
) -> Iterator[Case]:
    """Keys that do not exist: those that do, misspelt, or somewhere else."""
    rng = random.Random(seed)
    keys = [key for key in key_hints(cls) if "<" not in key]
    for i in range(count):
        key = rng.choice(keys)
        groups, _, last = key.rpartition(".")
        at = rng.randrange(len(last))
        wrong = rng.choice(
            [
                last[:at] + last[at + 1 :],
                last[:at] + last[at] + last[at:],
                last + "s",
                last.upper(),
                last.replace("_", "-") + "-",
                f"{last}.{last}",
            ]
        )
        if not wrong:
            continue
        key = f"{groups}.{wrong}" if groups and rng.random() < 0.8 else wrong
        if key in keys or key.startswith("_"):
            continue
        yield writer.setting(rng, rng.choice(shipped), key, rng.choice(VALUES), f"{i}: {key}")


def text_cases(
    writer: Writer, shipped: list[Path], seed: int, count: int, marker: Path
) -> Iterator[Case]:
    """Files damaged here and there: cut off, shuffled, with characters and tags that mean a lot."""
    rng = random.Random(seed)
    run = f'!!python/object/apply:os.system ["touch {marker}"]'
    for i in range(count):
        path = rng.choice(shipped)
        text = path.read_text()
        lines = [line for line in text.splitlines(keepends=True) if not line.startswith("#")]
        at = rng.randrange(len(lines))
        kind = rng.randrange(9)
        if kind == 0:
            lines = ["".join(lines)[: rng.randrange(len("".join(lines)))]]
        elif kind == 1:
            del lines[at]
        elif kind == 2:
            lines.insert(rng.randrange(len(lines) + 1), lines[at])
        elif kind == 3:
            lines[at] = rng.choice([" ", "  ", "\t"]) + lines[at]
        elif kind == 4:
            lines[at] = lines[at].lstrip()
        elif kind == 5:
            place = rng.randrange(len(lines[at]))
            lines[at] = lines[at][:place] + rng.choice(ODD) + lines[at][place:]
        elif kind == 6:
            tag = rng.choice(["!!python/name:os.system x", "!x y", "&a b", "*a", "!!set {a}", run])
            lines[at] = lines[at].split(":")[0].rstrip("\n") + f": {tag}\n"
        elif kind == 7:
            rng.shuffle(lines)
        else:
            other = rng.choice(shipped).read_text().splitlines(keepends=True)
            lines.insert(at, rng.choice(other))
        file = writer.text(path, "".join(lines))
        yield Case(f"{i}: kind {kind} of {path.name}", file, writer.options())


def file_cases(writer: Writer, shipped: Path, folder: Path) -> Iterator[Case]:
    """Files that are none, or not configurations; bases that are missing or go in circles."""
    folder.mkdir()

    def bases(name: str, text: str) -> Case:
        path = folder / f"{name}.yaml"
        path.write_text(text)
        return Case(name, path, writer.options())

    contents: dict[str, bytes] = {
        "empty": b"",
        "latin": "seed: 1 # é".encode("latin-1"),
        "utf16": "seed: 1\n".encode("utf-16"),
        "nul": b"seed: \x00",
        "picture": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
        "pickle": b"\x80\x02}q\x00.",
        "deep": b"seed: " + b"[" * 100_000,
        "deep_maps": b"seed: " + b"{a: " * 5000,
        "many": b"".join(b"key_%d: 1\n" % i for i in range(300)),
        "list": b"- 1\n",
        "text": b"hello\n",
        "json": b'{"seed": 1}',
        "bomb": b"a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
        "documents": b"seed: 1\n---\nseed: 2\n",
        "python": b"seed = 1\n",
        "long_key": b"? " + b"k" * 5000 + b"\n: 1\n",
    }
    for name, content in contents.items():
        path = folder / f"{name}.yaml"
        path.write_bytes(content)
        yield Case(name, path, writer.options())
    python = folder / "configuration.txt"
    python.write_text("seed: 1\n")
    yield Case("another suffix", python, writer.options())
    for name in ("missing.yaml", "no/such/folder.yaml", ".", "x" * 300 + ".yaml", "", "a\0b.yaml"):
        yield Case(f"file {name[:20]!r}", folder / name, writer.options())
    yield Case("the device of zeros", Path("/dev/zero"), writer.options())
    yield bases("itself", "_base_: itself.yaml\n")
    yield bases("itself_in_a_list", "_base_: [./itself_in_a_list.yaml]\n")
    for i in range(3):
        yield bases(f"circle_{i}", f"_base_: circle_{(i + 1) % 3}.yaml\n")
    (folder / "link.yaml").symlink_to("linked.yaml")
    yield bases("linked", "_base_: link.yaml\n")
    (folder / "loop.yaml").symlink_to("loop.yaml")
    yield bases("looped", "_base_: loop.yaml\n")
    for i in range(200):
        (folder / f"chain_{i}.yaml").write_text(f"_base_: chain_{i + 1}.yaml\n")
    yield bases("chain", "_base_: chain_0.yaml\n")
    wrong = ["3", "null", "[null]", "[[a]]", "{a: b}", "''", ".", "/", "true", "missing.yaml"]
    wrong += [f"{'x' * 300}.yaml", "/dev/zero", "picture.yaml", "latin.yaml", "list.yaml"]
    wrong += ["[empty.yaml, missing.yaml]", "~/none.yaml", "../..", "http://localhost/a.yaml"]
    for i, value in enumerate(wrong):
        yield bases(f"base_{i}", f"_base_: {value}\n")
    # 2 ** 15 files, were each read every time that it is named.
    for i in range(15):
        (folder / f"fan_{i}.yaml").write_text(f"_base_: [fan_{i + 1}.yaml, fan_{i + 1}.yaml]\n")
    (folder / "fan_15.yaml").write_text(f"_base_: {shipped}\n")
    yield bases("fan", "_base_: fan_0.yaml\n")
