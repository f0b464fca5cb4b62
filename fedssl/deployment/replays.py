"""A round that is over is never answered again for another state: whoever asks could compare the answers."""

import contextlib
import json
from pathlib import Path
from typing import Any

from fedssl.errors import DataError, PolicyError
from fedssl.storage import write_json_durably

_WHAT = "the list of answered rounds"
_MOST_RUNS = 1000
_BACKUP = "If the server went back to an older backup, start the run anew"


class Replays:
    """The newest round of each run, and the state that it was asked for.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def admit(self, run: str, number: int, state: str, *, most: int = 0) -> None:
        """Admit a round that is newer than all before, or the same question again.

        Args:
            run: random name of the run.
            number: of the round.
            state: digest of the shared state that was sent; empty where none was.
            most: questions without a state that a round may have; 0: it is none of these.

        Raises:
            PolicyError: the round is over, was asked with another state, or too often.
            DataError: the file is damaged.
            StorageError: it cannot be written.
        """
        known = self._read()
        newest, asked, count = known.get(run, [0, "", 0])
        if number < newest or (not state and number > newest):
            raise PolicyError(
                f"refuses round {number} as a replay: it has been asked for round {newest} of this run. {_BACKUP}"
            )
        if number == newest and state and state != asked:
            raise PolicyError(
                f"refuses round {number}: it was asked for this round with another state before. {_BACKUP}"
            )
        if not state and count >= most:
            raise PolicyError(f"refuses round {number}: it was asked {count} times for its column sums. {_BACKUP}")
        if number > newest:
            self._write(known, run, [number, state, 0])
        elif not state:
            self._write(known, run, [number, asked, count + 1])

    def _write(self, known: dict[str, list[Any]], run: str, value: list[Any]) -> None:
        known.pop(run, None)
        kept = dict(list(known.items())[-_MOST_RUNS + 1 :]) | {run: value}
        write_json_durably(self.path, {"runs": [[name, *one] for name, one in kept.items()]}, _WHAT)

    def _read(self) -> dict[str, list[Any]]:
        if not self.path.exists():
            return {}
        with contextlib.suppress(ValueError, KeyError, TypeError):
            runs = json.loads(self.path.read_bytes())["runs"]
            return {name: [int(number), str(state), int(count)] for name, number, state, count in runs}
        raise DataError("has a damaged list of answered rounds (state/rounds.json); move it away if the run is new")
