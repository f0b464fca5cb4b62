"""What a finished round leaves behind: checkpoint, metrics, TensorBoard events, an alarm if a site has collapsed."""

import statistics
from dataclasses import replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from fedssl import progress
from fedssl.checkpoint import Checkpoint
from fedssl.run_folder import RunFolder
from server.rounds import RoundResult

_DRIFT = 0.7  # mean length of averaged prototypes before renormalising


class Recorder:
    """Writes each round to the run folder.

    Args:
        folder: the run's.
        checkpoint: where the run stands.
        rounds: of the whole federation.
        robust: counts are not trusted, and neither is one site's loss.
    """

    def __init__(self, folder: RunFolder, checkpoint: Checkpoint, *, rounds: int, robust: bool = False) -> None:
        self.folder = folder
        self.checkpoint = checkpoint
        self.rounds = rounds
        self.robust = robust
        self.drifting = False
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
        loss = self._loss(result)
        for site, metrics in result.metrics.items():
            drift = {"change": result.change[site], "cosine": result.cosine[site]}
            self.folder.record_site(result.number, site, {**metrics, **drift})
        row: dict[str, Any] = {
            "round": result.number,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "train/loss": loss,
            "ssl/prototype_agreement": result.agreement,
            "ssl/collapse": result.signs,
            "ssl/reseeded": result.reseeded,
            "ssl/contrast": result.contrast,
            "ssl/usage": result.usage,
            "ssl/site_nmi": result.site_nmi,
            "federation/sites": sorted(result.metrics),
            "federation/failed": result.failed,
            "federation/absent": result.absent,
            "privacy/epsilon": {site: m["epsilon"] for site, m in result.metrics.items() if "epsilon" in m},
            "comm/bytes_up": result.bytes_up,
            "comm/bytes_down": result.bytes_down,
        }
        self.folder.record_round(row)
        self._draw(result, loss)
        known = self.checkpoint
        best = known.best_loss is None or loss < known.best_loss
        best_round = result.number if best else known.best_round
        comparable = result.contrast == known.contrast  # else the next round weighs its terms anew
        self.checkpoint = replace(
            known,
            state=result.state,
            memory=result.memory,
            mass=result.mass,
            answered=result.answered,
            ledgers=result.ledgers,
            usual_change=result.usual_change,
            round=result.number,
            best_loss=min(loss, known.best_loss if known.best_loss is not None else loss) if comparable else None,
            best_round=best_round,
            images_seen=known.images_seen + int(sum(metrics["images"] for metrics in result.metrics.values())),
            sites=sorted(result.metrics),
            contrast=result.contrast,
        )
        self.folder.save(self.checkpoint, best=best)
        self._alarm(result)

    def _loss(self, result: RoundResult) -> float:
        """Mean of the sites' losses, weighted by their images; their median where claims are not trusted."""
        losses = {site: metrics["loss"] for site, metrics in result.metrics.items()}
        if self.robust:
            return statistics.median(losses.values())
        return sum(losses[site] * count for site, count in result.examples.items()) / sum(result.examples.values())

    def _alarm(self, result: RoundResult) -> None:
        """Say loudly when a site collapses or prototypes drift apart, and again in the last round; never each round."""
        last = result.number == self.rounds
        for site, sentences in result.signs.items():
            if site not in self.collapsed or last:
                text = f"COLLAPSE at site {site}, round {result.number}: {'; '.join(sentences)}."
                progress.publish(progress.Note(text, alarm=True))
        self.collapsed = set(result.signs)
        drifting = result.agreement is not None and result.agreement < _DRIFT
        if drifting and (last or not self.drifting):
            text = (
                f"DRIFT in round {result.number}: the sites' prototypes agree to {result.agreement:.2f} (1 is full "
                f"agreement, below {_DRIFT} they stand for different clusters). Shorten the rounds "
                "(training.local_epochs), or lower optim.lr."
            )
            progress.publish(progress.Note(text, alarm=True))
        self.drifting = drifting

    def _draw(self, result: RoundResult, loss: float) -> None:
        if self.board is None:
            return
        self.board.add_scalar("train/loss", loss, result.number)
        whole = {"ssl/prototype_agreement": result.agreement, "ssl/site_nmi": result.site_nmi}
        for name, figure in whole.items():
            if figure is not None:
                self.board.add_scalar(name, figure, result.number)
        for site, metrics in result.metrics.items():
            figures = {**metrics, "change": result.change[site], "cosine": result.cosine[site]}
            for name, value in figures.items():
                self.board.add_scalar(f"site/{site}/{name}", value, result.number)
        self.board.flush()


def _tensorboard(folder: RunFolder, done: int) -> Any:  # noqa: ANN401 - an optional library
    """Open the TensorBoard writer, without the events of rounds that were not finished; None if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        progress.publish(progress.Note("TensorBoard events are off: pip install 'fedssl[tracking]' turns them on."))
        return None
    return SummaryWriter(str(folder.path / "tensorboard"), purge_step=done + 1)
