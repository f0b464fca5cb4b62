"""The hospital's desk: the policy first, then the agent, then the manifest, and only then the answer leaves."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from flwr.app import RecordDict

from fedssl import progress, wire
from fedssl.answering import Answer, answer, forget_sites
from fedssl.build_privacy import is_private
from fedssl.build_rules import proposal_of
from fedssl.config import Config, fingerprint, overrides_of
from fedssl.deployment.replays import Replays
from fedssl.deployment.settings import SiteKit
from fedssl.errors import FederationError, FedsslError, PolicyError
from fedssl.frames import Frame, write_frame
from fedssl.marginals import FEDERATED_SINKHORN
from fedssl.order import Order
from fedssl.packing import size_in_bytes
from fedssl.site.egress import Egress, bytes_since, describe_counts, describe_state
from fedssl.site.rules import Rules, RulesFile
from fedssl.update import state_digest

_UNRECORDED = "cannot write its egress manifest, so nothing leaves; its own log says why"
_DAY = timedelta(days=1)
_NEVER = {  # in settings that come from a server
    "$": "they could refer to what is none of its business",
    "\\": "they could hide what they say",
    "_target_": "they could call anything",
    "hydra": "they could name files",
    "..": "they could name files",
}
_LONGEST = 16_000  # characters of settings
_MOST_ITERATIONS = 20


@dataclass
class Desk:
    """Answers one question at a time.

    Attributes:
        kit: the site's settings.
        rules: its policy, read again when it changes.
        egress: its manifest.
        replays: the rounds that it has answered.
        last: what it last did, for ``fedssl status``.
    """

    kit: SiteKit
    rules: RulesFile
    egress: Egress
    replays: Replays
    last: dict[str, Any] = field(default_factory=dict)
    _warm: tuple[str, dict[str, Any]] | None = None

    def answer(self, question: Frame | FedsslError) -> list[bytes]:
        """Give the frame that goes back; it is in the manifest when it is given."""
        kind, given = "unknown", Answer(RecordDict())
        try:
            if isinstance(question, FedsslError):
                raise question
            kind, overrides = _text(question, "kind"), _text(question, "overrides")
            rules = self.rules.current()
            given = self._answered(kind, overrides, question, rules)
            parts = write_frame({}, given.content)
            entry = describe(kind, given, parts)
            names = [tensor["name"] for tensor in entry["tensors"]]
            rules.admit_message(names, size_in_bytes(given.content), self.uploaded_today())
        except FedsslError as error:
            given = Answer(wire.write_refusal(wire.Refusal(self.kit.site, str(error))), given.order)
            parts = write_frame({}, given.content)
            entry = describe(kind, given, parts)
        return self._recorded(entry, parts)

    def _answered(self, kind: str, overrides: str, question: Frame, rules: Rules) -> Answer:
        node_config = {**self.kit.node_config(), **rules.node_config()}
        if self._warm != (overrides, node_config):  # the model of another run or policy is not kept
            forget_sites()
            self._warm = (overrides, node_config)
        return answer(kind, overrides, question.content, node_config, _Admission(self, rules))

    def uploaded_today(self) -> int:
        """Bytes that left in the last 24 hours."""
        return bytes_since(self.egress, datetime.now().astimezone() - _DAY)

    def _recorded(self, fields: dict[str, Any], parts: list[bytes]) -> list[bytes]:
        try:
            entry = self.egress.append(fields)
        except FedsslError as error:
            progress.publish(progress.Note(str(error), alarm=True))
            return write_frame({}, wire.write_refusal(wire.Refusal(self.kit.site, _UNRECORDED)))
        self.last = {"kind": entry["kind"], "round": entry["round"], "reason": entry["reason"]}
        alarm, what = bool(entry["reason"]), f"Round {entry['round']}: {entry['kind']}"
        text = f"{what} {entry['reason']}" if alarm else f"{what}, {entry['content_bytes'] / 1e6:.1f} MB left"
        progress.publish(progress.Note(text, alarm=alarm))
        return parts


@dataclass
class _Admission:
    """The hospital's rules for one question."""

    desk: Desk
    rules: Rules

    def __call__(self, config: Config, request: wire.Request, *, training: bool) -> None:
        """Admit a request.

        Raises:
            PolicyError: names the lines of ``policy.yaml``, or says that the round is long over.
        """
        order, site = request.order, self.desk.kit.site
        proposal = proposal_of(config, fingerprint(config), order.number, is_private(config, site))
        self.rules.admit(proposal, datetime.now().astimezone(), self.desk.uploaded_today())
        if order.number > 0:
            self._admit_question(config, request, training=training)

    def _admit_question(self, config: Config, request: wire.Request, *, training: bool) -> None:
        order, federation = request.order, config["federation"]
        guide = {f"guide/{name}": value for name, value in request.guide.items()}
        if training:
            asked = f"{state_digest({**request.state, **guide})} {asdict(replace(order, ledger=''))}"
            self.desk.replays.admit(order.run, order.number, hashlib.sha256(asked.encode()).hexdigest())
            return
        if federation["equipartition"] != FEDERATED_SINKHORN:
            raise PolicyError(f"tells column sums only with federation.equipartition={FEDERATED_SINKHORN}")
        most = 2 * min(int(federation["sinkhorn_iterations"]), _MOST_ITERATIONS)  # twice: a site may have dropped out
        self.desk.replays.admit_sums(order.run, order.number, state_digest({**request.state, **guide}), most)


