"""The verb with which a hospital looks, before it joins, whether all is as it must be."""

from pathlib import Path
from typing import Annotated

import typer

from fedssl.errors import ConfigError
from fedssl.explained import FormatOption, explained
from fedssl.printing import Format, print_json, print_line, print_table

_FAILED = 2


def preflight(
    kit: Annotated[Path, typer.Argument(help="The hospital's kit: the folder with site.yaml.")],
    page: Annotated[
        Path | None, typer.Option(help="Page to keep at the hospital; default: KIT/preflight.html.", metavar="FILE")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="What the operator may get; default: KIT/preflight.json.", metavar="FILE")
    ] = None,
    images: Annotated[int, typer.Option(help="Most files to decode anew, to measure how fast that is.", min=1)] = 200,
    one_user: Annotated[bool, typer.Option("--one-user", help="For trials with `fedssl site KIT --one-user`.")] = False,
    output: FormatOption = Format.TEXT,
) -> None:
    """Look before joining: server, clock, plan, policy, users, disk, GPU, images, and how long a round takes.

    sudo fedssl preflight /srv/fedssl/NORTH

    fedssl preflight kits/NORTH --format json

    It trains a few steps and sends nothing but a greeting. preflight.json names no path, user, patient or file: send it
    to the operator when something is wrong. Exit code 2 if a check fails.
    """
    with explained():
        from fedssl.deployment.preflight.all_checks import preflight as look
        from fedssl.deployment.preflight.all_checks import report_json, write_page
        from fedssl.deployment.settings import SERVER_FILE, SITE_FILE, SiteKit
        from fedssl.storage import write_json

        if (kit / SERVER_FILE).exists() and not (kit / SITE_FILE).exists():
            raise ConfigError(
                f"{kit} is a server's kit, and preflight is for a site's. `fedssl status` looks at servers."
            )
        report = look(SiteKit.read(kit), images=images, one_user=one_user)
        shared = report_json(report)
        if output is Format.JSON:
            print_json(shared)
        else:
            print_table([{"check": one.name, "": one.state.upper(), "found": one.found} for one in report.findings])
            for one in report.findings:
                if one.advice:
                    print_line(f"{one.name}: {one.advice}")
        page, json = page or kit / "preflight.html", json or kit / "preflight.json"
        write_page(report, page)
        write_json(json, shared, "the report")
    if output is Format.TEXT:
        print_line(f"{report.sentence} Page: {page}; for the operator: {json}")
    if not report.ready:
        raise typer.Exit(_FAILED)
