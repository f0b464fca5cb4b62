"""What every method is: an encoder with heads, a loss of views, and the list of what it may share."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedssl.data.batches import ViewBatch
from fedssl.encoders import feature_width
from fedssl.errors import ConfigError
from fedssl.prototypes import Clusters

PROTOTYPES = "prototypes"
_NORMS: Mapping[str, Callable[[int], list[nn.Module]]] = {
    "batch": lambda width: [nn.BatchNorm1d(width, track_running_stats=False)],
    "layer": lambda width: [nn.LayerNorm(width)],
    "none": lambda _: [],
}


@dataclass(frozen=True)
class Loss:
    """A loss whose terms have names.

    Attributes:
        total: the weighted sum, with gradient.
        terms: each term, detached; the names that the method declares.
        clusters: what the batch says of the clusters; None for methods without prototypes.
    """

    total: Float[Tensor, ""]
    terms: Mapping[str, Tensor]
    clusters: Clusters | None = None


class Method(nn.Module, ABC):
    """An encoder in training. Subclasses compute ``loss`` with free functions.

    A target network or a queue lives for one round: ``begin_round`` makes it anew from the shared weights.

    Attributes:
        shared: names, or starts of names, of the parameters that may leave the site. Buffers never leave: queues,
            momentum copies and BatchNorm statistics are made of patients' images.
        terms: names of the loss's terms; their means over a round leave the site.
        classes: names of the labels that the method learns from; none for a self-supervised method.
        contrast: factor of a contrastive term, raised by the server against collapse; 1 is plain.
        weighs_contrast: whether the loss has a contrastive term beside others, to which ``contrast`` applies.
        num_blocks: groups of prototypes, equal in size and in order, that do not compete with each other.
        equipartitions: whether all images of a batch share one equipartition, with ``epsilon`` and ``marginal``.
        epsilon: entropy of its codes.
        marginal: share of the site's samples that each prototype shall hold; None: equal shares.
        couples: why the loss is no sum over patients, for methods that are none; they have no private training.
    """

    couples: str = "its loss is not written as a sum over patients (fedssl.methods.separable)"
    shared: tuple[str, ...] = ("encoder.",)
    terms: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    contrast: float = 1.0
    weighs_contrast: bool = False
    num_blocks: int = 1
    epsilon: float = 0.05
    equipartitions: bool = False
    marginal: Float[Tensor, " prototypes"] | None = None

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    @abstractmethod
    def loss(self, batch: ViewBatch) -> Loss:
        """Compute the loss of one batch from its views; the first two are the pair that is compared."""

    def begin_round(self) -> None:
        """Forget what the last round left: it is stale beside the weights that have just arrived."""

    def begin_step(self, progress: float) -> None:
        """Get ready for a step; ``progress`` is the share of the federation's steps that is done, 0 to 1."""

    def after_step(self) -> None:
        """Restore what an optimiser step must not change, such as the length of prototypes."""

    def prototype_scores(  # a method with prototypes overrides it
        self,
        features: Float[Tensor, "batch width"],  # noqa: ARG002
    ) -> Float[Tensor, "batch prototypes"]:
        """Return the similarity of features to each prototype; only for methods with prototypes."""
        raise TypeError(f"{type(self).__name__} has no prototypes")

    @property
    def num_prototypes(self) -> int:
        """K, or 0 for a method without prototypes."""
        prototypes = dict(self.named_parameters()).get(PROTOTYPES)
        return 0 if prototypes is None else len(prototypes)

    @property
    def width(self) -> int:
        """Width of the encoder's features."""
        return feature_width(self.encoder)


def require(**settings: tuple[float, bool]) -> None:
    """Refuse settings of a method that make no sense: ``require(temperature=(temperature, temperature > 0))``.

    Raises:
        ConfigError: names all that do not hold.
    """
    wrong = [f"method.{name}={value}" for name, (value, holds) in settings.items() if not holds]
    if wrong:
        raise ConfigError(f"{', '.join(wrong)} makes no sense. What each setting means stands in configs/method.")


def encode(encoder: nn.Module, views: Sequence[Tensor]) -> list[Tensor]:
    """Run the encoder once for each size of view; returns features [batch, width] of each view in order."""
    features: dict[int, Tensor] = {}
    for edge in sorted({view.shape[-1] for view in views}):
        members = [number for number, view in enumerate(views) if view.shape[-1] == edge]
        joined = encoder(torch.cat([views[number] for number in members]))
        features.update(zip(members, joined.chunk(len(members)), strict=True))
    return [features[number] for number in range(len(views))]


def project(encoder: nn.Module, head: nn.Module, views: Sequence[Tensor]) -> list[Tensor]:
    """Run encoder and head; returns float32 (or better) projections [batch, width] of each view in order.

    BatchNorm in the head normalises by all views of the batch together.
    """
    projections = head(torch.cat(encode(encoder, views)))
    return list((projections if projections.dtype == torch.float64 else projections.float()).chunk(len(views)))


@contextmanager
def full_precision(example: Tensor) -> Iterator[None]:
    """Switch mixed precision off on a tensor's device: similarities need float32."""
    with torch.autocast(example.device.type, enabled=False):
        yield


def projector(widths: Sequence[int], *, norm: str = "batch") -> nn.Sequential:
    """Make an MLP head with BatchNorm between its layers (SimCLR, section 4.2), LayerNorm or none (MoCo v2).

    BatchNorm always normalises by the batch and keeps no running statistics: there are none that could leave the site.

    Args:
        widths: of the input and of each layer.
        norm: ``batch``, ``layer`` (each image by itself) or ``none``.
    """
    require(**{"hidden or width": (min(widths), min(widths) >= 1)})
    if norm not in _NORMS:
        raise ConfigError(f"method.norm={norm} does not exist; there are {', '.join(_NORMS)}.")
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths[:-1]):
        layers += [nn.Linear(before, after, bias=norm != "batch"), *_NORMS[norm](after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))
