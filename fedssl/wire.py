"""Messages between server and sites, and the checks of their form at both borders."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedssl import __version__
from fedssl.errors import ConfigError, FederationError
from fedssl.order import Order
from fedssl.packing import FULL, Packed, pack, unpack
from fedssl.update import MOST_IMAGES, Update

PROTOCOL = 4
_LONGEST_REASON = 500
_LONGEST_SENT = 2000
_RUN = re.compile(r"[0-9a-f]{0,64}")
_NAME = re.compile(r"[^\x00-\x1f\x7f$\\\[\]]{1,64}")
_LEDGER = re.compile(r"(\d{1,12}:[0-9a-f]{64})?")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\[\]]")
_LARGEST_LOG, _ROUNDING = 1e4, 1e-6
MOST_CONTRAST = 8.0


@dataclass(frozen=True)
class Refusal:
    """A site's answer when it does not train: who, and why in one sentence."""

    site: str
    reason: str


def write_order(order: Order, packed: Packed | None, guide: Mapping[str, Tensor] | None = None) -> RecordDict:
    """Make the content of a message to a site.

    Args:
        order: what is asked.
        packed: the shared state; packed once, sent to many.
        guide: ``marginal`` or ``potentials`` of the prototypes, in float64, where there are any.
    """
    content = RecordDict({"order": ConfigRecord({"protocol": PROTOCOL, "version": __version__, **asdict(order)})})
    if packed is not None:
        content["state"], content["layout"] = packed
    if guide:
        content["guide"] = ArrayRecord({name: Array(value.numpy()) for name, value in guide.items()})
    return content


@dataclass(frozen=True)
class Request:
    """A server's message as a site reads it.

    Attributes:
        order: what is asked.
        state: the shared state; empty where none was sent.
        guide: arrays over the prototypes.
    """

    order: Order
    state: dict[str, Tensor]
    guide: dict[str, Tensor]


def read_order(content: RecordDict, fingerprint: str) -> Request:
    """Read a server's message at a site.

    Raises:
        ConfigError: the server speaks another protocol or trains with another configuration.
        FederationError: the message was damaged on the way.
    """
    record = content.config_records["order"]
    if record["protocol"] != PROTOCOL:
        raise ConfigError(
            f"has fedssl {__version__} (protocol {PROTOCOL}), the server {record.get('version', 'an older one')!r} "
            f"(protocol {record['protocol']!r}); install the same fedssl version"
        )
    if record["fingerprint"] != fingerprint:
        raise ConfigError(
            f"has configuration {fingerprint} of fedssl {__version__}, the server {str(record['fingerprint'])[:64]!r} "
            f"of {str(record['version'])[:64]!r}; use equal versions and overrides"
        )
    contrast = _float(record["contrast"])
    if not 1.0 <= contrast <= MOST_CONTRAST:
        raise ConfigError(
            f"was told to weigh the contrastive term {contrast:.3g} times; 1 to {MOST_CONTRAST:g} is allowed"
        )
    order = Order(**{field.name: _as(field.type, record[field.name]) for field in fields(Order)})
    if not _RUN.fullmatch(order.run) or not 0 <= order.number <= order.rounds or not 0 <= order.last <= order.number:
        raise ConfigError("was sent an order that cannot be: its run, its round or the last round is impossible")
    state = unpack(content.array_records["state"], content.config_records["layout"]) if "state" in content else {}
    return Request(order, state, _tensors(content, "guide"))


def _as(kind: Any, value: Any) -> Any:  # noqa: ANN401 - Flower's own union of config values
    return kind(value)


def _tensors(content: RecordDict, name: str) -> dict[str, Tensor]:
    """Read a record of small arrays; empty where it is missing."""
    if name not in content:
        return {}
    return {key: torch.from_numpy(np.array(array.numpy())) for key, array in content.array_records[name].items()}


def _int(value: Any) -> int:  # noqa: ANN401 - Flower's own union of config values
    return int(value)


def _float(value: Any) -> float:  # noqa: ANN401 - Flower's own union of metric values
    return float(value)


def write_update(update: Update, precision: str = FULL, reference: Mapping[str, Tensor] | None = None) -> RecordDict:
    """Make the content of a site's answer; ``reference`` is the state that it was sent."""
    arrays, layout = pack(update.state, precision, reference)
    content = RecordDict({"state": arrays, "layout": layout})
    facts = ("site", "examples", "steps", "independent", "ledger")
    content["site"] = ConfigRecord({name: getattr(update, name) for name in facts})
    content["metrics"] = MetricRecord({name: float(value) for name, value in sorted(update.metrics.items())})
    counts = {"mass": update.mass, "usage": update.usage}
    content["counts"] = ArrayRecord({name: Array(value.numpy()) for name, value in counts.items() if value is not None})
    return content


