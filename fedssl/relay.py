"""The relay: what of the server's bundle runs at a hospital. It passes messages to the site's agent and back.

It runs as a user who cannot read the data, and it may be killed at any time: the agent remembers its last answer.
"""

import socket
import time
from collections.abc import Mapping
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from fedssl.errors import FederationError
from fedssl.frames import read_frame, send_frame, write_frame

_PAUSE_S = 0.5
_ABSENT_S = 600.0


def relay(path: str, facts: Mapping[str, Any], content: RecordDict, *, patience_s: float) -> RecordDict:
    """Ask the site's agent; ask again when it was killed and is back.

    Args:
        path: of the agent's Unix socket.
        facts: kind of the message, overrides.
        content: of the message.
        patience_s: until the answer is of no use to anybody.

    Raises:
        FederationError: there is no agent, or no answer in time.
    """
    parts = write_frame(facts, content)
    deadline = time.monotonic() + patience_s
    here = time.monotonic()  # when the agent was last there
    while (now := time.monotonic()) < deadline:
        try:
            with socket.socket(socket.AF_UNIX) as line:
                line.settimeout(max(1.0, deadline - now))
                line.connect(path)
                here = time.monotonic()
                send_frame(line.sendall, parts)
                line.shutdown(socket.SHUT_WR)
                with line.makefile("rb") as stream:
                    answer = read_frame(stream)
                if answer is not None:
                    return answer.content
        except PermissionError as error:
            raise FederationError("has a relay that may not reach its agent; see the rights of its socket") from error
        except (OSError, FederationError):  # killed in the middle: it comes back
            pass
        if time.monotonic() - here > _ABSENT_S:
            raise FederationError("has a relay that finds no agent; start it with `fedssl site KIT`")
        time.sleep(_PAUSE_S)
    raise FederationError("has an agent that did not answer before the deadline (federation.deadline_s)")


def refusal(site: str, reason: str) -> RecordDict:
    """Say why a site does not answer, as ``wire.write_refusal`` does."""
    return RecordDict({"refused": ConfigRecord({"site": site, "reason": reason})})
