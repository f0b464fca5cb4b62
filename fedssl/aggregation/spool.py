"""The states of a round's sites on disk: for rules that need all of them at once and a memory that does not grow.

The file has no name, only its owner can open it, and the system deletes it when it is dropped or the process dies. It
lies in the folder for temporary files (TMPDIR); where that is memory (tmpfs), name another.
"""

import errno
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fedssl.aggregation.base import Aggregator, State
from fedssl.errors import FederationError, StorageError

BLOCK = 2**22  # numbers read at once, of all sites together: 32 MiB in float64
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Spool:
    """States of equal layout, one after another: float32, or float64 if any tensor is.

    Attributes:
        sites: how many states it holds.

    Raises:
        StorageError: there is no folder for temporary files.
    """

    def __init__(self) -> None:
        self.sites = 0
        self._names: list[str] = []
        self._width = 0
        self._dtype = torch.float32
        try:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed when the spool is dropped
        except OSError as error:
            raise _explained(error) from error
        weakref.finalize(self, self._file.close)

    def add(self, state: State) -> None:
        """Write one site's state; its names and shapes are those of the states before.

        Raises:
            StorageError: the disk is full.
        """
        if not self.sites:
            self._names = sorted(state)
            self._width = sum(value.numel() for value in state.values())
            wide = any(value.dtype == torch.float64 for value in state.values())
            self._dtype = torch.float64 if wide else torch.float32
        try:
            self._file.seek(self._place(self.sites, 0))
            for name in self._names:
                self._write(state[name])
        except OSError as error:
            raise _explained(error) from error
        assert self._file.tell() == self._place(self.sites + 1, 0)
        self.sites += 1

    def blocks(self, sites: Sequence[int] | None = None) -> Iterator[Float[Tensor, "sites columns"]]:
        """Read the flat states column by column, in float64.

        Args:
            sites: which states, numbered in the order in which they were added; None: all.

        Raises:
            StorageError: the file cannot be read.
        """
        chosen = range(self.sites) if sites is None else sites
        columns = max(1, BLOCK // max(1, len(chosen)))
        for first in range(0, self._width, columns):
            block = torch.empty(len(chosen), min(columns, self._width - first), dtype=self._dtype)
            for row, site in zip(block, chosen, strict=True):
                self._read(row, self._place(site, first))
            yield block.double()

    def combine(
        self,
        rule: Callable[[Float[Tensor, "sites columns"]], Float[Tensor, " columns"]],
        reference: State,
        sites: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """Apply a rule to every block of columns.

        Args:
            rule: makes one row of several.
            reference: gives the shapes and dtypes of the result.
            sites: as in ``blocks``.

        Raises:
            StorageError: the file cannot be read.
        """
        flat = torch.empty(self._width, dtype=torch.float64)
        done = 0
        for block in self.blocks(sites):
            flat[done : done + block.shape[1]] = rule(block)
            done += block.shape[1]
        parts = flat.split([reference[name].numel() for name in self._names])
        values = dict(zip(self._names, parts, strict=True))
        return {
            name: values[name].reshape(like.shape).to(like.dtype, copy=True)  # a view would keep all of ``flat``
            for name, like in reference.items()
        }

    def _place(self, site: int, column: int) -> int:
        """Count the bytes before a column of a site."""
        return (site * self._width + column) * self._dtype.itemsize

    def _write(self, value: Tensor) -> None:
        rest = _bytes(value.detach().to(self._dtype).reshape(-1))
        while rest:
            rest = rest[self._file.write(rest) :]

    def _read(self, row: Float[Tensor, " columns"], place: int) -> None:
        rest = _bytes(row)
        try:
            self._file.seek(place)
            while rest:
                count = self._file.readinto(rest)
                if not count:
                    raise OSError(errno.EIO, "the file is shorter than what was written")
                rest = rest[count:]
        except OSError as error:
            raise _explained(error) from error


class Gathering(Aggregator):
    """What robust rules have in common: they need all states at once, and count all sites the same."""

    robust = True

    def start(self) -> Spool:
        """Begin with an empty spool."""
        return Spool()

    def fold(self, total: Spool, state: State, reference: State, *, examples: int, steps: int) -> None:  # noqa: ARG002
        """Keep one site's state until all are there."""
        total.add(state)

    def require(self, total: Spool, what: str, remedy: str) -> None:
        """Refuse to combine too few states.

        Raises:
            FederationError: says how many answered, how many ``what`` needs, and the remedy.
        """
        if total.sites < self.least_sites:
            raise FederationError(f"{total.sites} sites answered well, and {what} needs {self.least_sites}. {remedy}")


def _bytes(flat: Float[Tensor, " columns"]) -> memoryview:
    """View a tensor's memory."""
    return flat.numpy().data.cast("B") if len(flat) else memoryview(b"")


def _explained(error: OSError) -> StorageError:
    if error.errno in _FULL:
        return StorageError(
            "The disk is full: the sites' states of this round could not be kept until all have answered. Free space, "
            "or choose another disk with the environment variable TMPDIR=FOLDER, and run the command again."
        )
    return StorageError(
        f"The sites' states of this round could not be kept on the disk ({error.strerror}). Check the folder for "
        "temporary files, or choose another with the environment variable TMPDIR=FOLDER."
    )