def _text(question: Frame, name: str) -> str:
    value = question.facts.get(name)
    if not isinstance(value, str):
        raise FederationError("was sent a malformed message; use the relay of the same version")
    if name == "overrides":
        _check_settings(value)
    return value


def _check_settings(text: str) -> None:
    """Refuse settings that could name or call what is none of a server's business, however they are quoted.

    Raises:
        PolicyError: says what they hold.
    """
    if len(text) > _LONGEST:
        raise PolicyError(f"does not take {len(text)} characters of settings; {_LONGEST} are allowed")
    try:
        words = overrides_of(text)
    except ValueError as error:
        raise PolicyError("does not take settings whose quotes do not match") from error
    for word in [text, *words]:
        if found := next((never for never in _NEVER if never in word), ""):
            raise PolicyError(f"does not take settings that hold {found!r}: {_NEVER[found]}. Give plain values")


def _tensors(content: RecordDict) -> list[dict[str, Any]]:
    arrays = {name: array.numpy() for name, array in content.array_records["state"].items()}
    return describe_state(arrays, dict(content.config_records["layout"]))


def describe(kind: str, given: Answer, parts: list[bytes]) -> dict[str, Any]:
    """Make the manifest's entry of an answer: all that is in it, and the digest of what leaves.

    Args:
        kind: of the question.
        given: the answer.
        parts: of the frame that leaves.
    """
    content, order = given.content, given.order or Order("", 0, 0, "")
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    counts = content.array_records.get("counts")
    metrics = dict(content.metric_records["metrics"]) if "metrics" in content else {}
    reason = str(content.config_records["refused"]["reason"]) if "refused" in content else ""
    return {
        "kind": "refusal" if reason else _kind(kind, order),
        "run": order.run,
        "round": order.number,
        "tensors": _tensors(content) if "state" in content else [],
        "counts": describe_counts({name: array.numpy() for name, array in counts.items()}) if counts else [],
        "metrics": metrics,
        "facts": _facts(content),
        "epsilon": metrics.get("epsilon"),
        "frame_bytes": sum(map(len, parts)),
        "sha256": digest.hexdigest(),
        "reason": reason,
    }


def _kind(kind: str, order: Order) -> str:
    if kind.startswith("train"):
        return "train"
    return "marginals" if order.number else "presence"


def _facts(content: RecordDict) -> Mapping[str, Any]:
    return dict(content.config_records["site"]) if "site" in content else {}
