"""Checks of the hospital's machine before joining: disk, memory, GPU."""

import os
import shutil
from pathlib import Path

import torch

from fedssl.deployment.preflight.look import Look
from fedssl.deployment.preflight.report import FAIL, NOT_TOLD, OK, UNKNOWN, WARN, Figure, Finding
from fedssl.storage import cache_folder
from fedssl.training import autocast_for, pick_device

_GB = 1e9
_MODELS_KEPT, _MODELS_IN_MEMORY = 3, 6
_BYTES_A_PIXEL = 2
_LEAST_FREE, _LEAST_MEMORY = 5 * _GB, 2 * _GB


def disk(look: Look) -> Finding:
    """Compare free disk and memory with what cache, state and model need."""
    if look.config is None:
        return Finding("disk", UNKNOWN, "What is needed follows from the plan, which cannot be composed.")
    need, exact = _needed(look)
    free = min(shutil.disk_usage(_there(place)).free for place in (cache_folder(), look.kit.state))
    total, available = _memory()
    wanted = _LEAST_MEMORY + _MODELS_IN_MEMORY * look.model_bytes
    figures: dict[str, Figure] = {
        "free_gb": free / _GB, "model_mb": look.model_bytes / 1e6, "memory_gb": total / _GB,
        "memory_free_gb": available / _GB,
    }  # fmt: skip
    told = "" if look.private else f"{'' if exact else 'at least '}{need / _GB:.1f} GB"
    figures["needed_gb"] = NOT_TOLD if look.private else need / _GB
    enough = f"cache and state still need {told}" if told else "what cache and state still need is not told: private"
    memory = f"{available / _GB:.0f} of {total / _GB:.0f} GB of memory are free"
    found = f"{free / _GB:.0f} GB of disk are free; {enough}. {memory}."
    if free < need:
        advice = "Free space, or let FEDSSL_CACHE name a folder on another disk."
        return Finding("disk", FAIL, found, advice, figures)
    if free < max(_LEAST_FREE, 2 * need) or available < wanted:
        memory = f"{wanted / _GB:.0f} GB of free memory"
        advice = f"{memory}, {_LEAST_FREE / _GB:.0f} GB of free disk and twice the need, or more, are good."
        return Finding("disk", WARN, found, advice, figures)
    return Finding("disk", OK, found, "", figures)


def _needed(look: Look) -> tuple[float, bool]:
    """Estimate the bytes that will still be written; and whether all files were counted."""
    state = _MODELS_KEPT * look.model_bytes
    if look.indexed:
        return state, True
    count, whole = look.files()
    return state + count * look.plan()["data"]["edge"] ** 2 * _BYTES_A_PIXEL, whole


def _there(place: Path) -> Path:
    return next(path for path in (place, *place.parents) if path.exists())


def _memory() -> tuple[int, int]:
    """Bytes of memory, and how many of them are free."""
    pairs = (line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    found = {name: int(value.split()[0]) * 1024 for name, value in pairs}
    return found["MemTotal"], found["MemAvailable"]


def gpu(look: Look) -> Finding:
    """Tell on what the plan would train, and at which precision."""
    if look.config is None:
        return Finding("gpu", UNKNOWN, "On what it would train follows from the plan, which cannot be composed.")
    training = look.config["training"]
    precision, there = str(training["precision"]), torch.cuda.is_available()
    figures: dict[str, Figure] = {"cuda": there, "torch": torch.__version__, "device": str(training["device"])}
    if training["device"] == "cuda" and not there:
        advice = "Install the GPU's driver, see whether nvidia-smi finds it, or agree on training.device=auto."
        return Finding("gpu", FAIL, "The plan wants a GPU, and torch finds none.", advice, figures)
    device = pick_device(str(training["device"]))
    figures["precision"] = "bf16" if autocast_for(device, precision)()._enabled else "float32"
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        figures |= {"gpu": name, "gpu_memory_gb": total / _GB, "gpu_memory_free_gb": free / _GB}
        found = f"{name}, {total / _GB:.0f} GB ({free / _GB:.0f} GB free); trains in {figures['precision']}."
        crowded = free < total / 2
        return Finding("gpu", WARN if crowded else OK, found, "Others use this GPU." if crowded else "", figures)
    cores, threads = len(os.sched_getaffinity(0)), int(training["threads"])
    figures |= {"cores": cores, "threads": threads}
    found = f"No GPU is used: {threads} threads on {cores} cores, in {figures['precision']}."
    advice = f"training.threads={threads} is more than there are cores. " if threads > cores else ""
    return Finding("gpu", WARN, found, f"{advice}See how long a round takes.", figures)
