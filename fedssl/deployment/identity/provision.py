"""Kits of a consortium: one folder for the authority, one for the server, one for each site."""

import contextlib
import json
import shutil
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from fedssl.deployment.identity.authority import REVOKED_FILE, Authority
from fedssl.deployment.identity.certificates import SERVER_NAME, read_request, write_public
from fedssl.deployment.identity.consortium_rules import CONSORTIUM_FILE, check_consortium
from fedssl.deployment.identity.enrolment import Identity, install, request
from fedssl.deployment.settings import CA_FILE, POLICY_FILE, SERVER_FILE, SITE_FILE, Consortium
from fedssl.errors import ConfigError, StorageError
from fedssl.storage import atomic_folder

_SERVER = {
    SERVER_FILE: "server.yaml.j2", "start.sh": "server_start.sh.j2", "fedssl-server.service": "server.service.j2",
    "compose.yaml": "server_compose.yaml.j2", "README.md": "server_readme.md.j2",
}  # fmt: skip
_SITE_FILES = {
    SITE_FILE: "site.yaml.j2", "start.sh": "site_start.sh.j2", "fedssl-agent.service": "agent.service.j2",
    "fedssl-relay.service": "relay.service.j2", "compose.yaml": "site_compose.yaml.j2",
    "README.md": "site_readme.md.j2",
}  # fmt: skip


def provision(consortium: Consortium, out: Path, *, all_in_one: bool = False) -> None:
    """Write the kits of a consortium.

    Args:
        consortium: who trains what together.
        out: folder to make: ``authority/ server/ sites/NAME/``.
        all_in_one: make and sign all keys here, for trials: whoever makes them knows them.

    Raises:
        ConfigError: names all that is wrong with the consortium, or ``out`` holds something.
        StorageError: the folder cannot be written; then nothing is kept of it.
    """
    check_consortium(consortium)
    out = out.absolute()
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"{out.name} is not empty, and kits are never written over. Give --out another folder.")
    except OSError as error:
        raise StorageError(f"{out.name} cannot be read ({error.strerror}). Check its rights.") from error
    now = datetime.now(UTC)
    with atomic_folder(out, "the kits") as folder:
        authority, server = folder / "authority", folder / "server"
        authority.mkdir(mode=0o700)
        stored = yaml.safe_dump(_plain(consortium), sort_keys=False, allow_unicode=True)
        write_public(authority / CONSORTIUM_FILE, stored.encode(), "the consortium's settings")
        made = Authority.create(authority, consortium, now)
        values = {"consortium": consortium, "all_in_one": all_in_one, "address": _address(consortium)}
        (server / "sites").mkdir(parents=True)
        _write(server, _SERVER, values)
        for name in (CA_FILE, REVOKED_FILE):
            shutil.copy(authority / name, server / name)
        for site in consortium.sites:
            kit = folder / "sites" / site
            kit.mkdir(parents=True)
            shutil.copy(authority / CA_FILE, kit / CA_FILE)
            _write(kit, _SITE_FILES, values | {"site": site})
            _write_policy(kit, consortium, site, now)
        if all_in_one:
            _enrol_all(folder, made)


def _enrol_all(folder: Path, authority: Authority) -> None:
    """Do what operator and sites would do, each at its own machine."""
    for kit in (folder / "server", *sorted((folder / "sites").iterdir())):
        who = Identity.of(kit)
        now = datetime.now(UTC)
        issued = authority.sign(read_request(request(kit).path), now)
        write_public(who.certificate_file, issued.pem, "the certificate")
        install(kit, who.certificate_file, now)
        if issued.name != SERVER_NAME:
            write_public(folder / "server" / "sites" / f"{issued.name}.crt", issued.pem, "the certificate")
    shutil.copy(authority.folder / REVOKED_FILE, folder / "server" / REVOKED_FILE)


def _address(consortium: Consortium) -> str:
    host = f"[{consortium.host}]" if ":" in consortium.host else consortium.host
    return f"{host}:{consortium.port}"


def _plain(consortium: Consortium) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(consortium).items()}


def _templates() -> Environment:
    found = Environment(
        loader=PackageLoader("fedssl.deployment", "templates"), undefined=StrictUndefined, autoescape=False,  # noqa: S701
        keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    found.filters["quoted"] = lambda text: json.dumps(text, ensure_ascii=False)  # JSON is YAML
    return found


def _write(folder: Path, files: dict[str, str], values: dict[str, Any]) -> None:
    templates = _templates()
    for name, template in files.items():
        text = templates.get_template(template).render(values)
        write_public(folder / name, text.encode(), name, 0o755 if name.endswith(".sh") else 0o644)


def _write_policy(kit: Path, consortium: Consortium, site: str, now: datetime) -> None:
    template = _templates().get_template(f"{POLICY_FILE}.j2")
    expires = (now + timedelta(days=365)).date().isoformat()
    text = template.render(consortium=consortium, site=site, expires=expires, **_plan(consortium))
    write_public(kit / POLICY_FILE, text.encode(), POLICY_FILE)


def _plan(consortium: Consortium) -> dict[str, Any]:
    """Give what the policy is bound to: the plan's fingerprint and quorum; nothing where it cannot be composed here."""
    from fedssl.config import fingerprint, load

    with contextlib.suppress(ConfigError):
        config = load(["data.root=unused", *consortium.plan])
        return {"fingerprint": fingerprint(config), "min_sites": int(config["federation"]["min_sites"])}
    return {"fingerprint": "", "min_sites": 0}
