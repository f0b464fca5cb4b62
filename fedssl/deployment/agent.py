"""The hospital's agent: a process that holds data, model and memory, and answers the relay. Run as the agent's user."""

import argparse
import os
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from fedssl import progress
from fedssl.console import shown
from fedssl.deployment.desk import Desk
from fedssl.deployment.lines import Lines, listen
from fedssl.deployment.parts import stopped_by_signals
from fedssl.deployment.replays import Replays
from fedssl.deployment.settings import POLICY_FILE, SiteKit
from fedssl.deployment.users import uid_of
from fedssl.errors import FedsslError, StorageError
from fedssl.frames import Frame
from fedssl.site.egress import Egress, default_egress
from fedssl.site.resources import apply_limits
from fedssl.site.rules import RulesFile
from fedssl.storage import write_json


def own_folders(kit: SiteKit) -> None:
    """Let cache and ledgers lie in the kit's state folder unless the environment says otherwise."""
    os.environ.setdefault("FEDSSL_CACHE", str(kit.state / "cache"))
    os.environ.setdefault("FEDSSL_STATE", str(kit.state / "durable"))


def make_desk(kit: SiteKit) -> Desk:
    """Open policy, manifest and the list of answered rounds.

    Raises:
        ConfigError: the policy cannot be read.
        PolicyError: the manifest does not verify.
    """
    rules = RulesFile(kit.folder / POLICY_FILE)
    rules.current()
    egress = Egress(*egress_places(kit), site=kit.site)
    return Desk(kit, rules, egress, Replays(kit.state / "rounds.json"))


def egress_places(kit: SiteKit) -> tuple[Path, Path]:
    """Where a kit's manifest and its anchor lie."""
    own_folders(kit)
    return default_egress(kit.site, kit.state)


def run_agent(folder: Path, *, one_user: bool) -> None:
    """Answer until stopped.

    Args:
        folder: of the kit.
        one_user: the relay is run by the same user: for trials.

    Raises:
        FedsslError: it cannot begin.
    """
    kit = SiteKit.read(folder)
    desk = make_desk(kit)
    apply_limits(desk.rules.current().resources)
    allowed = frozenset({os.getuid() if one_user else uid_of(kit.relay_user)})
    line = listen(kit.socket)
    _tell(kit, desk, "waiting for the server's messages")

    def answered(question: Frame | FedsslError) -> list[bytes]:
        _tell(kit, desk, "answering")
        parts = desk.answer(question)
        _tell(kit, desk, "waiting for the server's messages")
        return parts

    def most_bytes() -> int:
        return desk.rules.current().resources.download_bytes

    Lines(line, allowed, answered, most_bytes).serve()


def _tell(kit: SiteKit, desk: Desk, state: str) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    last = desk.last or {"kind": "", "round": 0, "reason": ""}
    policy = desk.rules.digest
    told = {"state": state, "since": now, "policy": policy, **last}
    try:
        write_json(kit.state / "agent.json", told, "the agent's state")
    except StorageError as error:  # what it does matters more than that it says so
        progress.publish(progress.Note(str(error), alarm=True))


def main() -> None:
    """Run the agent of the kit that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kit", type=Path)
    parser.add_argument("--one-user", action="store_true")
    arguments = parser.parse_args()
    console = Console()
    with shown(console), stopped_by_signals():
        try:
            run_agent(arguments.kit, one_user=arguments.one_user)
        except KeyboardInterrupt:
            pass
        except FedsslError as error:
            console.print(f"ERROR: {error}", markup=False, soft_wrap=True)
            raise SystemExit(error.exit_code) from error


if __name__ == "__main__":
    main()
