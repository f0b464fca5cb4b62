"""A first-in, first-out memory of embeddings. It is made of patients' images: buffers never leave a site."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Queue(nn.Module):
    """The last rows that were added.

    Args:
        length: rows kept.
        width: of a row.
    """

    rows: Tensor

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(length, width), persistent=False)
        self.filled = 0
        self.next = 0

    def clear(self) -> None:
        """Forget everything."""
        self.filled = self.next = 0

    def held(self) -> Float[Tensor, "held width"]:
        """Return a copy of the rows that are held, in no particular order."""
        return self.rows[: self.filled].clone()

    @torch.no_grad()
    def add(self, rows: Float[Tensor, "added width"]) -> None:
        """Add rows in the place of the oldest; of more than fit, the last ones."""
        length = len(self.rows)
        rows = rows[-length:] if length else rows[:0]
        places = (torch.arange(len(rows), device=self.rows.device) + self.next) % max(length, 1)
        self.rows[places] = rows.to(self.rows.dtype)
        self.next = (self.next + len(rows)) % max(length, 1)
        self.filled = min(length, self.filled + len(rows))
