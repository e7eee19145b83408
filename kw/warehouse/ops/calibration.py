"""Rates of this machine that ``kw doctor`` has measured, kept in a file.

The file is for one device, one version of torch and Triton, and this version of the back ends; any
other is not read. The selector's choice is arithmetic on these rates, hence the same whenever the
file is the same.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from pathlib import Path

import torch

from .cache import cache_folder
from .device import DeviceProfile, estimated_profile
from .timing import machine_name, versions

log = logging.getLogger(__name__)


def device_profile(device: str) -> DeviceProfile:
    """The measured profile of a type of device or, without one, the estimated one.

    ``KW_CALIBRATION=0`` in the environment leaves measurements out.
    """
    is_here = device != "cuda" or torch.cuda.is_available()
    if is_here and os.environ.get("KW_CALIBRATION") != "0":
        measured = _read(calibration_file(device))
        if measured is not None:
            return measured
    return estimated_profile(device)


def write_calibration(device: str, profile: DeviceProfile) -> Path:
    """Keep a measured profile for all later processes of this user on this machine.

    Raises:
        OSError: the cache folder cannot be written to.
    """
    path = calibration_file(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(profile.to_json(), indent=1))
    partial.replace(path)
    _read.cache_clear()
    return path


def calibration_file(device: str) -> Path:
    """Where the profile of a type of device is kept, whether there is one or not."""
    return cache_folder() / f"calibration-{machine_name(device)}-{versions()}.json"


@functools.cache
def _read(path: Path) -> DeviceProfile | None:
    try:
        return DeviceProfile.from_json(json.loads(path.read_text()))
    except OSError:
        return None
    except ValueError as error:
        log.warning("%s: %s; rates are estimated. Run `kw doctor` again", path, error)
        return None
