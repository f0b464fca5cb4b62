"""Starts the run, and starts it again from its last round whenever it ended before its end."""

import contextlib
import json
import time
from collections.abc import Mapping
from typing import Any

from fedssl import config as settings
from fedssl import progress
from fedssl.build import check_settings
from fedssl.build_privacy import check_privacy
from fedssl.deployment.settings import ServerKit
from fedssl.deployment.superlink import SuperLink
from fedssl.errors import ConfigError, FederationError
from fedssl.storage import read_jsonl, write_json

_LOOK_S, _SOON_S = 5.0, 2.0
_PERMANENT = {2, 3, 5, 6, 7}  # exit codes of what no retry mends: configuration, data, disk, privacy, policy
_KEYS = ("data.root", "run_dir", "resume", "overwrite")


def plan_of(kit: ServerKit) -> list[str]:
    """Give the overrides of a run on this server but for its folder; a server has no images."""
    wrong = [text for text in kit.plan if text.partition("=")[0].lstrip("+") in _KEYS]
    if wrong:
        raise ConfigError(f"server.yaml: plan must not hold {', '.join(wrong)}: the server sets {', '.join(_KEYS)}.")
    return ["data.root=unused", *kit.plan]


class Runner:
    """The run of a kit.

    Args:
        kit: the server's.
        link: its SuperLink.

    Raises:
        ConfigError: the plan cannot be run.
    """

    def __init__(self, kit: ServerKit, link: SuperLink) -> None:
        self.kit = kit
        self.link = link
        self.overrides = plan_of(kit)
        config = settings.load([*self.overrides, f"run_dir={kit.run}"])
        check_privacy(config, check_settings(config))
        self.rounds = int(config["federation"]["rounds"])
        self.fingerprint = settings.fingerprint(config)
        self.run: int | None = self._remembered()
        self.failures = 0
        self.due = self.looked = 0.0
        self.progressed = time.monotonic()
        self._read: dict[str, tuple[tuple[int, int], list[dict[str, Any]]]] = {}
        self.round = self._round()
        self.events = len(self._rows("events.jsonl"))

    def step(self) -> tuple[str, str]:
        """Do what is due; gives the state (``running``, ``retrying``, ``done``, ``gave up``) and a sentence.

        Raises:
            FederationError: a command of Flower failed.
        """
        self._repeat_events()
        outcome = self._outcome()
        if outcome.get("state") == "done":
            return "done", f"{self._round()} rounds; the model is in checkpoints/ of the run folder."
        if (number := self._round()) > self.round:
            self.round, self.failures, self.progressed = number, 0, time.monotonic()
        hours = (time.monotonic() - self.progressed) / 3600.0
        if hours > self.kit.give_up_h:
            return "gave up", (
                f"No round was finished for {hours:.0f} h (give_up_h in server.yaml). Last reason: "
                f"{outcome.get('reason', 'unknown')}"
            )
        if self.run is None:
            return self._begin(outcome)
        if time.monotonic() - self.looked < _LOOK_S and not outcome:
            return "running", ""
        self.looked = time.monotonic()
        status, why = self.link.run_state(self.run)
        if status.startswith("finished") or status == "unknown":
            return self._after(self._outcome(), why)
        return "running", ""

    def _begin(self, outcome: Mapping[str, Any]) -> tuple[str, str]:
        if time.monotonic() < self.due:
            return "retrying", str(outcome.get("reason", ""))
        known = (self.kit.run / "environment.json").exists()
        with contextlib.suppress(FileNotFoundError):
            (self.kit.run / "outcome.json").unlink()
        end = ["resume=true"] if known else []
        self.run = self.link.start_run(settings.as_text([*self.overrides, f"run_dir={self.kit.run}", *end]))
        write_json(self.kit.state / "run.json", {"run": self.run}, "the server's state")
        text = f"Round {self._round() + 1} of {self.rounds} begins; configuration {self.fingerprint}"
        progress.publish(progress.Note(text))
        self.looked = time.monotonic()
        return "running", ""

    def _after(self, outcome: Mapping[str, Any], why: str) -> tuple[str, str]:
        """Decide what follows on a run that ended before its end."""
        if outcome.get("state") == "done":
            return "running", ""  # the next step says so
        self.run = None
        self.failures += 1
        killed = f"The ServerApp was killed or could not start ({why}); see serverapp.log in the kit's state folder."
        reason = str(outcome.get("reason", killed))
        if int(outcome.get("exit_code", 0)) in _PERMANENT:
            return "gave up", reason
        federation = outcome.get("exit_code") == FederationError.exit_code
        pause = self.kit.retry_s if federation else min(self.kit.retry_s, _SOON_S * (2.0 ** (self.failures - 1) - 1.0))
        self.due = time.monotonic() + pause
        progress.publish(progress.Note(f"The run ended: {reason} It goes on in {pause:.0f} s.", alarm=True))
        return "retrying", reason

    def _remembered(self) -> int | None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return int(json.loads((self.kit.state / "run.json").read_bytes())["run"])
        return None

    def _outcome(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            content = json.loads((self.kit.run / "outcome.json").read_bytes())
            return content if isinstance(content, dict) else {}
        return {}

    def _rows(self, name: str) -> list[dict[str, Any]]:
        """Read a file of the run, but only when it has changed: it is looked at twice a second."""
        path = self.kit.run / name
        try:
            found = path.stat()
        except FileNotFoundError:
            return []
        stamp = (found.st_size, found.st_mtime_ns)
        if name not in self._read or self._read[name][0] != stamp:
            self._read[name] = (stamp, read_jsonl(path))
        return self._read[name][1]

    def _round(self) -> int:
        rows = self._rows("round_metrics.jsonl")
        return int(rows[-1]["round"]) if rows else 0

    def _repeat_events(self) -> None:
        """Say here what the ServerApp said in its own process."""
        rows = self._rows("events.jsonl")
        if len(rows) < self.events:
            self.events = 0
        for row in rows[self.events :]:
            progress.publish(progress.Note(str(row["text"]), alarm=bool(row["alarm"])))
        self.events = len(rows)
