"""``fedssl study``: freeze a protocol, train what is not trained yet, evaluate everything, write the page."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedssl import config as settings
from fedssl import progress
from fedssl.build import build_aggregator, check_settings
from fedssl.build_images import chosen_sites, open_images, simulated_sites
from fedssl.build_privacy import by_patient
from fedssl.config import Config
from fedssl.data.cache import ImageStore
from fedssl.errors import ConfigError
from fedssl.evidence.encoders import ALONE, FEDERATED, KINDS, NATURAL, POOLED, SCRATCH, WITHOUT, Arm, load_encoder
from fedssl.evidence.frozen import PROTOCOL, freeze, weights_key
from fedssl.evidence.settings import tasks_of, tuning_of
from fedssl.evidence.study import FITS, run_study
from fedssl.overrides import quoted
from fedssl.run_folder import RunFolder
from fedssl.storage import exclusive
from simulations.arms import only_one_site
from simulations.run import simulate

_OF_THE_STUDY = ("run_dir=", "name=", "resume=", "overwrite=", "simulation.arms=", "study.", "evaluation.")
_NOT_IN_A_VARIANT = (  # what would compare other images, other splits or another architecture
    "data", "privacy", "simulation", "study", "evaluation", "encoder", "federation.sites", "federation.patience",
    "federation.participation", "training.local_seconds", "training.device", "run_dir", "name", "resume", "overwrite",
    "seed", "+experiment", "experiment",
)  # fmt: skip
_ALLOWED = "encoder.weights"
Planned = tuple[Arm, list[str]]


def study(overrides: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    """Run a study from its overrides; what is trained or fitted already is not done again.

    Returns:
        The study's folder, and its results.

    Raises:
        FedsslError: with a sentence that says what to do.
    """
    config = settings.load(overrides)
    _check(config)
    store = open_images(config, rescan=True)
    tasks_of(config, store)
    folder = _folder(config)
    tuning_of(config, folder / FITS)
    arms = plan(config, store, overrides)
    _preflight(config, arms)
    protocol = freeze(config, store, folder)
    progress.publish(progress.Note(f"Protocol {protocol[:12]} is frozen."))
    for arm, own in arms:
        if own:
            _train(arm, own)
    return folder, run_study(config, store, [arm for arm, _ in arms], folder, protocol)


def _check(config: Config) -> None:
    """Refuse what cannot be compared, before anything is opened."""
    problems = [text for holds, text in _refusals(config) if holds]
    if problems:
        raise ConfigError(f"{'; '.join(problems)}.")


def _refusals(config: Config) -> Iterator[tuple[bool, str]]:
    own, simulation = config["study"], config["simulation"]
    parted = simulation["partition"] != "natural" or simulation["only"] is not None or simulation["pool"]
    yield (
        parted or simulation["scanner_shift"] > 0,
        "fedssl study compares real sites: leave simulation.partition=natural, simulation.only=null, "
        "simulation.pool=false and simulation.scanner_shift=0",
    )
    yield (
        config["training"]["local_seconds"] is not None,
        "with training.local_seconds nobody knows how many images an arm sees: set training.local_epochs or "
        "training.local_steps",
    )
    yield (
        by_patient(config),
        "with privacy=patient patients are split in another way and arms cannot see equally many images: compare with "
        "python -m simulations.privacy_table",
    )
    yield (
        config["federation"]["patience"] is not None,
        "federation.patience would let one arm see fewer images than the others: leave it null",
    )
    unknown = sorted({*own["arms"], *own["finetune"]["arms"]} - set(KINDS))
    yield bool(unknown), f"study.arms and study.finetune.arms may hold {', '.join(KINDS)}, not {', '.join(unknown)}"
    yield FEDERATED not in own["arms"], "study.arms must hold federated"
    yield (
        own["leave_one_out"] and SCRATCH not in own["arms"],
        "study.leave_one_out=true needs scratch in study.arms, to compare with",
    )
    yield (
        own["leave_one_out"] and config["evaluation"]["patients"] != "test",
        "study.leave_one_out=true needs evaluation.patients=test: a site left out has test patients only",
    )
    for name, changed in own["variants"].items():
        for key in _wrong_keys(changed):
            yield True, f"study.variants.{name} must not change {key}: every arm needs the same images, splits, encoder"


def _wrong_keys(changed: Sequence[str]) -> list[str]:
    keys = [text.split("=", 1)[0].lstrip("+") for text in changed]
    return [key for key in keys if key != _ALLOWED and any(f"{key}.".startswith(f"{g}.") for g in _NOT_IN_A_VARIANT)]


def _folder(config: Config) -> Path:
    folder = Path(config["run_dir"])
    if folder.exists() and any(folder.iterdir()) and not (folder / PROTOCOL).exists():
        raise ConfigError(f"The folder {folder} holds something that is no study. Choose another with name=NAME.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder.absolute()


def plan(config: Config, store: ImageStore, overrides: Sequence[str]) -> list[Planned]:
    """Plan the arms with the overrides that train them (none where nothing is to be trained)."""
    kinds, weights = config["study"]["arms"], config["study"]["natural_weights"]
    arms: list[Planned] = [(Arm(SCRATCH), [])] if SCRATCH in kinds else []
    if NATURAL in kinds:
        reason = "" if weights else "no file of weights was given (study.natural_weights)"
        arms.append((Arm(NATURAL, missing=reason), []))
    base = [text for text in overrides if not text.startswith(_OF_THE_STUDY)]
    base.append(f"simulation.arms=[{FEDERATED}]")
    for variant, changed in {"": [], **config["study"]["variants"]}.items():
        for kind, site, own in _pretrained(config, store, [*base, *changed]):
            loaded = settings.load(own)
            folder = Path(config["study"]["encoders"]).absolute() / weights_key(loaded, store)
            arms.append((Arm(kind, site, variant, folder), [*own, f"run_dir={folder}", "resume=true"]))
    return arms


def _pretrained(config: Config, store: ImageStore, base: Sequence[str]) -> list[tuple[str, str, list[str]]]:
    """Plan one pretraining: together, pooled, each alone, without each; gives kind, site and overrides."""
    kinds, names = config["study"]["arms"], chosen_sites(config, store)
    own = settings.load(base)
    sites = simulated_sites(own, store)
    planned = [(FEDERATED, "", list(base))]
    if POOLED in kinds:
        planned.append((POOLED, "", only_one_site(own, sites, base, None)))
    if ALONE in kinds:
        planned += [(ALONE, site, only_one_site(own, sites, base, site)) for site in names]
    if config["study"]["leave_one_out"] and len(names) > 2:
        planned += [(WITHOUT, site, _outside(config, base, names, site)) for site in names]
    return planned


def _outside(config: Config, base: Sequence[str], sites: Sequence[str], site: str) -> list[str]:
    kept = [text for text in base if not text.startswith(("data.sites=", "data.unseen_sites=", "federation.sites="))]
    inside = ",".join(quoted(other) for other in sites if other != site)
    unseen = ",".join(quoted(other) for other in [*config["data"]["unseen_sites"], site])
    return [*kept, f"data.sites=[{inside}]", f"data.unseen_sites=[{unseen}]", "federation.sites=null"]


def _preflight(config: Config, arms: Sequence[Planned]) -> None:
    """Build what every arm needs and throw it away: better known now than after hours of training."""
    left = len({arm.site for arm, _ in arms if arm.kind == WITHOUT}) - 1
    for arm, overrides in arms:
        if not overrides:
            if not arm.missing:
                load_encoder(arm, config)
            continue
        own = settings.load(overrides)
        check_settings(own)
        least = max(own["federation"]["min_sites"], build_aggregator(own).least_sites)
        if arm.kind == WITHOUT and left < least:
            raise ConfigError(
                f"{arm.name} leaves {left} sites, and {least} are needed. Lower federation.min_sites, or set "
                "study.leave_one_out=false."
            )


def _train(arm: Arm, overrides: Sequence[str]) -> None:
    assert arm.folder is not None
    known = RunFolder(arm.folder).last.exists()
    progress.publish(progress.Note(f"{arm.name}: {'found' if known else 'to be trained'} as {arm.folder.name}"))
    arm.folder.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(arm.folder.with_suffix(".lock")):
        simulate(list(overrides))
