"""What a person sees while fedssl works: a live display on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from fedssl import progress

_PLAIN_EVERY_S = 10.0


class _Pace:
    """Speed and time left of one kind of work, from what was seen since it began."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.first: float | None = None

    def speed(self, done: float) -> float:
        """Units a second since the first call; 0 while unknown."""
        if self.first is None or done < self.first:
            self.start, self.first = time.monotonic(), done
        return (done - self.first) / max(time.monotonic() - self.start, 1e-6)

    def left(self, done: float, total: float = 1.0) -> str:
        """Say how long the rest takes when ``done`` of ``total`` is done."""
        speed = self.speed(done)
        if speed * 1e6 < total:  # nothing known yet, or it would take weeks
            return "--:--"
        minutes, seconds = divmod(int((total - done) / speed), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes:02d}:{seconds:02d}"


def _share_done(step: progress.Step) -> float:
    return (step.round - 1 + step.step / step.steps) / step.rounds


def _describe_work(event: progress.Done, pace: _Pace) -> str:
    """Files are counted while they are handled: a total that still grows is shown as "at least"."""
    total = f"at least {event.total}" if event.growing else str(event.total)
    speed = pace.speed(event.count)
    if event.count == event.total:
        return f"{event.what}: {event.count} of {total}"
    left = "--:--" if event.growing else pace.left(event.count, event.total)
    return f"{event.what}: {event.count} of {total}  {speed:.0f}/s  left {left}"


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
        self.paces: dict[str, _Pace] = {}
        self.last = 0.0
        self.topic: tuple[object, ...] = ()

    def __call__(self, event: progress.Event) -> None:
        if isinstance(event, progress.Note):
            self.console.print(("ALARM: " if event.alarm else "") + event.text, markup=False, soft_wrap=True)
        elif isinstance(event, progress.Step):
            self._line((event.round,), f"{_describe(event)}  left {self.pace.left(_share_done(event))}", done=False)
        else:
            text = _describe_work(event, self.paces.setdefault(event.what, _Pace()))
            self._line((event.what,), text, done=event.count == event.total)

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
        self.paces: dict[str, _Pace] = {}
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, event: progress.Event) -> None:
        if isinstance(event, progress.Note):
            style = "bold red" if event.alarm else ""
            self.bars.console.print(("ALARM: " if event.alarm else "") + event.text, style=style, markup=False)
        elif isinstance(event, progress.Step):
            done = _share_done(event)
            self._show("federation", done, 1.0, f"{_describe(event)}  left {self.pace.left(done)}")
        else:
            text = _describe_work(event, self.paces.setdefault(event.what, _Pace()))
            self._show(event.what, event.count, event.total, text)

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
