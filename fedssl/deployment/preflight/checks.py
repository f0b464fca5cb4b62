"""Checks before joining, of all but machine and images: server, versions, clock, plan, policy, users."""

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import fedssl
from fedssl.answering import configuration
from fedssl.build_rules import proposal_of
from fedssl.config import as_text, fingerprint
from fedssl.deployment.gate.hello import Hello, hello
from fedssl.deployment.identity.certificates import read_certificate
from fedssl.deployment.preflight.look import Look, differences
from fedssl.deployment.preflight.report import FAIL, OK, UNKNOWN, WARN, Figure, Finding
from fedssl.deployment.rights import can_read
from fedssl.deployment.settings import CA_FILE, POLICY_FILE, SiteKit
from fedssl.deployment.users import uid_of
from fedssl.errors import ConfigError, PolicyError
from fedssl.site.rules import Rules, RulesFile

_WARN_DAYS = 30
_WARN_S, _FAIL_S, _REFUSED_S = 60.0, 240.0, 300
_SILENT = "The server did not answer; see the check of the server."
_CLOCK = "Let a time server set this machine's clock: timedatectl set-ntp true"
_KEY, _CERTIFICATE = "site.key", "site.crt"


def server(look: Look) -> Finding:
    """Greet the server through TLS with the site's key."""
    kit = look.kit
    look.hello = answer = hello(kit.folder, kit.server, kit.folder / CA_FILE, kit.folder / _KEY)
    days = {"server's": _days(answer.tls.not_after), "site's": _days(answer.certificate_until or _own_end(kit))}
    state, advice = OK, ""
    soon = [f"{who} certificate ends in {left} days" for who, left in days.items() if left < _WARN_DAYS]
    if soon:
        state = WARN
        advice = (
            f"The {' and the '.join(soon)}. Ask the operator to renew the server's; the site's own: fedssl request KIT."
        )
    if answer.superlink != "up":
        state, advice = WARN, f"Ask the operator to start the SuperLink. {advice}".strip()
    figures: dict[str, Figure] = {
        "consortium": answer.consortium, "tls": answer.tls.protocol, "cipher": answer.tls.cipher,
        "superlink": answer.superlink, "server_certificate_days": days["server's"],
        "site_certificate_days": days["site's"],
    }  # fmt: skip
    if answer.site != kit.site:
        found = f"The server knows this key as site {answer.site}, and site.yaml says {kit.site}."
        return Finding("server", FAIL, found, "Use the kit of this site, or mend site in site.yaml.", figures)
    found = f"{answer.consortium} knows this site, {answer.site}; its SuperLink is {answer.superlink}."
    return Finding("server", state, found, advice, figures)


def _days(end: datetime) -> int:
    return (end - datetime.now(UTC)).days


def _own_end(kit: SiteKit) -> datetime:
    return read_certificate(kit.folder / _CERTIFICATE, "Install it: fedssl install KIT FILE.").not_valid_after_utc


def version(look: Look) -> Finding:
    """Compare versions; another one at the server is a failure of the greeting itself."""
    figures = {"here": fedssl.__version__}
    if look.hello is None:
        return Finding("version", UNKNOWN, f"fedssl {fedssl.__version__} here. {_SILENT}", "", figures)
    same, there = look.hello.version == fedssl.__version__, look.hello.version
    found = f"fedssl {fedssl.__version__} here, {there} at the server."
    advice = "" if same else f"Install fedssl {there}, or ask the operator which one the consortium uses."
    return Finding("version", OK if same else FAIL, found, advice, {**figures, "server": there})


def clock(look: Look) -> Finding:
    """Compare clocks: the server refuses signatures that are five minutes off."""
    if look.hello is None:
        return Finding("clock", UNKNOWN, _SILENT)
    off = look.hello.clock_difference_s
    state = FAIL if abs(off) > _FAIL_S else WARN if abs(off) > _WARN_S else OK
    side = "behind" if off > 0 else "ahead of"
    found = f"This machine's clock is {abs(off):.1f} s {side} the server's; at {_REFUSED_S} s nothing is accepted."
    return Finding("clock", state, found, "" if state == OK else _CLOCK, {"difference_s": off})