def write_column_sums(site: str, sums: Tensor) -> RecordDict:
    """Make a site's answer to one iteration of federated Sinkhorn; ``sums`` [prototypes] in float64."""
    return RecordDict({"site": ConfigRecord({"site": site}), "counts": ArrayRecord({"sums": Array(sums.numpy())})})


def write_presence(site: str, facts: Mapping[str, int]) -> RecordDict:
    """Make a site's answer to the roll call."""
    return RecordDict({"site": ConfigRecord({"site": site, **facts})})


def write_refusal(refusal: Refusal) -> RecordDict:
    """Make the content of an answer that says why a site does not train."""
    return RecordDict({"refused": ConfigRecord({"site": refusal.site, "reason": refusal.reason[:_LONGEST_SENT]})})


@dataclass(frozen=True)
class Presence:
    """A site's answer to the roll call: its name and how many training images it has."""

    site: str
    images: int


def read_presence(content: RecordDict) -> Presence | Refusal:
    """Read an answer to the roll call.

    Raises:
        FederationError: the answer is malformed.
    """
    with _well_formed():
        if "refused" in content:
            return _read_refusal(content)
        record = content.config_records["site"]
        presence = Presence(_site(record), _int(record["images"]))
        if not 0 < presence.images < MOST_IMAGES:
            raise FederationError("says that it has an impossible number of images")
        return presence


def read_update(content: RecordDict, reference: Mapping[str, Tensor] | None = None) -> Update | Refusal:
    """Read a site's answer to a round; ``reference`` is the state that it was sent.

    Raises:
        FederationError: the answer is malformed.
    """
    with _well_formed():
        if "refused" in content:
            return _read_refusal(content)
        counts = _tensors(content, "counts")
        site = content.config_records["site"]
        return Update(
            site=_site(site),
            state=unpack(content.array_records["state"], content.config_records["layout"], reference),
            examples=_int(site["examples"]),
            steps=_int(site["steps"]),
            mass=counts.get("mass"),
            usage=counts.get("usage"),
            metrics={name: _float(value) for name, value in content.metric_records["metrics"].items()},
            ledger=_fitting(site["ledger"], _LEDGER, "what it says of its privacy ledger is no number and hash"),
            independent=bool(site["independent"]),
        )


def read_column_sums(content: RecordDict, prototypes: int, *, first: bool) -> Tensor | Refusal:
    """Read a site's answer to one iteration of federated Sinkhorn; [prototypes] in float64.

    Args:
        content: of the answer.
        prototypes: K.
        first: rows are not normalised yet in the first iteration; later no log of a mean of shares is above 0.

    Raises:
        FederationError: the answer is malformed.
    """
    with _well_formed():
        if "refused" in content:
            return _read_refusal(content)
        sums = _tensors(content, "counts")["sums"]
        if sums.dtype != torch.float64 or sums.shape != (prototypes,):
            raise FederationError("its column sums are not one number a prototype")
        low, high = -_LARGEST_LOG, _LARGEST_LOG if first else _ROUNDING
        if not bool(((sums >= low) & (sums <= high)).all()):
            raise FederationError("its column sums are not possible")
        return sums


@contextmanager
def _well_formed() -> Iterator[None]:
    """Turn whatever a broken or hostile answer raises into one refusal; its text is not repeated."""
    try:
        yield
    except FederationError:
        raise
    except Exception as error:
        raise FederationError(f"its answer is malformed ({type(error).__name__})") from error


def _site(record: Mapping[str, Any]) -> str:
    """Read a site's name: it is printed, logged and drawn."""
    wrong = "has a name that is empty, too long, or holds control characters, $, \\, [ or ]"
    return _fitting(record["site"], _NAME, wrong)


def _fitting(value: Any, form: re.Pattern[str], wrong: str) -> str:  # noqa: ANN401 - Flower's own union of values
    """Read a text of a certain form.

    Raises:
        FederationError: it has another.
    """
    if not form.fullmatch(str(value)):
        raise FederationError(wrong)
    return str(value)


def _read_refusal(content: RecordDict) -> Refusal:
    record = content.config_records["refused"]
    return Refusal(_site(record), _UNPRINTABLE.sub(" ", str(record["reason"])[:_LONGEST_REASON]))
