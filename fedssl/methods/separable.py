"""Methods whose loss is a sum over patients: the only ones for which clipping bounds what one patient can change.

A term of such a sum sees one patient's views and what was released before. In-batch Sinkhorn, NT-Xent, Barlow Twins'
correlation, queues and BatchNorm make every patient's gradient depend on the others; then clipping bounds nothing.
"""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from fedssl.errors import ConfigError
from fedssl.methods.base import Method

Points = Sequence[Float[Tensor, "images width"]]
_PROBE_ROWS, _SAME = 4, 1e-4


class SeparableMethod(Method):
    """A method that training can ask patient by patient.

    Attributes:
        highest_loss: the loss is clipped to 0 .. this where it is reported under differential privacy.
        num_votes: length of a vote; 0: the method takes none.
        vote_bound: largest L2 norm of a vote (S).
    """

    highest_loss: float = 1.0
    num_votes: int = 0
    vote_bound: float = 1.0

    @abstractmethod
    def points(self, view: Float[Tensor, "rows channels edge edge"]) -> Float[Tensor, "rows width"]:
        """Map rows to points, each row by itself."""

    @abstractmethod
    def patient_loss(self, points: Points, present: Bool[Tensor, " images"]) -> Float[Tensor, ""]:
        """Mean loss of one patient's images.

        Args:
            points: of each view, a row an image.
            present: which rows are images; the others fill up.
        """

    def vote(  # a method that takes votes overrides it
        self,
        points: Points,  # noqa: ARG002
        present: Bool[Tensor, " images"],  # noqa: ARG002
    ) -> Float[Tensor, " votes"]:
        """Say what one patient wants changed in the released state before the loss; L2 norm at most ``vote_bound``.

        Of a method with prototypes the first K numbers are their shares of the patient, less 1 / K.
        """
        raise TypeError(f"{type(self).__name__} takes no votes")

    def take_votes(self, mean: Float[Tensor, " votes"]) -> None:
        """Change the released state by the mean vote."""

    def calibrate(self, images: Float[Tensor, "rows channels edge edge"]) -> None:
        """Get ready for the first round of a federation with public images, once, at the server."""

    def embed(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Map the views of some images to points, running the network once for each size of view."""
        found: dict[int, Tensor] = {}
        for edge in sorted({view.shape[-1] for view in views}):
            members = [number for number, view in enumerate(views) if view.shape[-1] == edge]
            joined = self.points(torch.cat([views[number] for number in members]))
            found.update(zip(members, joined.chunk(len(members)), strict=True))
        return [found[number] for number in range(len(views))]


def require_separable(method: Method, *, in_chans: int, edge: int) -> SeparableMethod:
    """Refuse a method, or a network, in which one patient's gradient depends on others.

    Raises:
        ConfigError: says why, and what to use instead.
    """
    if not isinstance(method, SeparableMethod):
        raise ConfigError(
            f"privacy=patient refuses this method: {method.couples}. Clipping would not bound what one patient "
            "changes, and epsilon would not be true. Use method=private_clustering, or method=byol method.norm=layer."
        )
    for name, module in method.named_modules():
        if isinstance(module, _BatchNorm) or (isinstance(module, _InstanceNorm) and module.track_running_stats):
            raise ConfigError(
                f"privacy=patient refuses {type(module).__name__} ({name}): it normalises each image by the others of "
                "the batch. Use encoder.norm=group, and method.norm=layer where a method has that setting."
            )
        if (isinstance(module, _DropoutNd) and module.p > 0) or getattr(module, "drop_prob", 0.0) > 0:
            raise ConfigError(
                f"privacy=patient refuses {type(module).__name__} ({name}): its mask follows a seed, and who else is "
                "in the batch shifts it. Leave out encoder.options.drop_rate, proj_drop_rate and drop_path_rate."
            )
    _probe(method, in_chans, edge)
    return method


@torch.no_grad()
def _probe(method: SeparableMethod, in_chans: int, edge: int) -> None:
    """Refuse a network in which other rows change a row's point, whatever its layers are called.

    Raises:
        ConfigError: they do.
    """
    weight = next(method.parameters())
    rows = torch.randn(_PROBE_ROWS, in_chans, edge, edge, generator=torch.Generator().manual_seed(0)).to(weight.device)
    others = torch.cat([rows[:1], -3.0 * rows[1:]])
    training, coupled = method.training, False
    for mode in (True, False):
        first, second = method.train(mode).points(rows)[0], method.points(others)[0]
        coupled |= not bool((first - second).abs().max() <= _SAME * first.abs().max().clamp_min(_SAME))
    method.train(training)
    if coupled:
        raise ConfigError(
            "privacy=patient refuses this encoder: what it makes of an image depends on the other images of the batch. "
            "Choose another encoder, or encoder.norm=group."
        )
