"""A hospital's ``policy.yaml``, enforced by its own agent: what a run may be, when, and what may leave."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from fedssl.errors import PolicyError, PrivacyError
from fedssl.site.hours import is_open, next_opening, read_hours
from fedssl.site.policy import PROFILES
from fedssl.site.resources import Resources
from fedssl.site.rules_file import Entry, read_entries, read_text

_MB = 1_000_000
_ASK = "Ask the hospital's administrator, or start a run that its policy admits"


@dataclass(frozen=True)
class Proposal:
    """What a run asks of a hospital.

    Attributes:
        method: name of the method.
        encoder: name of the encoder.
        fingerprint: of the whole configuration.
        number: of the round; 0 is the roll call.
        min_sites: quorum that the run declares. It is the server's word: only secure aggregation could enforce it.
        private: whether this site trains with differential privacy.
        gpu: whether it would train on a GPU.
        settings: the whole configuration, flattened to "section.key".
    """

    method: str
    encoder: str
    fingerprint: str
    number: int
    min_sites: int
    private: bool
    gpu: bool
    settings: Mapping[str, Any] = field(default_factory=dict)


class Rules:
    """A policy as it was read.

    Args:
        entries: its values, each with its line.
        folder: of the file.
        digest: SHA-256 of the file.

    Raises:
        ConfigError: a time window cannot be read.
    """

    def __init__(self, entries: Mapping[str, Entry], folder: Path, digest: str) -> None:
        self.entries = entries
        self.folder = folder
        self.digest = digest
        hours = entries.get("hours")
        self.minutes = read_hours(hours.value, hours.line) if hours and hours.value else None
        given = {name.partition(".")[2]: one.value for name, one in entries.items() if name.startswith("resources.")}
        self.resources = Resources(**given)

    @classmethod
    def read(cls, path: Path) -> "Rules":
        """Read a policy.

        Raises:
            ConfigError: all that is wrong with it, each with its line.
        """
        text, digest = read_text(path)
        return cls(read_entries(text), path.parent, digest)

    def admit(self, proposal: Proposal, now: datetime, uploaded: int) -> None:
        """Admit a round.

        Args:
            proposal: what is asked.
            now: local time, with its zone.
            uploaded: bytes that left in the last 24 hours.

        Raises:
            PolicyError: names every line that does not admit it.
        """
        reasons = [
            *self._against_time(proposal, now), *self._against_kind(proposal), *self._against_privacy(proposal),
            *self._against_settings(proposal), *self._against_use(proposal, uploaded),
        ]  # fmt: skip
        if reasons:
            raise PolicyError(f"is refused by its policy: {'; '.join(reasons)}. {_ASK}")

    def admit_message(self, names: Iterable[str], content_bytes: int, uploaded: int) -> None:
        """Admit what is about to leave.

        Args:
            names: of its tensors.
            content_bytes: of all arrays.
            uploaded: bytes that left in the last 24 hours.

        Raises:
            PolicyError: names the lines that do not admit it.
        """
        reasons = []
        allowed = self.entries.get("tensors")
        if allowed is not None:
            strange = [name for name in names if not any(_matches(name, one) for one in allowed.value)]
            if strange:
                reasons.append(_line(allowed, f"tensors: {strange[0]} is not among them"))
        for key, size in (("per_message", content_bytes), ("per_day", content_bytes + uploaded)):
            cap = self.entries.get(f"resources.upload_mb_{key}")
            if cap is not None and size > cap.value * _MB:
                reasons.append(_line(cap, f"resources.upload_mb_{key}: {size / _MB:.1f} MB of {cap.value:g} MB"))
        if reasons:
            raise PolicyError(f"keeps its answer back by its policy: {'; '.join(reasons)}. {_ASK}")

    def node_config(self) -> dict[str, str | int | float]:
        """Give what ``build_agent`` reads of the policy: privacy profile, cap, patients behind a prototype."""
        names = {"profile": "privacy-profile", "epsilon_cap": "epsilon-cap", "prototype_patients": "prototype-patients"}
        found = {
            theirs: self.entries[f"privacy.{ours}"].value
            for ours, theirs in names.items()
            if f"privacy.{ours}" in self.entries
        }
        required = self.entries.get("privacy.required")
        if required is not None and required.value:
            found.setdefault("privacy-profile", "consortium")
        return found

    def _against_time(self, proposal: Proposal, now: datetime) -> Iterator[str]:
        expires = self.entries["expires"]
        if now.date() > expires.value:
            yield _line(expires, f"expires: the policy ended on {expires.value}")
        pause = self.entries.get("pause_file")
        if pause is not None and (self.folder / pause.value).exists():
            yield _line(pause, "pause_file: the hospital pauses; try again later")
        if proposal.number != 0 and self.minutes is not None and not is_open(self.minutes, now):
            opens = next_opening(self.minutes, now)
            when = f"it opens again on {opens:%A at %H:%M} (local time)" if opens else "it never opens"
            yield _line(self.entries["hours"], f"hours: no round is trained now; {when}")

    def _against_kind(self, proposal: Proposal) -> Iterator[str]:
        for key, found in (
            ("methods", proposal.method), ("encoders", proposal.encoder), ("configurations", proposal.fingerprint),
        ):  # fmt: skip
            one = self.entries.get(key)
            if one is not None and found not in one.value:
                yield _line(one, f"{key}: {found} is not among {', '.join(one.value) or 'none'}")
        least = self.entries.get("min_sites")
        if least is not None and proposal.min_sites < least.value:
            yield _line(
                least, f"min_sites: the run has a quorum of {proposal.min_sites}, at least {least.value} is wanted"
            )

    def _against_privacy(self, proposal: Proposal) -> Iterator[str]:
        required, profile = self.entries.get("privacy.required"), self.entries.get("privacy.profile")
        if required is not None and required.value and not proposal.private:
            yield _line(required, "privacy.required: the run is without differential privacy at this site")
        elif "privacy-profile" in (node := self.node_config()):
            key = "privacy.required" if profile is None else "privacy.profile"
            try:
                delta = proposal.settings.get("privacy.delta")
                PROFILES[str(node["privacy-profile"])].admit(private=proposal.private, delta=delta)
            except PrivacyError as error:
                yield _line(self.entries[key], f"{key}: the site {error}")

    def _against_settings(self, proposal: Proposal) -> Iterator[str]:
        for name, one in self.entries.items():
            if not name.startswith("settings."):
                continue
            key = name.removeprefix("settings.")
            if key not in proposal.settings:
                yield _line(one, f"{key}: the run has no such setting")
            elif not _within(proposal.settings[key], one.value):
                yield _line(one, f"{key}: the run has {proposal.settings[key]}, {_bound(one.value)}")

    def _against_use(self, proposal: Proposal, uploaded: int) -> Iterator[str]:
        gpu, threads = self.entries.get("resources.gpu"), self.entries.get("resources.threads")
        if gpu is not None and not gpu.value and proposal.gpu:
            yield _line(gpu, "resources.gpu: the run would use the GPU; training.device=cpu does not")
        asked = proposal.settings.get("training.threads", 0)
        if threads is not None and asked > threads.value:
            yield _line(threads, f"resources.threads: the run wants {asked} CPU threads, {threads.value} are allowed")
        cap = self.entries.get("resources.upload_mb_per_day")
        if cap is not None and uploaded >= cap.value * _MB:
            yield _line(cap, f"resources.upload_mb_per_day: {uploaded / _MB:.1f} MB have left in 24 hours")


def _line(entry: Entry, text: str) -> str:
    return f"line {entry.line} of policy.yaml, {text}"


def _matches(name: str, allowed: str) -> bool:
    return name.startswith(allowed) if allowed.endswith(".") else name == allowed


def _within(found: Any, allowed: Any) -> bool:  # noqa: ANN401 - whatever a setting or the YAML holds
    if isinstance(allowed, list):
        return any(_equal(found, one) for one in allowed)
    if isinstance(allowed, bool) or not isinstance(allowed, int | float):
        return _equal(found, allowed)
    return isinstance(found, int | float) and not isinstance(found, bool) and found <= allowed


def _equal(found: Any, wanted: Any) -> bool:  # noqa: ANN401 - whatever a setting or the YAML holds
    return bool(found == wanted) and isinstance(found, bool) == isinstance(wanted, bool)  # True == 1


def _bound(allowed: Any) -> str:  # noqa: ANN401 - whatever the YAML holds
    if isinstance(allowed, list):
        return f"one of {', '.join(map(str, allowed))} is allowed"
    number = isinstance(allowed, int | float) and not isinstance(allowed, bool)
    return f"at most {allowed} is allowed" if number else f"{allowed} is wanted"


class RulesFile:
    """A policy that is read again whenever its file changes; a broken change admits nothing.

    Args:
        path: of ``policy.yaml``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, ...] = ()
        self._rules: Rules | None = None

    def current(self) -> Rules:
        """Give the rules as the file says now.

        Raises:
            ConfigError: the file cannot be read whole.
        """
        stamp = self._stamped()
        if self._rules is None or stamp != self._stamp:
            self._rules = None
            self._rules, self._stamp = Rules.read(self.path), stamp
        return self._rules

    @property
    def digest(self) -> str:
        """SHA-256 of the file that is in force; empty where none is."""
        return self._rules.digest if self._rules is not None else ""

    def _stamped(self) -> tuple[int, ...]:
        try:
            found = self.path.stat()
        except OSError:
            return ()
        return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
