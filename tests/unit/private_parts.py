"""What the tests of private training share: a small method, patients made of noise, and mechanisms that are wrong."""

import contextlib

import torch

from fedssl.encoders import build_encoder
from fedssl.methods.byol import BYOL
from fedssl.methods.private_clustering import PrivateClustering
from fedssl.privacy.engines.loop import Loop

PLAIN = contextlib.nullcontext


def clustering(prototypes=8, seed=0):
    encoder = build_encoder("test_resnet", norm_groups=16, seed=seed)
    method = PrivateClustering(
        encoder, num_prototypes=prototypes, hidden=32, width=16, temperature=0.1, epsilon=0.05, rate=1.0, centring=0.1,
        seed=seed,
    )  # fmt: skip
    method.calibrate(torch.randn(16, 1, 32, 32, generator=torch.Generator().manual_seed(1)))
    return method


def byol():
    return BYOL(build_encoder("test_resnet", norm_groups=16), hidden=32, width=16, momentum=0.9, norm="layer")


def patients(counts, edges=(32, 32), seed=0):
    """Views of patients with so many images."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(count, 1, edge, edge, generator=generator) for edge in edges] for count in counts]


def gradient_of(engine_type, method, units, clip):
    engine = engine_type(method, PLAIN)
    engine.see(units)
    votes = engine.votes() if method.num_votes else None
    return votes, engine.gradients(clip)


def alone(method, unit, clip):
    """One patient's clipped gradient as one vector."""
    _, found = gradient_of(Loop, method, [unit], clip)
    return torch.cat([part.flatten() for part in found.total]).double()
