"""Equipartition over all sites, against one Sinkhorn over all images and against POT."""

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fedssl.build import build_method, check_settings
from fedssl.config import load
from fedssl.data.batches import ViewBatch
from fedssl.errors import ConfigError
from fedssl.marginals import balance, column_log_sums, column_step, site_marginal
from fedssl.prototypes import sinkhorn


def _scores(seed, images, prototypes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    points = F.normalize(torch.randn(images, 8, generator=generator, dtype=dtype), dim=1)
    centres = F.normalize(torch.randn(prototypes, 8, generator=generator, dtype=dtype), dim=1)
    return points @ centres.T


def _negotiate(parts, iterations, epsilon=0.05):
    """Potentials as server and sites find them together."""
    potentials = None
    for _ in range(iterations):
        told = [column_log_sums(part, potentials, epsilon=epsilon) for part in parts]
        potentials = column_step(potentials, told, [len(part) for part in parts])
    return potentials


@given(
    st.integers(0, 10_000), st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(2, 30), st.integers(1, 8)
)
@settings(deadline=None)
def test_federated_sinkhorn_gives_every_site_its_rows_of_the_pooled_codes(seed, sizes, prototypes, iterations):
    scores = _scores(seed, sum(sizes), prototypes)
    parts = scores.split(sizes)
    potentials = _negotiate(parts, iterations)
    pooled = sinkhorn(scores, epsilon=0.05, iterations=iterations)
    for part, expected in zip(parts, pooled.split(sizes), strict=True):
        ours = F.softmax(part / 0.05 + potentials, dim=1)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


def test_the_sites_marginals_together_fill_every_prototype_equally():
    sizes = [30, 90, 60]
    parts = _scores(1, sum(sizes), 12).split(sizes)
    potentials = _negotiate(parts, 300)
    marginals = [site_marginal(part, potentials, epsilon=0.05) for part in parts]
    whole = sum(size / sum(sizes) * marginal for size, marginal in zip(sizes, marginals, strict=True))
    torch.testing.assert_close(whole, torch.full((12,), 1 / 12).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("prototypes", [2, 3, 7, 49, 64, 256, 1000, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_marginals_are_plain_swav_bit_for_bit(prototypes, dtype):
    scores = _scores(prototypes, 16, prototypes, dtype)
    equal = torch.full((prototypes,), 1.0 / prototypes, dtype=dtype)
    plain = sinkhorn(scores, epsilon=0.05, iterations=3)
    assert torch.equal(sinkhorn(scores, epsilon=0.05, iterations=3, marginal=equal), plain)


@pytest.mark.parametrize("method", ["contrastive_clustering", "swav", "hybrid"])
def test_the_loss_of_a_method_with_equal_marginals_is_that_without_bit_for_bit(method):
    more = ["method.classes=[0,1]", "method.base=swav"] if method == "hybrid" else []
    built = build_method(
        load(["data.root=.", "encoder=tiny", f"method={method}", *more, "heads.num_prototypes=8", "heads.width=8"])
    )
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(6, 1, 32, 32, generator=generator) for _ in range(2)]
    batch = ViewBatch(views, torch.zeros(2, 6, dtype=torch.long), torch.full((6,), -1))
    losses = []
    for marginal in (None, torch.full((8,), 0.125), torch.tensor([0.3] + [0.1] * 7)):
        built.marginal = marginal
        built.begin_round()
        losses.append(built.loss(batch).total.item())
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


@pytest.mark.parametrize("seed", range(3))
def test_sinkhorn_with_marginals_converges_to_the_transport_plan_of_pot(seed):
    scores = _scores(seed, 20, 6)
    marginal = torch.from_numpy(np.random.default_rng(seed).dirichlet(np.ones(6)))
    ours = sinkhorn(scores, epsilon=0.1, iterations=3000, marginal=marginal) / 20
    plan = ot.sinkhorn(np.full(20, 1 / 20), marginal.numpy(), -scores.numpy(), 0.1, numItermax=100_000, stopThr=1e-14)
    np.testing.assert_allclose(ours.numpy(), plan, atol=1e-8)


def test_a_site_with_20_of_64_clusters_no_longer_spreads_its_codes_over_what_it_does_not_have():
    generator = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(64, 64, generator=generator, dtype=torch.float64), dim=1)
    held = [torch.arange(20), torch.arange(20, 40), torch.arange(40, 64)]
    parts = []
    for modes in held:
        which = modes.repeat_interleave(20)
        noise = 0.05 * torch.randn(len(which), 64, generator=generator, dtype=torch.float64)
        parts.append(F.normalize(centres[which] + noise, dim=1) @ centres.T)
    elsewhere = torch.arange(20, 64)
    local = sinkhorn(parts[0], epsilon=0.05, iterations=100)
    marginal = site_marginal(parts[0], _negotiate(parts, 100), epsilon=0.05)
    with_marginal = sinkhorn(parts[0], epsilon=0.05, iterations=100, marginal=marginal)
    assert local[:, elsewhere].sum() / local.sum() > 0.6
    assert with_marginal[:, elsewhere].sum() / with_marginal.sum() < 0.1


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(2, 12))
@settings(deadline=None)
def test_balanced_marginals_fill_every_prototype_equally_whatever_the_sites_hold(seed, sites, prototypes):
    rng = np.random.default_rng(seed)
    mass = {f"s{number}": torch.from_numpy(rng.gamma(0.3, size=prototypes) + 1e-9) for number in range(sites)}
    images = {site: int(rng.integers(1, 1000)) for site in mass}
    shares = balance(mass, images)
    whole = sum(shares[site] * images[site] / sum(images.values()) for site in mass)
    np.testing.assert_allclose(whole.numpy(), np.full(prototypes, 1 / prototypes), atol=2e-3)
    assert all(bool((share > 0).all()) and float(share.sum()) == pytest.approx(1) for share in shares.values())
    turned = balance(dict(reversed(mass.items())), images)
    assert all(torch.equal(turned[site], shares[site]) for site in mass)


def test_balance_gives_a_prototype_to_the_site_that_has_it():
    mass = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0, 1.0])}
    shares = balance(mass, {"a": 10, "b": 10})
    assert shares["a"][0] > 0.9
    assert shares["b"][1] > 0.9
    alone = balance({"a": torch.tensor([1.0, 0.0])}, {"a": 10})
    torch.testing.assert_close(alone["a"], torch.tensor([0.5, 0.5]).double())


@pytest.mark.parametrize("overrides", [["method=simclr"], ["method.modalities=per-modality"]])
def test_marginals_are_refused_where_there_is_no_one_equipartition_of_all_images(overrides):
    with pytest.raises(ConfigError, match=r"federation\.equipartition needs prototypes"):
        check_settings(load(["data.root=.", "encoder=tiny", "federation.equipartition=site-marginals", *overrides]))
