"""Verbs of a consortium: kits, requests, certificates."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from fedssl.explained import FormatOption, err, explained
from fedssl.printing import Format, print_json, print_line, print_table

Kit = Annotated[Path, typer.Argument(help="Folder of a site's or the server's kit.", metavar="KIT")]
AuthorityFolder = Annotated[
    Path, typer.Argument(help="Folder of the authority, as `fedssl provision` made it.", metavar="AUTHORITY")
]


def provision(
    consortium: Annotated[Path, typer.Argument(help="Who trains what together.", metavar="CONSORTIUM.yaml")],
    out: Annotated[Path, typer.Option(help="Folder to make.")] = Path("kits"),
    all_in_one: Annotated[
        bool, typer.Option("--all-in-one", help="For trials: make all keys here too. Whoever does so knows them.")
    ] = False,
) -> None:
    """Write the kits of a consortium: OUT/authority, OUT/server and OUT/sites/NAME. They hold no site's key.

    fedssl provision consortium.yaml --out kits
    """
    with explained():
        from fedssl.deployment.identity.provision import provision as write_kits
        from fedssl.deployment.settings import Consortium

        found = Consortium.read(consortium)
        write_kits(found, out, all_in_one=all_in_one)
    print_line(f"{out}/authority signs and is to be kept safe, {out}/server is the server's kit.")
    print_line(
        f"{out}/sites holds {len(found.sites)} kits, one for each hospital. Each has a README.md with the steps."
    )
    if all_in_one:
        _warn("All private keys were made on this machine (--all-in-one). Use these kits for trials only.")


def request(
    kit: Kit,
    renew: Annotated[bool, typer.Option("--renew", help="A new request with the key that the kit has.")] = False,
) -> None:
    """Make a private key in a kit, which stays there, and a request to send to the operator.

    fedssl request .
    """
    with explained():
        from fedssl.deployment.identity.enrolment import request as write_request

        made = write_request(kit, renew=renew)
    print_line(f"Send {made.path} to the operator; it is no secret. The private key stays in the kit.")
    print_line(f"Compare by telephone, for {made.name}: {made.fingerprint}")


def sign(
    authority: AuthorityFolder,
    request: Annotated[Path, typer.Argument(help="site.csr or server.csr.", metavar="REQUEST.csr")],
    replace: Annotated[
        bool, typer.Option("--replace", help="Take a new key for a name that has a valid one; the old one is revoked.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Certificate to write. Default: NAME.crt, here.")] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Only print name and fingerprint, to compare them first.")
    ] = False,
) -> None:
    """Sign the request of a site or of the server.

    fedssl sign kits/authority site.csr --show, then by telephone, then without --show.

    Puts a site's certificate and the list of the revoked also into the server's kit if that lies beside the authority.
    """
    with explained():
        from fedssl.deployment.identity.authority import Authority
        from fedssl.deployment.identity.certificates import SERVER_NAME, fingerprint, read_request, write_public

        opened, asked = Authority.open(authority), read_request(request)
        if show:
            name, key = opened.examine(asked)
            print_line(f"Not signed. Compare by telephone, with {name}: {fingerprint(key)}")
            return
        issued = opened.sign(asked, datetime.now(UTC), replace=replace)
        path = out or Path(f"{issued.name}.crt")
        write_public(path, issued.pem, "the certificate")
        handed = opened.hand_to_server(issued)
    print_line(f"{issued.name} ({issued.kind}), valid until {issued.not_after:%Y-%m-%d %H:%M} UTC: {path}")
    print_line(f"Compare by telephone: {issued.fingerprint}")
    if issued.name == SERVER_NAME:
        _warn("This is the SERVER's certificate. If a hospital sent the request, run: fedssl revoke AUTHORITY server")
    elif handed:
        print_line("The server's kit beside the authority has it too.")
    else:
        print_line(f"Put it into the server's kit as sites/{issued.name}.crt, and revoked.crl beside server.yaml.")


def install(
    kit: Kit, certificate: Annotated[Path, typer.Argument(help="What the operator sent.", metavar="CERTIFICATE")]
) -> None:
    """Put a signed certificate into a kit, after seeing that it belongs to its key.

    fedssl install . NORTH.crt
    """
    with explained():
        from fedssl.deployment.identity.enrolment import install as put

        done = put(kit, certificate, datetime.now(UTC))
    print_line(f"{done.path.name} of {done.name} is in the kit. Next: fedssl preflight {kit}")


def revoke(
    authority: AuthorityFolder,
    name: Annotated[str, typer.Argument(help="Site, or server. Without: the list is only made valid anew.")] = "",
) -> None:
    """Revoke all certificates of a name and write the list of the revoked, also into the server's kit beside it.

    fedssl revoke kits/authority NORTH
    """
    with explained():
        from fedssl.deployment.identity.authority import Authority

        opened = Authority.open(authority)
        count = opened.revoke(name, datetime.now(UTC))
        handed = opened.hand_to_server()
    if name:
        print_line(f"{name}: {count} certificate{'s' if count != 1 else ''} revoked.")
    print_line(
        "revoked.crl was written, also into the server's kit beside the authority." if handed
        else "revoked.crl was written. Copy it into the server's kit: only then does it take effect."
    )  # fmt: skip


def certificates(authority: AuthorityFolder, output: FormatOption = Format.TEXT) -> None:
    """Show all certificates, and warn a month before one ends. Writes nothing.

    fedssl certificates kits/authority
    """
    with explained():
        from fedssl.deployment.identity.authority import Authority
        from fedssl.deployment.identity.expiry import overview

        found = overview(Authority.open(authority), datetime.now(UTC))
    if output is Format.JSON:
        print_json(found)
        return
    rows = found["certificates"]
    if rows:
        print_table([_shown(row) for row in rows])
    else:
        print_line("No certificate was signed.")
    for sentence in found["warnings"]:
        _warn(sentence)


def _shown(row: dict[str, Any]) -> dict[str, str]:
    return {
        "name": row["name"],
        "serial": row["serial"],
        "valid until": row["valid_until"][:10],
        "days left": str(row["days_left"]),
        "revoked": (row["revoked"] or "")[:10],
    }


def _warn(text: str) -> None:
    err.print(f"Warning: {text}", markup=False, highlight=False, soft_wrap=True)
