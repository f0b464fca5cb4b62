"""Two computations of one loss have one value and one gradient: what the tests of losses share."""

import pytest
import torch

from fedssl.data.batches import ViewBatch
from fedssl.data.modality import MODALITIES
from fedssl.encoders import build_encoder

in_both_precisions = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])


def draw(seed, *shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def assert_same(ours, reference, inputs, tolerance):
    """The two functions of the inputs have one value and one gradient."""
    results = []
    for function in (ours, reference):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        value = function(*leaves)
        results.append([value, *torch.autograd.grad(value, leaves, materialize_grads=True)])
    for own, other in zip(*results, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=tolerance)


def assert_same_training(method, total, reference, tolerance):
    """One value, and one gradient of all weights measured against the largest (about 10); returns the gradient."""
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    torch.testing.assert_close(total, reference, rtol=0, atol=tolerance)
    gradients, expected = (torch.autograd.grad(value, trained, materialize_grads=True) for value in (total, reference))
    largest = max(1.0, *(gradient.abs().max().item() for gradient in expected))
    for own, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=tolerance * largest)
    return list(zip(trained, gradients, strict=True))


def small_encoder():
    return build_encoder("test_resnet", norm_groups=16, seed=0)


def make_batch(seed, dtype, local_views=0, batch=4):
    views = draw(seed, *[(batch, 1, 32, 32)] * 2, *[(batch, 1, 16, 16)] * local_views, dtype=dtype)
    modality = torch.randint(len(MODALITIES), (2, batch), generator=torch.Generator().manual_seed(seed))
    return ViewBatch(views, modality, torch.full((batch,), -1))


def project_by_hand(encoder, head, views):
    """Projections of each view: the encoder sees one size at a time, BatchNorm in the head all views together."""
    features = [encoder(torch.cat(list(part))) for part in (views[:2], views[2:]) if part]
    return head(torch.cat(features)).chunk(len(views))


def move(network, seed):
    for weight in network.parameters():
        weight.data += 0.1 * draw(seed, weight.shape, dtype=weight.dtype)[0]


def follow_by_hand(slow, online, momentum):
    for old, new in zip(slow.parameters(), online.parameters(), strict=True):
        old.data = momentum * old.data + (1 - momentum) * new.data
