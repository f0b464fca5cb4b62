"""What ends soon in a consortium: certificates, the list of the revoked, the authority itself."""

from datetime import datetime
from typing import Any

from fedssl.deployment.identity.authority import REVOKED_FILE, Authority
from fedssl.deployment.identity.certificates import SERVER_NAME, read_revocations
from fedssl.errors import ConfigError

_WARN_DAYS = 30


def overview(authority: Authority, now: datetime) -> dict[str, Any]:
    """List all certificates, and say in sentences what needs the operator.

    Args:
        authority: whose.
        now: the time, with its zone.
    """
    held = authority.record.read()
    rows = [
        {
            "name": one.name,
            "serial": f"{one.serial:x}",
            "key": one.key,
            "valid_until": one.not_after.isoformat(timespec="seconds"),
            "days_left": max(0, (one.not_after - now).days),
            "revoked": one.revoked.isoformat(timespec="seconds") if one.revoked else None,
        }
        for one in held
    ]
    warnings = []
    for name in (SERVER_NAME, *authority.consortium.sites):
        mine = [one for one in held if one.name == name]
        last = max((one.not_after for one in mine if one.revoked is None), default=None)
        if last is None:
            warnings.append(f"{name} has no certificate{' that is not revoked' if mine else ''}.")
        else:
            warnings += _soon(name, last, now, f"Let {name} run `fedssl request KIT --renew` and sign it.")
    return {"certificates": rows, "warnings": warnings + _of_authority(authority, now)}


def _of_authority(authority: Authority, now: datetime) -> list[str]:
    warnings = _soon("The authority", authority.ca.not_valid_after_utc, now, "Provision the consortium anew in time.")
    try:
        until = read_revocations(authority.folder / REVOKED_FILE, authority.ca, now).next_update_utc
    except ConfigError as error:
        return [*warnings, str(error)]
    assert until is not None
    return warnings + _soon("The list of the revoked", until, now, "Renew it with `fedssl revoke AUTHORITY`.")


def _soon(what: str, end: datetime, now: datetime, remedy: str) -> list[str]:
    if end <= now:
        return [f"{what} expired on {end:%Y-%m-%d}. {remedy}"]
    days = (end - now).days
    return [f"{what} ends in {days} days, on {end:%Y-%m-%d}. {remedy}"] if days < _WARN_DAYS else []
