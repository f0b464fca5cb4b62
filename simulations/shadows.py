"""Shadow encoders of the leakage audit: the run's own settings, trained on random halves of all its patients."""

from pathlib import Path

import numpy as np

from fedssl import config as settings
from fedssl import progress
from fedssl.checkpoint import load_checkpoint
from fedssl.config import Config
from fedssl.errors import ConfigError, DataError
from fedssl.leakage_audit import Audited, open_audited
from fedssl.run_folder import RunFolder
from simulations.repeat import repeated
from simulations.run import simulate

CANARIES = 10  # patients; fewer give no figure
LEAST = 4
_SHARE = 4  # of the patients, at most one in so many becomes a canary


def train_shadows(path: Path, number: int, *, canaries: int = CANARIES) -> list[Path]:
    """Train the shadows of a run that are not trained yet, below ``RUN/audit/shadows``.

    Shadow encoders have seen half of the test patients: they are for the audit and nothing else.

    Args:
        path: a run folder or a checkpoint in one, of a simulation.
        number: of shadows; even, so that every patient trains half of them.
        canaries: patients whose images are replaced by patterns.

    Returns:
        Their run folders.

    Raises:
        ConfigError: the number is impossible, or the run cannot be simulated here.
        DataError: too few patients.
    """
    if number < LEAST or number % 2:
        raise ConfigError(
            f"--shadows {number} is impossible. Give an even number of at least {LEAST}: shadows are trained in pairs "
            "on opposite halves of the patients. 0 audits without them."
        )
    run = open_audited(path)
    _check(run, canaries)
    overrides = [
        *(text for text in repeated(run.config, run.checkpoint.fingerprint) if not text.startswith("simulation.arms=")),
        "simulation.arms=[federated]", f"simulation.canaries={canaries}",
    ]  # fmt: skip
    config = settings.load([*overrides, "simulation.shadow=0"])
    folders = [run.folder.path / "audit" / "shadows" / f"{shadow:02d}" for shadow in range(number)]
    for shadow, folder in enumerate(folders):
        config["simulation"]["shadow"] = shadow
        progress.publish(progress.Note(f"Shadow {shadow + 1} of {number}"))
        own = [f"simulation.shadow={shadow}", f"run_dir={folder.absolute()}", _how(folder, config)]
        simulate([*overrides, *own])
    return folders


def _check(run: Audited, canaries: int) -> None:
    patients = len(np.unique(run.cohort.patients))
    if not 0 <= canaries <= patients // _SHARE:
        raise DataError(
            f"--canaries {canaries} does not fit {patients} patients: at most a quarter of them may be replaced. Give "
            f"--canaries {patients // _SHARE} or fewer, or --shadows 0."
        )


def _how(folder: Path, config: Config) -> str:
    """Go on with a shadow of the same settings, else begin anew."""
    last = RunFolder(folder).last
    if not last.exists():
        return "overwrite=true"
    same = load_checkpoint(last).fingerprint == settings.fingerprint(config)
    return "resume=true" if same else "overwrite=true"