def plan(look: Look) -> Finding:
    """Compose the kit's plan and compare it with the server's."""
    look.config = configuration(as_text(["data.root=unused", *look.kit.plan]))
    own = fingerprint(look.config)
    if look.hello is None:
        return Finding("plan", UNKNOWN, f"The plan of this kit is {own}. {_SILENT}", "", {"fingerprint": own})
    theirs, told = _fingerprint_of(look.hello), look.hello.fingerprint
    figures = {"fingerprint": own, "server": told or theirs}
    differing = differences(look.kit.plan, look.hello.plan)
    if own != theirs or (told is not None and own != told):
        what = f": {'; '.join(differing)}" if differing else ", though they have the same words"
        found = f"The plan of this kit ({own}) is another than the server's ({told or theirs}){what}."
        advice = (
            "Agree with the operator, then write into site.yaml (plan) what the server has. A site refuses other plans."
        )
        if not differing:
            advice = "The server composes these words to something else: compare versions of fedssl with the operator."
        return Finding("plan", FAIL, found, advice, figures)
    note = f" These make no difference: {'; '.join(differing)}." if differing else ""
    return Finding("plan", OK, f"Kit and server have the same plan, {own}.{note}", "", figures)


def _fingerprint_of(answer: Hello) -> str:
    try:
        return fingerprint(configuration(as_text(["data.root=unused", *answer.plan])))
    except ConfigError as error:
        raise ConfigError(f"The server's plan cannot be composed here: {error}") from error


def policy(look: Look) -> Finding:
    """Let the policy judge a round of the plan, and what would come and leave."""
    look.rules = rules = RulesFile(look.kit.folder / POLICY_FILE).current()
    ends = rules.entries["expires"].value
    left = (ends - datetime.now().astimezone().date()).days
    figures = {"days_left": left, "digest": rules.digest[:12]}
    if look.config is None:
        return Finding("policy", UNKNOWN, "The policy reads. What it says of the plan is not known.", "", figures)
    refusals = list(_refusals(look, rules))
    if refusals:
        advice = "Change these lines of policy.yaml if the hospital agrees, or ask the operator for another plan."
        return Finding("policy", FAIL, " ".join(refusals), advice, figures)
    closed = _refused(look, rules, 1)
    if closed:
        return Finding("policy", WARN, closed, "Nothing, if these are the hours that the hospital wants.", figures)
    if left < _WARN_DAYS:
        found = f"The policy admits the plan, and ends in {left} days, on {ends}."
        return Finding(
            "policy", WARN, found, "Set a later day in policy.yaml (expires) if the hospital agrees.", figures
        )
    return Finding("policy", OK, f"The policy admits the plan, until {ends}.", "", figures)


def _refusals(look: Look, rules: Rules) -> Iterator[str]:
    """Give what is refused at any hour."""
    yield from filter(None, [_refused(look, rules, 0)])
    arriving, leaving = look.model_bytes, sum(sent for _, sent in look.tensors.values())
    try:
        rules.admit_message(look.tensors, leaving, 0)
    except PolicyError as error:
        yield f"The site {error}."
    if arriving > rules.resources.download_bytes:
        yield (
            f"The model has {arriving / 1e6:.1f} MB, and resources.download_mb_per_message of policy.yaml lets in "
            f"{rules.resources.download_mb_per_message:g} MB."
        )


def _refused(look: Look, rules: Rules, number: int) -> str:
    """Ask for round ``number``; the roll call, 0, is held at any hour."""
    proposal = proposal_of(look.plan(), fingerprint(look.plan()), number, look.private)
    try:
        rules.admit(proposal, datetime.now().astimezone(), 0)
    except PolicyError as error:
        return f"The plan {error}."
    return ""


def users(look: Look) -> Finding:
    """Try whether the relay can read what it must not, and the agent what it must."""
    kit = look.kit
    if look.one_user:
        found = "A trial: one user runs agent and relay, so code that the server sends could read the data."
        return Finding("users", WARN, found, "Run them as two users where there are patients' images.")
    agent, relay = uid_of(kit.agent_user), uid_of(kit.relay_user)
    if agent == relay:
        advice = "Name another relay_user in site.yaml: code that the server sends must not be able to read the data."
        return Finding("users", FAIL, "Agent and relay are one user.", advice)
    if os.getuid() != 0:
        found = "Only root can try what the relay's user can read."
        return Finding("users", UNKNOWN, found, f"sudo fedssl preflight {kit.folder}")
    things = {"the site's key": kit.folder / _KEY, "the agent's state": kit.state}
    if "://" not in kit.data:
        things["the data"] = Path(kit.data)
    open_to_relay = [what for what, path in things.items() if can_read(path, kit.relay_user)]
    if open_to_relay:
        advice = f"Take the right away (chmod o-rwx, and no group in common with {kit.agent_user})."
        return Finding("users", FAIL, f"The relay's user can read {', '.join(open_to_relay)}.", advice)
    del things["the agent's state"]  # it is made at the first start
    shut = [what for what, path in things.items() if not can_read(path, kit.agent_user)]
    if shut:
        return Finding(
            "users", FAIL, f"The agent's user cannot read {', '.join(shut)}.", f"Let {kit.agent_user} read it."
        )
    return Finding("users", OK, "The relay's user can read neither data, key nor state; the agent's user can.")
