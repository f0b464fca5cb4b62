"""Checks of a machine before anything is started: what is there, what is missing, what to do about it."""

import importlib
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

_PACKAGES = (
    "torch", "torchvision", "timm", "flwr", "hydra-core", "pydicom", "pyarrow", "nibabel", "scikit-learn",
    "safetensors",
)  # fmt: skip
_OPTIONAL = {
    "tensorboard": "TensorBoard events: pip install 'fedssl[tracking]'",
    "ray": "flwr run with Ray: pip install 'flwr[simulation]'",
}
_LEAST_FREE_GB = 5.0
_OLDEST, _NEWEST = (3, 11), (3, 13)


@dataclass(frozen=True)
class Check:
    """One finding. ``state`` is ``ok``, ``warn`` (something is slower or missing) or ``fail`` (fedssl will not run)."""

    name: str
    state: str
    found: str
    advice: str = ""


def examine(cache: Path, configs: Path) -> list[Check]:
    """Run every check.

    Args:
        cache: folder that will hold indexes and decoded images.
        configs: folder of the configuration.
    """
    checks = [_python(), *_packages(), *_devices(), _disk(cache), _checkout(configs)]
    if all(check.state != "fail" for check in checks):
        checks += _codecs()
    return checks


def _python() -> Check:
    good = _OLDEST <= sys.version_info[:2] <= _NEWEST
    return Check(
        "python", "ok" if good else "fail", platform.python_version(), "" if good else "Use Python 3.11, 3.12 or 3.13."
    )


def _packages() -> list[Check]:
    checks = []
    for package in _PACKAGES:
        try:
            checks.append(Check(package, "ok", metadata.version(package)))
        except metadata.PackageNotFoundError:
            checks.append(
                Check(package, "fail", "missing", "Install with: pip install -r requirements.lock && pip install -e .")
            )
    for package, advice in _OPTIONAL.items():
        there = importlib.util.find_spec(package) is not None
        checks.append(
            Check(package, "ok" if there else "warn", "installed" if there else "missing", "" if there else advice)
        )
    return checks


def _devices() -> list[Check]:
    try:
        import torch
    except ImportError as error:
        return [Check("torch import", "fail", type(error).__name__, "Install torch again.")]
    checks = [Check("cpu threads", "ok", f"{os.cpu_count()} (set training.threads)")]
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        return [*checks, Check("gpu", "ok", f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB")]
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    precision = "fast" if fast else "slow: leave training.precision=auto"
    return [
        *checks,
        Check("gpu", "warn", "none", "Pretraining runs on the CPU."),
        Check("bf16 on cpu", "ok", precision),
    ]


def _disk(cache: Path) -> Check:
    folder = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(folder).free / 1e9
    good = free >= _LEAST_FREE_GB
    return Check(
        "disk for the image cache", "ok" if good else "warn", f"{free:.0f} GB free", "" if good else "Set FEDSSL_CACHE."
    )


def _checkout(configs: Path) -> Check:
    there = configs.is_dir()
    advice = "" if there else "Simulations and federations run from a checkout: pip install -e ."
    return Check(
        "configuration", "ok" if there else "warn", "checkout" if there else "installed without checkout", advice
    )


def _codecs() -> list[Check]:
    """Tell for each compressed transfer syntax of PS3.5, A.4 and A.5, which decoders are installed."""
    from pydicom import uid
    from pydicom.pixels import get_decoder

    syntaxes = [
        uid.DeflatedExplicitVRLittleEndian, uid.RLELossless, uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit,
        uid.JPEGLossless, uid.JPEGLosslessSV1, uid.JPEGLSLossless, uid.JPEGLSNearLossless, uid.JPEG2000Lossless,
        uid.JPEG2000, uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K,
    ]  # fmt: skip
    checks = []
    for syntax in syntaxes:
        decoder = get_decoder(syntax)
        found = ", ".join(decoder.available_plugins) or ("pydicom" if decoder.is_available else "no decoder")
        advice = "" if decoder.is_available else "Install the packages of requirements.lock again."
        checks.append(Check(f"codec {syntax.name}", "ok" if decoder.is_available else "warn", found, advice))
    return checks
