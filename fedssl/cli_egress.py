"""The verb that shows what left a hospital."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from fedssl.explained import FormatOption, explained
from fedssl.printing import Format, print_json, print_line, print_table

_MOST_TENSORS = 10
_COLUMNS = (
    "number", "time", "site", "run", "round", "kind", "part", "name", "dtype", "shape", "bytes", "sha256", "norm",
    "difference", "message_sha256",
)  # fmt: skip
_Entry = dict[str, Any]


def egress(
    kit: Annotated[Path, typer.Argument(help="The hospital's kit: the folder with site.yaml.")],
    output: FormatOption = Format.TEXT,
    run: Annotated[str, typer.Option(help="Only the messages of this run.")] = "",
    round_number: Annotated[
        int | None, typer.Option("--round", help="Only the messages of this round, each with its tensors.")
    ] = None,
    messages: Annotated[bool, typer.Option("--messages", help="Every message with its tensors.")] = False,
    csv: Annotated[Path | None, typer.Option("--csv", help="Write one row a tensor to this file.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Train a round, show what would leave, send nothing.")] = (
        False
    ),
) -> None:
    """Verify the manifest of all that left this hospital and show it; nothing is sent. Exit code 7 if it is damaged.

    fedssl egress kits/NORTH

    fedssl egress kits/NORTH --round 3

    fedssl egress kits/NORTH --csv left.csv --format json

    fedssl egress kits/NORTH --dry-run

    Give the head (the last line) to somebody elsewhere: who remembers it notices if the manifest is ever written anew.
    """
    with explained():
        from fedssl.deployment.settings import SiteKit

        site = SiteKit.read(kit)
        if dry_run:
            from fedssl.deployment.dry_run import dry_run as would_leave

            found: dict[str, Any] = {"dry_run": would_leave(site)}
            chosen = [found["dry_run"]]
        else:
            from fedssl.deployment.agent import egress_places

            found, chosen = _read(egress_places(site), site.site, run, round_number)
        if csv is not None:
            _write_csv(csv, chosen)
        if output is Format.JSON:
            print_json(found if dry_run else found | {"entries": chosen})
        elif dry_run:
            print_line("Nothing left. This is what would:")
            _print_message(found["dry_run"])
        else:
            _print_manifest(found, chosen if messages or round_number is not None else [])


def _read(
    places: tuple[Path, Path], site: str, run: str, round_number: int | None
) -> tuple[dict[str, Any], list[_Entry]]:
    """Verify a manifest in one pass; give its sums and notes, and the entries that were asked for."""
    from fedssl.site.egress_file import walk
    from fedssl.site.egress_summary import summary

    chosen: list[_Entry] = []

    def noted(entries: Iterable[_Entry]) -> Iterator[_Entry]:
        for entry in entries:
            if run in {"", entry["run"]} and round_number in {None, entry["round"]}:
                chosen.append(entry)
            yield entry

    whole = walk(*places)
    found = summary(noted(whole))
    if run:
        found["runs"] = [one for one in found["runs"] if one["run"] == run]
    return found | {"site": site, "notes": list(_notes(whole.last, whole.anchored, torn=whole.torn))}, chosen


def _notes(last: _Entry | None, anchored: int | None, *, torn: bool) -> Iterator[str]:
    if torn:
        yield "The last entry is unfinished: its process was killed before anything left."
    if last is None:
        return
    if anchored is None:
        yield (
            "No anchor: whether messages at the end are missing cannot be told here. It is in the agent's cache "
            "folder: show the manifest with the same FEDSSL_CACHE as the agent has."
        )
    elif anchored < last["number"]:
        yield f"The anchor knows entries up to {anchored} only; the next message lets it know the rest."


def _print_manifest(found: dict[str, Any], chosen: list[_Entry]) -> None:
    if found["runs"]:
        print_table([_shown(one) for one in found["runs"]])
    for entry in chosen:
        print_line("")
        _print_message(entry)
    for note in found["notes"]:
        print_line(f"Note: {note}")
    count = found["total"]["messages"]
    if not count:
        print_line(f"Nothing has left {found['site']}: its egress manifest has no entry.")
        return
    print_line(f"{found['site']}: {count} messages, chain verified, head {found['head']}")


def _shown(one: dict[str, Any]) -> dict[str, str]:
    return {
        "run": one["run"] or "(none)",
        "rounds": f"{one['rounds']}",
        "messages": f"{one['messages']}",
        "refusals": f"{one['refusals']}",
        "arrays": _size(one["content_bytes"]),
        "in all": _size(one["frame_bytes"]),
        "first": one["first"],
        "last": one["last"],
        "epsilon": _number(one["epsilon"]),
    }


def _print_message(entry: _Entry) -> None:
    """Print one entry, or what a dry run made; that has no number and no time."""
    place = f"Message {entry['number']} of {entry['time']}" if "number" in entry else "Message"
    print_line(
        f"{place}: {entry['kind']}, run {entry.get('run') or '(none)'}, round {entry.get('round', 0)}; "
        f"{_size(entry['content_bytes'])} of arrays, {_size(entry['frame_bytes'])} in all, sha256 {entry['sha256']}"
    )
    if entry.get("reason"):
        print_line(f"  reason: {entry['reason']}")
    for name in ("facts", "metrics"):
        if entry.get(name):
            print_line(f"  {name}: {', '.join(f'{key} {_number(value)}' for key, value in entry[name].items())}")
    if entry.get("epsilon") is not None:
        print_line(f"  epsilon: {_number(entry['epsilon'])}")
    for part, name in (("tensor", "tensors"), ("count", "counts")):
        arrays = entry.get(name) or []
        if arrays:
            print_table([_row(part, one) for one in arrays[:_MOST_TENSORS]])
        if len(arrays) > _MOST_TENSORS:
            print_line(f"and {len(arrays) - _MOST_TENSORS} more")


def _row(part: str, one: dict[str, Any]) -> dict[str, str]:
    return {
        part: one["name"],
        "dtype": one["dtype"] + (" difference" if one["difference"] else ""),
        "shape": " x ".join(map(str, one["shape"])) or "one number",
        "bytes": f"{one['bytes']}",
        "norm": _number(one["norm"]),
        "sha256": one["sha256"],
    }


def _number(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "none" if value is None else str(value)


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def _write_csv(path: Path, entries: list[_Entry]) -> None:
    """Write one row a tensor, with the message that it was in."""
    import csv
    import io

    from fedssl.storage import atomic_file

    with atomic_file(path, "the export of the egress manifest") as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8", newline="", write_through=True)
        rows = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", restval="")
        rows.writeheader()
        for entry in entries:
            for part, name in (("state", "tensors"), ("counts", "counts")):
                for one in entry.get(name) or []:
                    own = {"part": part, "shape": "x".join(map(str, one["shape"])), "message_sha256": entry["sha256"]}
                    rows.writerow(entry | one | own)
        text.detach()
