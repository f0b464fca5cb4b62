"""Run a federation on this machine: every arm through the real ServerApp and ClientApp."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from fedssl import config as settings
from fedssl import progress
from fedssl.build import build_aggregator, check_settings
from fedssl.build_images import open_images, training_digest
from fedssl.build_privacy import check_privacy
from fedssl.config import Config
from fedssl.errors import FederationError
from fedssl.run_folder import RunFolder
from simulations.arms import Arm, plan_arms
from simulations.grid import run_in_process


def simulate(overrides: Sequence[str]) -> tuple[Config, list[Arm]]:
    """Train every arm that is not finished yet.

    Args:
        overrides: as on the command line.

    Returns:
        The configuration and the arms.

    Raises:
        FedsslError: with a sentence that says what to do.
    """
    from client.app import app as client_app
    from fedssl.answering import forget_sites
    from server.app import app as server_app

    logging.getLogger("flwr").setLevel(logging.ERROR)
    overrides = list(overrides)
    config = settings.load(overrides)
    check_privacy(config, check_settings(config))
    store = open_images(config)
    arms = plan_arms(config, store, overrides)
    least = max(config["federation"]["min_sites"], build_aggregator(config).least_sites)
    if arms[0].sites < least:
        raise FederationError(
            f"{arms[0].sites} of at least {least} sites have images. Lower federation.min_sites (or "
            "aggregation.hostile), or check data.root and data.sites."
        )
    digest = training_digest(config, store)
    for arm in arms:
        ready = _ready(arm, config, digest)
        if ready is None:
            continue
        progress.publish(progress.Note(f"Pretraining: {arm.title}"))
        try:
            run_in_process(server_app, client_app, sites=ready.sites, overrides=settings.as_text(ready.overrides))
        finally:
            forget_sites()
            if RunFolder(arm.folder).last.exists():
                RunFolder(arm.folder).bind_images(digest)
    return config, arms


def _ready(arm: Arm, config: Config, digest: str) -> Arm | None:
    """Decide how a resumed arm goes on: not at all if it is finished, from the start if it had not begun."""
    if not config["resume"] or not arm.folder.exists():
        return replace(arm, overrides=[text for text in arm.overrides if not text.startswith("resume=")])
    if not RunFolder(arm.folder).last.exists():
        return arm
    RunFolder(arm.folder).bind_images(digest)
    checkpoint = RunFolder(arm.folder).resume(settings.fingerprint(settings.load(arm.overrides)))
    finished = checkpoint is not None and (
        checkpoint.stale(config["federation"]["patience"]) or checkpoint.round >= config["federation"]["rounds"]
    )
    return None if finished else arm
