"""Mean corruption error.

Hendrycks and Dietterich, *Benchmarking neural network robustness to common corruptions and
perturbations*, ICLR 2019.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ALEXNET_ERRORS = {
    "gaussian_noise": 88.6428,
    "shot_noise": 89.4468,
    "impulse_noise": 92.2640,
    "defocus_blur": 81.9880,
    "glass_blur": 82.6268,
    "motion_blur": 78.5948,
    "zoom_blur": 79.8360,
    "snow": 86.6816,
    "frost": 82.6572,
    "fog": 81.9324,
    "brightness": 56.4592,
    "contrast": 85.3204,
    "elastic_transform": 64.6056,
    "pixelate": 71.7840,
    "jpeg_compression": 60.6500,
}
"""AlexNet's top-1 error of each corruption, in percent, the mean of five severities. The paper's
table has them rounded to whole numbers; these are the digits of the authors' later code (AugMix,
google-research/augmix, imagenet.py: "taken from github.com/hendrycks/robustness")."""


def corruption_errors(errors: Mapping[tuple[str, int], float]) -> dict[str, Any]:
    """The corruption errors of Hendrycks and Dietterich (2019), section 4.

    ``CE_c``, the network's error summed over severities over AlexNet's, and ``mCE``, their mean.

    Args:
        errors: top-1 error in percent, by corruption and severity 1 to 5.

    Returns:
        ``ce_NAME``, percent, for each of the 15 corruptions that is there, ``error_NAME`` for
        another, and ``mce``, ``None`` unless all 15 are there.
    """
    names = dict.fromkeys(name for name, _ in errors)
    means = {n: sum(errors[n, severity] for severity in range(1, 6)) / 5 for n in names}
    each = {n: 100 * means[n] / ALEXNET_ERRORS[n] for n in ALEXNET_ERRORS if n in means}
    whole = len(each) == len(ALEXNET_ERRORS)
    return {
        "mce": sum(each.values()) / len(each) if whole else None,
        **{f"ce_{name}": value for name, value in each.items()},
        **{f"error_{name}": means[name] for name in names if name not in each},
    }
