"""What an encoder makes of images: how alike views of one image are, features, and cosines to prototypes.

A head may hold BatchNorm, which normalises by the batch. So images are mixed by a seed before they are shown in
batches: those that trained and those that did not share every batch, and every encoder sees the same ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedssl import progress
from fedssl.augment import Views, centre_view
from fedssl.data.batches import ImageBatch, image_batch
from fedssl.data.cache import Subset
from fedssl.data.modality import modality_groups
from fedssl.evaluation.leakage.membership import agreement
from fedssl.methods.base import Method

VIEWS = 8  # of each image
FEATURES, PROJECTIONS = "features", "projections"
_BATCH = 256


def head_of(method: Method) -> nn.Module | None:
    """Find the projector of a method, or of the method that it is built on."""
    head = getattr(method, "projector", None) or getattr(getattr(method, "base", None), "projector", None)
    return head if isinstance(head, nn.Module) else None


@torch.no_grad()
def view_agreement(
    method: Method, images: Subset, views: Views, *, seed: int, count: int = VIEWS
) -> Mapping[str, Float[np.ndarray, " images"]]:
    """Agreement of views of each image, by what is compared: ``features``, and ``projections`` of a method with a head.

    Points are taken from the mean of the batch.

    Args:
        method: trained or not; left in inference mode.
        images: of all patients that are compared.
        views: the run's own; those of the first scale are made.
        seed: of views and of the order; equal seeds show equal views to every encoder.
        count: views of each image.
    """
    method.eval()
    head = head_of(method)
    single = replace(views, scales=[replace(views.scales[0], count=1)])
    order = np.random.default_rng(seed).permutation(len(images))
    found = {name: np.empty(len(images)) for name in (FEATURES, PROJECTIONS)[: 1 if head is None else 2]}
    device, done = next(method.parameters()).device, 0
    generator = torch.Generator(device).manual_seed(seed)
    for places in np.array_split(order, -(-len(images) // _BATCH)):
        batch = _batch(images, places).to(device)
        features = [method.encoder(single(batch, generator).views[0]).float() for _ in range(count)]
        found[FEATURES][places] = agreement(_centred(features))
        if head is not None:
            found[PROJECTIONS][places] = agreement(_centred(head(torch.cat(features)).float().chunk(count)))
        done += len(places)
        progress.publish(progress.Done("comparing views", done, len(images)))
    return found


def _batch(images: Subset, places: np.ndarray) -> ImageBatch:
    groups = torch.from_numpy(modality_groups(images.column("modality")[places].tolist()))
    return replace(image_batch(images.read(places)), modality=groups)


def _centred(views: Sequence[Tensor]) -> Float[np.ndarray, "images views width"]:
    """Take away the mean of the batch, which all images share: features after a ReLU agree to .99 by it alone."""
    points = torch.stack(list(views), 1).cpu().numpy()
    return points - points.mean((0, 1))


@torch.no_grad()
def features_of(method: Method, images: Subset, *, edge: int) -> Float[np.ndarray, "images width"]:
    """Features of whole images, without augmentation."""
    method.eval()
    device, parts = next(method.parameters()).device, []
    for places in np.array_split(np.arange(len(images)), -(-len(images) // _BATCH)):
        shown = image_batch(images.read(places)).shown().to(device)
        parts.append(method.encoder(centre_view(shown, edge=edge)).float().cpu())
    return torch.cat(parts).numpy()


@torch.no_grad()
def prototype_cosines(
    method: Method, features: Float[np.ndarray, "images width"]
) -> Float[np.ndarray, "images prototypes"]:
    """Cosines between the projections of images, all in one batch, and each prototype."""
    method.eval()
    device = next(method.parameters()).device
    return method.prototype_scores(torch.from_numpy(features).to(device)).float().cpu().numpy()
