"""What a ``consortium.yaml`` may say."""

import ipaddress
import re
from collections import Counter
from collections.abc import Iterator

from fedssl.deployment.identity.certificates import SERVER_NAME
from fedssl.deployment.settings import Consortium
from fedssl.errors import ConfigError

CONSORTIUM_FILE = "consortium.yaml"
_CONSORTIUM = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,30}[A-Za-z0-9])?")
_SITE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}")
_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_LONGEST_HOST, _LARGEST_PORT, _MOST_DAYS, _LONGEST_TEXT = 253, 65535, 3650, 200


def check_consortium(consortium: Consortium) -> None:
    """See that names, addresses and numbers are possible.

    Raises:
        ConfigError: names all that are not.
    """
    problems = [sentence for holds, sentence in _rules(consortium) if not holds]
    if problems:
        raise ConfigError(f"{CONSORTIUM_FILE}: {'; '.join(problems)}.")


def _rules(one: Consortium) -> Iterator[tuple[bool, str]]:
    named = _CONSORTIUM.fullmatch(one.name) is not None
    yield named, f"name is {one.name!r}; it takes at most 32 letters, digits and hyphens"
    for key, host in [("host", one.host), *(("also", name) for name in one.also)]:
        yield _is_host(host), f"{key} holds {host!r}, which is neither a DNS name nor an IP address"
    yield _within(one.port, _LARGEST_PORT), f"port is {one.port}; it must be 1 to {_LARGEST_PORT}"
    yield _within(one.valid_days, _MOST_DAYS), f"valid_days is {one.valid_days}; it must be 1 to {_MOST_DAYS}"
    yield len(one.sites) > 0, "sites is empty; name at least one"
    for site in one.sites:
        yield (
            _SITE.fullmatch(site) is not None and not site.endswith(".crt"),
            f"the site {site!r} has no name for a file: at most 64 letters, digits and - _ . and no dot in front",
        )
        yield site.lower() != SERVER_NAME, f"a site cannot be called {site!r}"
    for site, count in Counter(name.lower() for name in one.sites).items():
        yield count == 1, f"the site {site!r} is named {count} times (capitals do not count)"
    for item in (*one.plan, one.contact):
        short = item.isprintable() and (item is not one.contact or len(item) <= _LONGEST_TEXT)
        yield short, "plan and contact take one line of text each, without control characters"


def _within(value: int, most: int) -> bool:
    return not isinstance(value, bool) and 1 <= value <= most


def _is_host(name: str) -> bool:
    try:
        return "%" not in name and ipaddress.ip_address(name) is not None
    except ValueError:
        labels = name.split(".")
        right = len(name) <= _LONGEST_HOST and all(_LABEL.fullmatch(label) for label in labels)
        return right and not labels[-1].isdigit()
