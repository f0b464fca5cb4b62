"""How long a round of local training lasts: a number of batches, or a number of seconds."""

import time
from collections.abc import Iterator

from fedssl.data.batches import Batches, ImageBatch

_NOTICE_EVERY_S = 0.5


class Clock:
    """Seconds spent waiting for data and seconds since the start."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.waited = 0.0
        self.noticed = 0.0

    def wait_for(self, batches: Batches) -> Iterator[ImageBatch]:
        """Give the batches and count the time until each one is there."""
        stream = iter(batches)
        while True:
            before = time.perf_counter()
            batch = next(stream, None)
            self.waited += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    @property
    def elapsed(self) -> float:
        """Seconds since the start, above 0."""
        return max(time.perf_counter() - self.start, 1e-9)

    def due(self) -> bool:
        """Tell, at most every half second, that it is time for a notice."""
        if self.elapsed - self.noticed < _NOTICE_EVERY_S:
            return False
        self.noticed = self.elapsed
        return True

    def expected(self, step: int, batches: Batches, seconds: float | None) -> int:
        """Guess the steps of the round after ``step`` of them; known where no time is given."""
        return len(batches) if seconds is None else max(step, int(step * seconds / self.elapsed))


def paced(batches: Batches, clock: Clock, seconds: float | None) -> Iterator[tuple[float, ImageBatch]]:
    """Give each batch with the share of the round that is done when its step begins."""
    for step, images in enumerate(clock.wait_for(batches)):
        done = step / len(batches) if seconds is None else min(clock.elapsed / seconds, 1.0)
        if done >= 1.0 and step:
            return
        yield done, images
