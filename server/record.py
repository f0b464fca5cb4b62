"""What a finished round leaves behind: checkpoint, metrics, TensorBoard events, an alarm if a site has collapsed."""

from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from fedssl import progress
from fedssl.checkpoint import Checkpoint
from fedssl.run_folder import RunFolder
from server.rounds import RoundResult


class Recorder:
    """Writes each round to the run folder.

    Args:
        folder: the run's.
        checkpoint: where the run stands.
        rounds: of the whole federation.
    """

    def __init__(self, folder: RunFolder, checkpoint: Checkpoint, *, rounds: int) -> None:
        self.folder = folder
        self.checkpoint = checkpoint
        self.rounds = rounds
        self.collapsed: set[str] = set()
        self.board = _tensorboard(folder, checkpoint.round)

    def __enter__(self) -> Self:
        """Return the recorder."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the TensorBoard file."""
        if self.board is not None:
            self.board.close()

    def record(self, result: RoundResult) -> None:
        """Write metrics, then the checkpoint: a resumed run drops metrics that have no checkpoint."""
        weights = {site: metrics["images"] for site, metrics in result.metrics.items()}
        loss = sum(result.metrics[site]["loss"] * weight for site, weight in weights.items()) / sum(weights.values())
        for site, metrics in result.metrics.items():
            self.folder.record_site(result.number, site, metrics)
        row: dict[str, Any] = {
            "round": result.number,
            "train/loss": loss,
            "ssl/prototype_agreement": result.agreement,
            "ssl/collapse": result.signs,
            "ssl/reseeded": result.reseeded,
            "ssl/contrast": result.contrast,
            "ssl/usage": result.usage,
            "federation/sites": sorted(result.metrics),
            "federation/failed": result.failed,
            "comm/bytes_up": result.bytes_up,
            "comm/bytes_down": result.bytes_down,
        }
        self.folder.record_round(row)
        self._draw(result, loss)
        best = self.checkpoint.best_loss is None or loss < self.checkpoint.best_loss
        self.checkpoint = replace(
            self.checkpoint,
            state=result.state,
            round=result.number,
            best_loss=self._best_loss(result, loss),
            images_seen=self.checkpoint.images_seen + int(sum(weights.values())),
            sites=sorted(result.metrics),
            contrast=result.contrast,
        )
        self.folder.save(self.checkpoint, best=best)
        self._alarm(result.number, result.signs)

    def _best_loss(self, result: RoundResult, loss: float) -> float | None:
        """Lowest loss so far; None when the next round weighs its terms anew, since losses then do not compare."""
        if result.contrast != self.checkpoint.contrast:
            return None
        known = self.checkpoint.best_loss
        return loss if known is None else min(known, loss)

    def _alarm(self, number: int, signs: dict[str, list[str]]) -> None:
        """Say it loudly when a site collapses, and again in the last round; the metrics keep every round."""
        for site, sentences in signs.items():
            if site not in self.collapsed or number == self.rounds:
                text = f"COLLAPSE at site {site}, round {number}: {'; '.join(sentences)}."
                progress.publish(progress.Note(text, alarm=True))
        self.collapsed = set(signs)

    def _draw(self, result: RoundResult, loss: float) -> None:
        if self.board is None:
            return
        self.board.add_scalar("train/loss", loss, result.number)
        for site, metrics in result.metrics.items():
            for name, value in metrics.items():
                self.board.add_scalar(f"site/{site}/{name}", value, result.number)
        self.board.flush()


def _tensorboard(folder: RunFolder, done: int) -> Any:  # noqa: ANN401 - an optional library
    """Open the TensorBoard writer, without the events of rounds that were not finished; None if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        progress.publish(progress.Note("TensorBoard events are off: pip install 'fedssl[tracking]' turns them on."))
        return None
    return SummaryWriter(str(folder.path / "tensorboard"), purge_step=done + 1 if done else None)
