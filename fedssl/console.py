"""What a person sees while fedssl works: a live display on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from fedssl import progress

_PLAIN_EVERY_S = 10.0


class _Pace:
    """Time left of a federation, from the steps seen since it began."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.first: float | None = None

    def left(self, done: float) -> str:
        """Say how long the rest takes when the share ``done`` is done."""
        if self.first is None or done < self.first:
            self.start, self.first = time.monotonic(), done
        if done - self.first < 1e-3:
            return "--:--"
        seconds = (time.monotonic() - self.start) * (1 - done) / (done - self.first)
        return f"{int(seconds // 60):02d}:{int(seconds % 60):02d}"


def _share_done(step: progress.Step) -> float:
    return (step.round - 1 + step.step / step.steps) / step.rounds


def _describe(step: progress.Step) -> str:
    return (
        f"round {step.round}/{step.rounds}  site {step.site}  step {step.step}/{step.steps}  loss {step.loss:.3f}  "
        f"{step.images_per_s:.0f} img/s  data_wait {100 * step.data_wait:.1f} %"
    )


class _Plain:
    """Prints a line when something new begins or ends, and every ten seconds in between."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.pace = _Pace()
        self.last = 0.0
        self.topic: tuple[object, ...] = ()

    def __call__(self, event: progress.Event) -> None:
        if isinstance(event, progress.Note):
            self.console.print(("ALARM: " if event.alarm else "") + event.text, markup=False, soft_wrap=True)
        elif isinstance(event, progress.Step):
            self._line((event.round,), f"{_describe(event)}  left {self.pace.left(_share_done(event))}", done=False)
        else:
            self._line((event.what,), f"{event.what}: {event.count} of {event.total}", done=event.count == event.total)

    def _line(self, topic: tuple[object, ...], text: str, *, done: bool) -> None:
        now = time.monotonic()
        if done or topic != self.topic or now - self.last > _PLAIN_EVERY_S:
            self.console.print(text, markup=False, soft_wrap=True, highlight=False)
            self.last, self.topic = now, topic


class _Live:
    """One bar for the federation and one for whatever else has a known end."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.pace = _Pace()
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, event: progress.Event) -> None:
        if isinstance(event, progress.Note):
            style = "bold red" if event.alarm else ""
            self.bars.console.print(("ALARM: " if event.alarm else "") + event.text, style=style, markup=False)
        elif isinstance(event, progress.Step):
            done = _share_done(event)
            self._show("federation", done, 1.0, f"{_describe(event)}  left {self.pace.left(done)}")
        else:
            self._show(event.what, event.count, event.total, f"{event.what} {event.count}/{event.total}")

    def _show(self, key: str, done: float, total: float, text: str) -> None:
        if key not in self.tasks:
            self.tasks[key] = self.bars.add_task(text, total=total)
        self.bars.update(self.tasks[key], completed=done, total=total, description=text, visible=done < total)


@contextmanager
def shown(console: Console) -> Iterator[None]:
    """Show events on ``console`` while the block runs."""
    if not console.is_terminal:
        stop = progress.listen(_Plain(console))
        try:
            yield
        finally:
            stop()
        return
    columns = (
        SpinnerColumn(),
        BarColumn(bar_width=20),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        stop = progress.listen(_Live(bars))
        try:
            yield
        finally:
            stop()
