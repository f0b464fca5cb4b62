"""Verbs about privacy: what was spent on a site's patients."""

from typing import Annotated, Any

import typer

from fedssl.errors import PrivacyError
from fedssl.explained import FormatOption, Overrides, explained
from fedssl.printing import Format, print_json, print_line, print_table

privacy_app = typer.Typer(
    name="privacy", no_args_is_help=True, help="What private rounds cost a site's patients: planned, and spent."
)


@privacy_app.command()
def ledger(
    where: Annotated[
        str, typer.Argument(help="A site, a ledger's file, or a folder of ledgers. Default: all of this machine.",
                            metavar="[PATH_OR_SITE]"),
    ] = "",
    output: FormatOption = Format.TEXT,
) -> None:  # fmt: skip
    """Verify privacy ledgers and show what each run has spent; writes nothing. Exit code 6 if one does not verify.

    fedssl privacy ledger

    fedssl privacy ledger NORTH

    fedssl privacy ledger runs/mine --format json
    """
    with explained():
        from fedssl.site.ledger_summary import find_ledgers, summary

        found, refused, places = list[dict[str, Any]](), list[str](), find_ledgers(where)
        for path, anchor in places:
            try:
                found.extend(filter(None, [summary(path, anchor)]))
            except PrivacyError as error:
                refused.append(f"{path.parent.name}: {error}" if len(places) > 1 else str(error))
        if output is Format.JSON:
            print_json({"ledgers": found, "refused": refused})
        else:
            _print_ledgers(found)
        if refused:
            raise PrivacyError(" ".join(refused))
        if not found and output is Format.TEXT:
            print_line("No privacy ledger has an entry: no private round was reserved.")


@privacy_app.command()
def plan(overrides: Overrides = None, output: FormatOption = Format.TEXT) -> None:
    """Say what a private run would cost and whether it can work: noise, epsilon, signal to noise, time, memory.

    fedssl privacy plan privacy.patients=2000 privacy.batch=256 federation.rounds=40

    fedssl privacy plan 'privacy.patients={NORTH: 5000, SOUTH: 800}' encoder=tiny

    Reads no image: time and memory are measured on noise.
    """
    with explained():
        from fedssl.private_outlook import plan_privacy

        found = plan_privacy(overrides or [])
    if output is Format.JSON:
        print_json(found)
        return
    print_table([_planned(row) for row in found["rows"]])
    cost = found["cost"]
    print_line(
        f"On this machine: {cost['step_s']:.1f} s a step, {cost['round_s']:.0f} s a round, "
        f"{cost['run_s'] / 3600:.1f} h in all; {cost['memory_gb']:.1f} GB with 8 patients at once."
    )
    for sentence in found["warnings"]:
        print_line(f"Warning: {sentence}")


def _planned(row: dict[str, Any]) -> dict[str, str]:
    return {
        "patients": f"{row['patients']}",
        "epsilon": f"{row['epsilon']:.2f}",
        "after one round": f"{row['epsilon_round']:.2f}",
        "steps": f"{row['steps']}",
        "rate": f"{row['rate']:.3g}",
        "sigma": f"{row['sigma']:.3g}",
        "noise of a gradient": f"{row['gradient_noise']:.3g} x the longest signal",
        "signal to noise of the run": f"{row['signal_to_noise']:.3g}",
        "noise of a vote": f"{row['vote_noise']:.2f} of a share",
    }


def _print_ledgers(found: list[dict[str, Any]]) -> None:
    for one in found:
        print_line(
            f"{one['site']}: epsilon {one['epsilon']:.4f} at delta {one['delta']:g} is spent. "
            f"{one['entries']} entries, verified; head {one['head']}"
        )
        if one["runs"]:
            print_table([run | _shown(run) for run in one["runs"]])
        for note in one["notes"]:
            print_line(f"Note: {note}")


def _shown(run: dict[str, Any]) -> dict[str, str]:
    lists = {name: ", ".join(f"{value:.4g}" for value in run[name]) for name in ("sigma", "rate")}
    return lists | {"epsilon": f"{run['epsilon']:.4f}"}
