"""Randomness that nobody can repeat: from the operating system, never from a seed of the configuration.

The same torch seed at two sites would give the same noise, and whoever knows the seed of the sampling knows who was
drawn. Keys come from the operating system; AES-256 in counter mode (NIST SP 800-38A) stretches each to one draw.
"""

import math
import os

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from jaxtyping import Bool, Float, Int
from torch import Tensor

_BLOCK = 1 << 20
_RESOLUTION = 2.0**-53


def _uniform(count: int) -> Float[Tensor, " count"]:
    """Draw numbers above 0, and up to 1, with 53 random bits each, in float64."""
    cipher = Cipher(algorithms.AES256(os.urandom(32)), modes.CTR(bytes(16))).encryptor()
    stream = bytearray(cipher.update(bytes(8 * count)))
    whole = torch.frombuffer(stream, dtype=torch.int64) if count else torch.empty(0, dtype=torch.int64)
    return ((whole >> 11) & ((1 << 53) - 1)).double().add_(0.5).mul_(_RESOLUTION)


def standard_normal(count: int) -> Float[Tensor, " count"]:
    """Draw standard normal numbers in float64, on the CPU (Box & Muller 1958)."""
    drawn = torch.empty(count + count % 2, dtype=torch.float64)
    for start in range(0, len(drawn), 2 * _BLOCK):
        part = drawn[start : start + 2 * _BLOCK]
        half = len(part) // 2
        uniform = _uniform(2 * half)
        radius = uniform[:half].log_().mul_(-2.0).sqrt_()
        angle = uniform[half:].mul_(2.0 * math.pi)
        torch.mul(radius, angle.cos(), out=part[:half])
        torch.mul(radius, angle.sin_(), out=part[half:])
    return drawn[:count]


def coins(count: int, rate: float) -> Bool[np.ndarray, " count"]:
    """Toss ``count`` coins that each show True with probability ``rate``."""
    return (_uniform(count) < rate).numpy()


def some_of(count: int, most: int) -> Int[np.ndarray, " chosen"]:
    """Choose up to ``most`` of ``count`` places, every choice as likely as the others, in random order."""
    return _uniform(count).argsort()[:most].numpy()


def seed() -> int:
    """Draw a 63-bit seed for views: each patient's own, so that they do not depend on who else was drawn."""
    return int.from_bytes(os.urandom(8), "big") >> 1
