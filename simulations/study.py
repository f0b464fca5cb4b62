"""``fedssl study``: freeze a protocol, train what is not trained yet, evaluate everything, write the page."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedssl import config as settings
from fedssl import progress
from fedssl.build import check_settings
from fedssl.build_images import chosen_sites, open_images, simulated_sites, training_digest
from fedssl.config import Config
from fedssl.data.cache import ImageStore
from fedssl.errors import ConfigError
from fedssl.evidence.encoders import ALONE, FEDERATED, KINDS, NATURAL, POOLED, SCRATCH, WITHOUT, Arm
from fedssl.evidence.settings import PROTOCOL, freeze, tasks_of, tuning_of
from fedssl.evidence.study import FITS, run_study
from fedssl.run_folder import RunFolder
from fedssl.storage import exclusive
from simulations.arms import only_one_site
from simulations.run import simulate

_OF_THE_STUDY = ("run_dir=", "name=", "resume=", "overwrite=", "simulation.arms=", "study.", "evaluation.")


def study(overrides: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    """Run a study from its overrides; what is trained or fitted already is not done again.

    Returns:
        The study's folder, and its results.

    Raises:
        FedsslError: with a sentence that says what to do.
    """
    config = settings.load(overrides)
    _check(config)
    check_settings(config)
    store = open_images(config, rescan=True)
    tasks_of(config, store)
    folder = _folder(config)
    tuning_of(config, folder / FITS)
    protocol = freeze(config, store, folder)
    progress.publish(progress.Note(f"Protocol {protocol[:12]} is frozen."))
    arms = plan(config, store, overrides)
    for arm, own in arms:
        if own:
            _train(arm, own)
    return folder, run_study(config, store, [arm for arm, _ in arms], folder, protocol)


def _check(config: Config) -> None:
    if config["simulation"]["partition"] != "natural" or config["simulation"]["only"] or config["simulation"]["pool"]:
        raise ConfigError(
            "fedssl study compares real sites: leave simulation.partition=natural, simulation.only=null and "
            "simulation.pool=false."
        )
    if config["training"]["local_seconds"] is not None:
        raise ConfigError(
            "With training.local_seconds nobody knows how many images an arm sees. Set training.local_epochs or "
            "training.local_steps."
        )
    if config["study"]["leave_one_out"] and SCRATCH not in config["study"]["arms"]:
        raise ConfigError("study.leave_one_out=true needs scratch in study.arms, to compare with.")
    unknown = sorted({*config["study"]["arms"], *config["study"]["finetune"]["arms"]} - set(KINDS))
    if unknown or FEDERATED not in config["study"]["arms"]:
        raise ConfigError(
            f"study.arms and study.finetune.arms may hold {', '.join(KINDS)} (found "
            f"{', '.join(unknown) or 'no others'}), and study.arms must hold federated."
        )


def _folder(config: Config) -> Path:
    folder = Path(config["run_dir"])
    if folder.exists() and any(folder.iterdir()) and not (folder / PROTOCOL).exists():
        raise ConfigError(f"The folder {folder} holds something that is no study. Choose another with name=NAME.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder.absolute()


def plan(config: Config, store: ImageStore, overrides: Sequence[str]) -> list[tuple[Arm, list[str]]]:
    """Plan the arms with the overrides that train them (none where nothing is to be trained)."""
    kinds, weights = config["study"]["arms"], config["study"]["natural_weights"]
    arms: list[tuple[Arm, list[str]]] = [(Arm(SCRATCH), [])] if SCRATCH in kinds else []
    if NATURAL in kinds:
        reason = "" if weights else "no file of weights was given (study.natural_weights)"
        arms.append((Arm(NATURAL, missing=reason), []))
    base = [text for text in overrides if not text.startswith(_OF_THE_STUDY)]
    base.append(f"simulation.arms=[{FEDERATED}]")
    for variant, changed in {"": [], **config["study"]["variants"]}.items():
        for arm, own in _pretrained(config, store, [*base, *changed], variant):
            arms.append(_placed(config, store, arm, own))
    return arms


def _pretrained(config: Config, store: ImageStore, base: Sequence[str], variant: str) -> list[tuple[Arm, list[str]]]:
    """Plan the arms of one pretraining: together, pooled, each alone, without each."""
    kinds, sites = config["study"]["arms"], chosen_sites(config, store)
    own = settings.load(base)
    images = {site: len(subset) for site, subset in simulated_sites(own, store).items()}
    planned = [(Arm(FEDERATED, variant=variant), list(base))]
    if POOLED in kinds:
        planned.append((Arm(POOLED, variant=variant), only_one_site(own, images, base, None)))
    if ALONE in kinds:
        planned += [(Arm(ALONE, site, variant), only_one_site(own, images, base, site)) for site in sites]
    if config["study"]["leave_one_out"] and len(sites) > 2:
        planned += [(Arm(WITHOUT, site, variant), _outside(config, base, sites, site)) for site in sites]
    return planned


def _outside(config: Config, base: Sequence[str], sites: Sequence[str], site: str) -> list[str]:
    kept = [text for text in base if not text.startswith(("data.sites=", "data.unseen_sites="))]
    inside = ",".join(f"'{other}'" for other in sites if other != site)
    unseen = ",".join(f"'{other}'" for other in [*config["data"]["unseen_sites"], site])
    return [*kept, f"data.sites=[{inside}]", f"data.unseen_sites=[{unseen}]"]


def _placed(config: Config, store: ImageStore, arm: Arm, overrides: list[str]) -> tuple[Arm, list[str]]:
    """Give an arm the folder of its fingerprint and images: studies share what is trained alike."""
    own = settings.load(overrides)
    name = f"{settings.fingerprint(own)}-{training_digest(own, store)[:8]}"
    folder = Path(config["study"]["encoders"]).absolute() / name
    return replace(arm, folder=folder), [*overrides, f"run_dir={folder}", "resume=true"]


def _train(arm: Arm, overrides: Sequence[str]) -> None:
    assert arm.folder is not None
    known = RunFolder(arm.folder).last.exists()
    progress.publish(progress.Note(f"{arm.name}: {'found' if known else 'to be trained'} as {arm.folder.name}"))
    arm.folder.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(arm.folder.with_suffix(".lock")):
        simulate(list(overrides))


def missing_arms(results: Mapping[str, Any]) -> list[str]:
    """Name the arms that could not be compared, with the reason."""
    return [f"{arm['encoder']}: {arm['missing']}" for arm in results["arms"] if arm["missing"]]
