"""What all verbs of the command share: progress, and an end with a sentence and an exit code where something fails."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console

from fedssl.errors import INTERRUPTED_EXIT_CODE, FedsslError
from fedssl.printing import Format

err = Console(stderr=True)
RESUME = "Finished rounds are kept; the same command with resume=true (and without overwrite=true) goes on from there."
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="key=value settings, e.g. federation.rounds=10 (all: configs/config.yaml)", metavar="[KEY=VALUE]..."
    ),
]
FormatOption = Annotated[Format, typer.Option("--format", help="Print for people, or as JSON for programs.")]


@contextmanager
def explained(resume: str = "") -> Iterator[None]:
    """Show progress, and end with a sentence and an exit code where something goes wrong.

    Args:
        resume: what to do after an interruption; default: the same again.
    """
    from fedssl.console import shown

    try:
        with shown(err):
            yield
    except FedsslError as error:
        err.print(f"fedssl: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        err.print(
            f"fedssl: interrupted. {resume or 'Nothing was left half-written; run the same command again.'}",
            markup=False,
        )
        raise typer.Exit(INTERRUPTED_EXIT_CODE) from error
