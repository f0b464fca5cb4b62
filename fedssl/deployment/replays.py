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
    """The newest round of each run, and what was asked in it.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def admit(self, run: str, number: int, question: str) -> None:
        """Admit the training of a round that is newer than all before, or the same question again.

        Args:
            run: random name of the run.
            number: of the round.
            question: digest of all that was sent.

        Raises:
            PolicyError: the round is over, or was asked in another way; or there are too many runs.
            DataError: the file is damaged.
            StorageError: it cannot be written.
        """
        known = self._read()
        asked = self._newest(known, run, number)
        if asked["train"] not in {"", question}:
            raise PolicyError(
                f"refuses round {number}: it was asked for this round with another state before. {_BACKUP}"
            )
        if asked["train"] != question:
            self._write(known, run, {**asked, "train": question})

    def admit_sums(self, run: str, number: int, question: str, most: int) -> None:
        """Admit a question for the column sums of a round: so many different ones, each as often as it comes.

        Args:
            run: random name of the run.
            number: of the round.
            question: digest of all that was sent.
            most: different questions.

        Raises:
            PolicyError: the round is over, or was asked for too much.
            DataError: the file is damaged.
            StorageError: it cannot be written.
        """
        known = self._read()
        asked = self._newest(known, run, number)
        if question in asked["sums"]:
            return
        if len(asked["sums"]) >= most:
            raise PolicyError(f"refuses round {number}: it was asked {most} times for its column sums. {_BACKUP}")
        self._write(known, run, {**asked, "sums": [*asked["sums"], question]})

    def _newest(self, known: dict[str, Any], run: str, number: int) -> dict[str, Any]:
        """Give what was asked in a round so far."""
        asked = known.get(run, {"number": number, "train": "", "sums": []})
        if number < asked["number"]:
            raise PolicyError(
                f"refuses round {number} as a replay: it has been asked for round {asked['number']} of this run. "
                f"{_BACKUP}"
            )
        if run not in known and len(known) >= _MOST_RUNS:  # to forget one would let it be asked again
            raise PolicyError(
                f"has answered {_MOST_RUNS} runs and begins no other. Ask the hospital's administrator to look at them "
                "and to move state/rounds.json away"
            )
        return asked if number == asked["number"] else {"number": number, "train": "", "sums": []}

    def _write(self, known: dict[str, Any], run: str, asked: dict[str, Any]) -> None:
        write_json_durably(self.path, {"runs": known | {run: asked}}, _WHAT)

    def _read(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            runs = dict(json.loads(self.path.read_bytes())["runs"])
            if all({"number", "train", "sums"} == one.keys() for one in runs.values()):
                return runs
        raise DataError("has a damaged list of answered rounds (state/rounds.json); move it away if the run is new")
