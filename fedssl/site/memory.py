"""What a site keeps of a run on its own disk from round to round: optimiser, own weights, scores of its images."""

import contextlib
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from jaxtyping import Bool, Float
from torch import Tensor

from fedssl.checkpoint import load_tensors, save_tensors
from fedssl.errors import DataError
from fedssl.order import Order
from fedssl.update import Update

_FORGET_AFTER_S = 14 * 24 * 3600.0
_RUN_NAME = re.compile(r"[0-9a-f]{8,64}")
_WHAT = "the site's state"
Scores = Float[Tensor, "images prototypes"]


@dataclass(frozen=True)
class Remembered:
    """A site's state after a round.

    Attributes:
        optimizer: tensors of its optimiser.
        own: shared state with which it ended the round, before anything was withheld; empty where no rule needs it.
        scale: number that its local rule remembers, or None.
    """

    optimizer: Mapping[str, Tensor]
    own: Mapping[str, Tensor]
    scale: float | None


class SiteMemory:
    """Files of one site: ``RUN/SITE/round_00001.safetensors``.

    Args:
        folder: of all runs.
        site: name of the site.
    """

    def __init__(self, folder: Path, site: str) -> None:
        self.folder = folder
        self.site = site

    def recall(self, order: Order) -> Remembered | None:
        """Read what was remembered after the last round that counted; None if there is nothing.

        Raises:
            DataError: the file is damaged.
        """
        path = self._file(order.run, f"round_{order.last:05d}")
        if order.last == 0 or not path.exists():
            return None
        tensors, facts = load_tensors(path)
        parts = {
            room: {name.removeprefix(f"{room}/"): value for name, value in tensors.items() if name.startswith(room)}
            for room in ("optimizer", "own")
        }
        return Remembered(parts["optimizer"], parts["own"], facts["scale"])

    def remember(self, order: Order, state: Remembered) -> None:
        """Keep this round's state and the one that it began with, which a resumed server may ask for again."""
        tensors = {f"optimizer/{name}": value for name, value in state.optimizer.items()}
        tensors |= {f"own/{name}": value for name, value in state.own.items()}
        kept = {self._file(order.run, f"round_{number:05d}") for number in (order.last, order.number)}
        kept.add(self._file(order.run, f"scores_{order.number:05d}"))  # who is killed before it answers is asked again
        path = self._file(order.run, f"round_{order.number:05d}")
        save_tensors(path, tensors, {"round": order.number, "scale": state.scale}, _WHAT)
        for other in path.parent.iterdir():  # older rounds, scores, and what a killed process was writing
            if other not in kept:
                other.unlink(missing_ok=True)
        self._forget(order.run)

    def keep_answer(self, order: Order, received: str, update: Update) -> None:
        """Keep the answer to a round, so that the same question gets the same bits; ``received``: state's digest."""
        tensors = {f"state/{name}": value for name, value in update.state.items()}
        counts = {"mass": update.mass, "usage": update.usage}
        tensors |= {f"counts/{name}": value for name, value in counts.items() if value is not None}
        facts = {
            "received": received, "order": asdict(replace(order, ledger="")), "site": update.site,
            "examples": update.examples, "steps": update.steps, "metrics": dict(update.metrics),
            "independent": update.independent, "names": list(update.state),
        }  # fmt: skip
        save_tensors(self._file(order.run, f"answer_{order.number:05d}"), tensors, facts, _WHAT)

    def recall_answer(self, order: Order, received: str) -> Update | None:
        """Give the answer that was kept for the same question; None if there is none.

        Raises:
            DataError: the file is damaged.
        """
        path = self._file(order.run, f"answer_{order.number:05d}")
        if not path.exists():
            return None
        tensors, facts = load_tensors(path)
        if facts["received"] != received or facts["order"] != asdict(replace(order, ledger="")):
            return None
        rooms = {
            room: {
                name.removeprefix(f"{room}/"): value for name, value in tensors.items() if name.startswith(f"{room}/")
            }
            for room in ("state", "counts")
        }
        state = {name: rooms["state"][name] for name in facts.get("names", rooms["state"])}
        return Update(
            facts["site"], state, facts["examples"], facts["steps"], rooms["counts"].get("mass"),
            rooms["counts"].get("usage"), facts["metrics"], independent=facts.get("independent", False),
        )  # fmt: skip

    def keep_scores(self, order: Order, scores: Scores, released: Bool[Tensor, " prototypes"]) -> None:
        """Keep the scores of this round's images until the round is over, and which prototypes have support."""
        tensors = {"scores": scores, "released": released}
        save_tensors(self._file(order.run, f"scores_{order.number:05d}"), tensors, {}, _WHAT)

    def scores(self, order: Order) -> tuple[Scores, Bool[Tensor, " prototypes"]]:
        """Read what ``keep_scores`` kept, the scores in float64.

        Raises:
            DataError: it is not there.
        """
        path = self._file(order.run, f"scores_{order.number:05d}")
        if not path.exists():
            raise DataError("has no scores of this round: it was never asked for them, or its disk was emptied")
        tensors = load_tensors(path)[0]
        return tensors["scores"].double(), tensors["released"]

    def _file(self, run: str, name: str) -> Path:
        if not _RUN_NAME.fullmatch(run):  # it becomes a folder name: never trust what came by wire
            raise DataError("was sent a run name that is no hexadecimal number; the server is not a fedssl server")
        return self.folder / run / self.site / f"{name}.safetensors"

    def _forget(self, run: str) -> None:
        """Remove the runs that nobody has touched for two weeks."""
        for other in self.folder.iterdir():
            if other.name == run:
                continue
            with contextlib.suppress(FileNotFoundError):  # another site's process works there
                newest = max((path.stat().st_mtime for path in other.rglob("*")), default=0.0)
                if time.time() - newest > _FORGET_AFTER_S:
                    shutil.rmtree(other, ignore_errors=True)
