#!/usr/bin/env python
"""What KernelWarehouse costs in each runtime, beside the static network in the same runtime.

python scripts/benchmark_runtimes.py configs/imagenet/resnet18/kw_resnet18_1x.yaml --batch 1 8

The static network is the configuration without ``model.kernel_warehouse`` or ``model.peer``. Both
have random weights and are exported for one batch and size. Rounds are interleaved; a round counts
the processor seconds of the process on one thread, which other programs change little. The ratio is
the median of the rounds' with its quartiles. int8 is calibrated on noise: it is for times only.
"""

import runpy
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kw.benchmark.conditions import BenchmarkError
from kw.cli import ToolParser, output_file, run_tool
from kw.cli.tool import add_options, number, save_json
from kw.config import Config, load_config
from kw.deploy import ExportError, Source, load
from kw.deploy.export import Job, Options, check_target
from kw.evaluation import render_table
from kw.registry import EXPORTERS

_SCRIPT = Path(__file__).with_name("check_exports.py")
random_source = runpy.run_path(str(_SCRIPT), run_name="read")["random_source"]
FORMATS = ("eager", ".onnx", ".xml", ".pte")


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="of dynamic networks (YAML)")
    add_options(parser)
    parser.add_argument("--batch", nargs="+", type=number(int, 1, 4096), default=[1], metavar="N")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--precision", nargs="+", choices=("fp32", "int8"), default=["fp32"])
    parser.add_argument("--rounds", type=number(int, 3, 1000), default=15, metavar="N")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the rows to FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for path in args.configs:
        config = load_config(path, args.cfg_options)
        pair = static_twin(config), config
        sources = [random_source(each, Path(path).stem) for each in pair]
        for batch in args.batch:
            images = torch.randn(batch, config.data.channels, *config.data.shape)
            runs: dict[tuple[str, str], list[Any]] = {}
            with tempfile.TemporaryDirectory() as folder:
                for suffix in args.formats:
                    for precision in args.precision:
                        if suffix == "eager" and precision == "fp32":
                            runs[suffix, precision] = [source.network for source in sources]
                        elif suffix != "eager" and precision in EXPORTERS[suffix].precisions:
                            runs[suffix, precision] = [
                                _ready(source, Path(folder, f"{i}{precision}{suffix}"), images)
                                for i, source in enumerate(sources)
                            ]
                for key, seconds in _measure(runs, images, args.rounds).items():
                    ratios = np.quantile(seconds[:, 1] / seconds[:, 0], [0.5, 0.25, 0.75])
                    name = dict(zip(("format", "precision"), key, strict=True))
                    rows.append({"model": Path(path).stem, "batch": batch, **name})
                    rows[-1]["milliseconds"] = (1000 * np.median(seconds, 0)).tolist()
                    rows[-1]["ratio"] = ratios.tolist()
            if args.json is not None:
                save_json(rows, args.json)
    header = ("network", "batch", "format", "precision", "static ms", "dynamic ms", "ratio")
    cells = [
        (
            *(str(row[key]) for key in ("model", "batch", "format", "precision")),
            *(f"{each:.1f}" for each in row["milliseconds"]),
            "{:.2f} ({:.2f} to {:.2f})".format(*row["ratio"]),
        )
        for row in rows
    ]
    print(render_table(header, cells))


def static_twin(config: Config) -> Config:
    """The configuration of the static network, or a BenchmarkError if it is one already."""
    plain = replace(config.model, kernel_warehouse=None, peer=None)
    if plain == config.model:
        raise BenchmarkError(f"{plain.name} is a static network: name configurations of others")
    return replace(config, model=plain, temperature_epochs=0.0)


def _ready(source: Source, path: Path, images: torch.Tensor) -> torch.nn.Module:
    """The network in a runtime, for images of this shape; compared with PyTorch in fp32."""
    precision = "int8" if "int8" in path.stem else "fp32"
    check_target(path, Options(precision, len(images)))
    inputs = replace(source.description.input, least=None, batch=len(images), precision=precision)
    noise = torch.randint(0, 256, (max(8, len(images)), *images.shape[1:]), dtype=torch.uint8)
    job = Job(source, inputs, replace(source.description, input=inputs), path, list(noise))
    network = load(EXPORTERS[path.suffix].write(job)).network
    with torch.no_grad():
        expected = source.network(images)
    difference = float((network(images) - expected).abs().max() / expected.abs().max())
    if precision == "fp32" and difference > 1e-2:
        raise ExportError(f"{path.suffix}: logits differ by {difference:.1e} of the largest")
    return network


@torch.no_grad()
def _measure(
    runs: dict[tuple[str, str], list[Any]], images: torch.Tensor, rounds: int
) -> dict[tuple[str, str], np.ndarray]:
    """Seconds ``[rounds, 2]`` of static and dynamic network, interleaved over everything."""
    seconds: dict[tuple[str, str], list[list[float]]] = {key: [] for key in runs}
    for turn in range(rounds + 2):  # the first two are not counted
        for key, networks in runs.items():
            taken = []
            for network in networks:
                start = time.process_time()
                network(images)
                taken.append(time.process_time() - start)
            if turn > 1:
                seconds[key].append(taken)
    return {key: np.array(each) for key, each in seconds.items()}


if __name__ == "__main__":
    run_tool(main)
