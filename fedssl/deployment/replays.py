"""A round that is over is never answered again for another state: whoever asks could compare the answers."""

import contextlib
import json
from pathlib import Path
from typing import Any

from fedssl.errors import DataError, PolicyError
from fedssl.storage import write_json_durably

_WHAT = "the list of answered rounds"
_MOST_RUNS = 1000


class Replays:
    """The newest round of each run, and the state that it was asked for.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def admit(self, run: str, number: int, state: str) -> None:
        """Admit a round that is newer than all before, or the same question again.

        Args:
            run: random name of the run.
            number: of the round.
            state: digest of the shared state that was sent.

        Raises:
            PolicyError: the round is over, or was asked with another state.
            DataError: the file is damaged.
            StorageError: it cannot be written.
        """
        known = self._read()
        newest, asked = known.get(run, [0, ""])
        if number < newest:
            raise PolicyError(
                f"refuses round {number} as a replay: it has been asked for round {newest} of this run. If the server "
                "went back to an older backup, start the run anew"
            )
        if number == newest and state != asked:
            raise PolicyError(
                f"refuses round {number}: it was asked for this round with another state before. If the server went "
                "back to an older backup, start the run anew"
            )
        if number > newest:
            known.pop(run, None)
            kept = dict(list(known.items())[-_MOST_RUNS + 1 :])
            write_json_durably(
                self.path, {"runs": [[name, *value] for name, value in {**kept, run: [number, state]}.items()]}, _WHAT
            )

    def _read(self) -> dict[str, list[Any]]:
        if not self.path.exists():
            return {}
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return {
                name: [int(number), str(state)] for name, number, state in json.loads(self.path.read_bytes())["runs"]
            }
        raise DataError("has a damaged list of answered rounds (state/rounds.json); move it away if the run is new")
