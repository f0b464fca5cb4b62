"""Verbs that run a consortium: its server, and a hospital's side."""

from pathlib import Path
from typing import Annotated

import typer

from fedssl.explained import explained


def server(kit: Annotated[Path, typer.Argument(help="The server's kit: the folder with server.yaml.")]) -> None:
    """Run SuperLink, gate and rounds until the last round is done; started again, it goes on where it was.

    fedssl server kits/server

    Sites reach the gate only (TLS, known keys); the SuperLink listens on this machine alone. `fedssl status KIT` and
    state/status.html in the kit show how it stands. Exit code 4 if too few sites came for too long.
    """
    with explained("Run the same command again to go on."):
        from fedssl.deployment.server import run_server

        run_server(kit)


def site(
    kit: Annotated[Path, typer.Argument(help="The hospital's kit: the folder with site.yaml.")],
    only: Annotated[
        str, typer.Option(help="agent (holds data and key) or relay (runs what the server sent): one user each.")
    ] = "",
    one_user: Annotated[
        bool, typer.Option("--one-user", help="For trials: code that the server sends could read the data.")
    ] = False,
) -> None:
    """Run the hospital's side until stopped: agent, node and relay, each started again if it dies.

    sudo fedssl site /srv/fedssl/NORTH

    sudo -u fedssl-agent fedssl site /srv/fedssl/NORTH --only agent

    sudo -u fedssl-relay fedssl site /srv/fedssl/NORTH --only relay
    """
    with explained("Run the same command again to go on."):
        from fedssl.deployment.site import run_site

        run_site(kit, only=only, one_user=one_user)
