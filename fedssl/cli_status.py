"""The verb that shows how a consortium, or a hospital's part in it, stands."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedssl.errors import ConfigError
from fedssl.explained import FormatOption, explained
from fedssl.printing import Format, print_json, print_line, print_table

if TYPE_CHECKING:
    from fedssl.deployment.status.standing import SiteStatus, Status
    from fedssl.deployment.status.values import Alarm, Part

_NONE = "-"


def status(
    kit: Annotated[Path, typer.Argument(help="Folder of a server's kit, or of a site's.")],
    html: Annotated[Path | None, typer.Option(help="Write a server's page to this file, too.", metavar="FILE")] = None,
    every: Annotated[
        float | None,
        typer.Option(help="Do it again after so many seconds, until the run has ended or ctrl-c.", min=1.0),
    ] = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Show how a consortium stands: rounds, loss, sites, what is wrong. At a hospital: what it trained, refused, sent.

    fedssl status server-kit

    fedssl status server-kit --html /var/www/status.html --every 30

    fedssl status kits/NORTH --format json

    It only reads files, so it may run at any time, also beside a server that hangs.
    """
    with explained():
        show = _shower(kit, html, output)
        try:
            while not show() and every is not None:
                time.sleep(every)
        except KeyboardInterrupt:
            if every is None:
                raise


def _shower(kit: Path, html: Path | None, output: Format) -> Callable[[], bool]:
    """Give what shows the kit once and tells whether its run has ended."""
    from fedssl.deployment.settings import SERVER_FILE, SITE_FILE

    if (kit / SERVER_FILE).exists():
        return lambda: _show_server(kit, html, output)
    if not (kit / SITE_FILE).exists():
        raise ConfigError(
            f"{kit} is no kit: it holds neither {SERVER_FILE} nor {SITE_FILE}. Give the folder of a server's kit or of "
            "a site's."
        )
    if html is not None:
        raise ConfigError(f"{kit} is a site's kit, and --html is for a server's. Leave out --html.")
    return lambda: _show_site(kit, output)


def _show_server(kit: Path, html: Path | None, output: Format) -> bool:
    from fedssl.deployment.settings import ServerKit
    from fedssl.deployment.status.standing import as_json, read_status

    found = read_status(ServerKit.read(kit), datetime.now(UTC))
    if html is not None:
        from fedssl.deployment.status.page import write_status_page

        write_status_page(html, found)
    if output is Format.JSON:
        print_json(as_json(found))
    else:
        _print_server(found)
    return found.ended


def _show_site(kit: Path, output: Format) -> bool:
    from fedssl.deployment.settings import SiteKit
    from fedssl.deployment.status.standing import as_json, site_status

    found = site_status(SiteKit.read(kit), datetime.now(UTC))
    if output is Format.JSON:
        print_json(as_json(found))
    else:
        _print_site(found)
    return False


def _print_server(found: "Status") -> None:
    from fedssl.deployment.status.files import span
    from fedssl.deployment.status.page import figure

    print_line(f"{found.name}, {_clock(found.written)}. {found.sentence}")
    last = found.history[-1] if found.history else None
    if last is not None:
        parts = [f"Round {last.number} was finished: {_clock(last.time)}", f"mean loss {figure(last.loss)}"]
        parts += [f"prototypes agree to {found.agreement:.2f}"] if found.agreement is not None else []
        parts += [f"a round usually takes {span(found.usual_s)}"] if found.usual_s is not None else []
        parts += [f"expected end {_clock(found.expected_end)}"] if found.expected_end is not None else []
        print_line("; ".join(parts) + ".")
    if found.note:
        print_line(f"Last word of the run: {found.note}")
    _print_alarms([alarm for alarm in found.alarms if alarm.current and alarm.text != found.sentence])
    if found.sites:
        print_line("")
        print_table([_site_row(found, number) for number in range(len(found.sites))])
    _print_parts(found.parts, known=found.state not in {"silent", "done", "gave up"})
    _print_alarms([alarm for alarm in found.alarms if not alarm.current][:10])


def _site_row(found: "Status", number: int) -> dict[str, Any]:
    from fedssl.deployment.status.files import span
    from fedssl.deployment.status.page import figure, size

    site = found.sites[number]
    private = any(one.epsilon is not None for one in found.sites)
    return {
        "site": site.name,
        "state": f"{site.standing.upper()}: {site.words}",
        "last answer": _NONE if site.last_round is None else f"round {site.last_round}",
        "last seen": _NONE if site.last_seen_s is None else f"{span(site.last_seen_s)} ago",
        "loss": figure(site.loss),
        **({"epsilon": figure(site.epsilon, 2)} if private else {}),
        "images": _NONE if site.images is None else f"{site.images}",
        "images/s": figure(site.images_per_s, 0),
        "received": size(site.bytes_up),
        "sent": size(site.bytes_down),
    }


def _print_site(found: "SiteStatus") -> None:
    from fedssl.deployment.status.page import size

    print_line(f"{found.name}, {_clock(found.written)}. {found.sentence}")
    if found.last_round is None:
        print_line("Last round trained: none.")
    else:
        print_line(f"Last round trained: {found.last_round} of run {found.last_run}, {_clock(found.last_trained)}.")
    if found.last_refusal is not None:
        refusal = found.last_refusal
        print_line(f"Last refusal: round {refusal.round or 0}, {_clock(refusal.time)}: it {refusal.reason}")
    print_line(
        f"Left this hospital: {size(found.bytes_day)} in the last 24 hours, {size(found.bytes_all)} in all, in "
        f"{found.messages} messages (`fedssl egress` verifies and lists them)."
    )
    if found.epsilon is not None:
        print_line(f"Epsilon spent on each patient, as told to the server: {found.epsilon:.2f}.")
    if found.policy:
        print_line(f"Policy: {found.policy}")
    _print_alarms([alarm for alarm in found.alarms if alarm.text != found.sentence])
    _print_parts(found.parts, known=found.state != "silent")


def _print_parts(parts: "tuple[Part, ...]", *, known: bool) -> None:
    state = "state" if known else "last known state"
    if parts:
        print_line("")
        print_table(
            [
                {"part": one.name, state: one.state, "restarts": one.restarts, "since": _clock(one.since)}
                for one in parts
            ]
        )


def _print_alarms(alarms: "list[Alarm]") -> None:
    for alarm in alarms:
        times = f" ({alarm.count} times)" if alarm.count > 1 else ""
        begin = "ALARM" if alarm.current else f"Alarm of {_clock(alarm.time)}"
        print_line(f"{begin}: {alarm.text}{times}")


def _clock(at: datetime | None) -> str:
    return "at a time that is not known" if at is None else f"{at.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
