"""What the value of every setting must be."""

from collections.abc import Iterator, Mapping
from typing import Any

from fedssl.errors import ConfigError

_SECTIONS = (
    "data", "encoder", "method", "augment", "optim", "aggregation", "local", "heads", "training", "federation",
    "collapse", "privacy", "simulation", "evaluation", "study",
)  # fmt: skip
Rules = Iterator[tuple[bool, str]]


def check_values(config: Mapping[str, Any]) -> None:
    """Report every impossible value at once.

    Raises:
        ConfigError: names all of them.
    """
    empty = [name for name in _SECTIONS if not isinstance(config[name], dict)]
    if empty:
        raise ConfigError(f"{', '.join(empty)} must be a group of settings, not a value. See configs/config.yaml.")
    rules = [
        *_training(config["training"]), *_federation(config["federation"]), *_data(config["data"]),
        *_evaluation(config["evaluation"]), *_simulation(config["simulation"]), *_study(config["study"]),
        *_privacy(config["privacy"]), *_others(config),
    ]  # fmt: skip
    problems = [sentence for holds, sentence in rules if not holds]
    if problems:
        raise ConfigError(f"{'; '.join(problems)}.")


def _training(training: Mapping[str, Any]) -> Rules:
    yield (_whole(training["batch_size"], 2), "training.batch_size must be a whole number of at least 2")
    yield (_positive(training["local_epochs"]), "training.local_epochs must be above 0")
    yield (training["precision"] in {"auto", "bf16", "float32"}, "training.precision must be auto, bf16 or float32")
    yield (_whole(training["threads"], 1), "training.threads must be a whole number of at least 1")
    yield (
        training["local_steps"] is None or _whole(training["local_steps"], 1),
        "training.local_steps must be null or a whole number of at least 1",
    )
    yield (
        training["local_seconds"] is None or _positive(training["local_seconds"]),
        "training.local_seconds must be null or above 0",
    )
    yield (
        training["local_steps"] is None or training["local_seconds"] is None,
        "training.local_steps and training.local_seconds exclude each other",
    )


def _federation(federation: Mapping[str, Any]) -> Rules:
    yield (_whole(federation["rounds"], 1), "federation.rounds must be a whole number of at least 1")
    yield (_whole(federation["min_sites"], 1), "federation.min_sites must be a whole number of at least 1")
    yield (_positive(federation["deadline_s"]), "federation.deadline_s must be above 0")
    yield (_positive(federation["wait_s"]), "federation.wait_s must be above 0")
    yield (federation["rejoin_s"] == 0 or _positive(federation["rejoin_s"]), "federation.rejoin_s must be 0 or more")
    yield (
        federation["sites"] is None or (isinstance(federation["sites"], list) and len(federation["sites"]) > 0),
        "federation.sites must be null or a list of names",
    )
    yield (
        _positive(federation["participation"]) and federation["participation"] <= 1,
        "federation.participation must lie above 0 and up to 1",
    )
    yield (
        federation["patience"] is None or _whole(federation["patience"], 1),
        "federation.patience must be null or a whole number of at least 1",
    )
    yield (_positive(federation["largest_change"]), "federation.largest_change must be above 0")
    yield (
        federation["precision"] in {"float32", "float16", "bfloat16"},
        "federation.precision must be float32, float16 or bfloat16",
    )
    yield (
        federation["equipartition"] in {"local", "site-marginals", "federated-sinkhorn"},
        "federation.equipartition must be local, site-marginals or federated-sinkhorn",
    )
    yield (_whole(federation["sinkhorn_iterations"], 1), "federation.sinkhorn_iterations must be at least 1")
    yield (_whole(federation["prototype_patients"], 1), "federation.prototype_patients must be at least 1")


def _data(data: Mapping[str, Any]) -> Rules:
    yield (_share(data["test_fraction"]), "data.test_fraction must be at least 0 and below 1")
    yield (_whole(data["edge"], 8), "data.edge must be a whole number of at least 8")
    yield (data["burned_in"] in {"refuse", "mask", "allow"}, "data.burned_in must be refuse, mask or allow")
    yield (_whole(data["workers"], 0), "data.workers must be a whole number, 0 for all cores")
    yield (_positive(data["worker_memory_gb"]), "data.worker_memory_gb must be above 0")
    yield (_positive(data["decode_timeout_s"]), "data.decode_timeout_s must be above 0")
    yield (data["budget_gb"] is None or _positive(data["budget_gb"]), "data.budget_gb must be null or above 0")
    yield (data["patient_from"] in {"auto", "file"}, "data.patient_from must be auto or file")
    yield (data["filters"] is None or isinstance(data["filters"], dict), "data.filters must be {KEYWORD: value, ...}")


def _evaluation(evaluation: Mapping[str, Any]) -> Rules:
    yield (_whole(evaluation["seeds"], 1), "evaluation.seeds must be a whole number of at least 1")
    yield (_whole(evaluation["bootstrap"], 10), "evaluation.bootstrap must be a whole number of at least 10")
    yield (
        isinstance(evaluation["fractions"], list) and all(_positive(f) and f <= 1 for f in evaluation["fractions"]),
        "evaluation.fractions must lie above 0 and up to 1",
    )
    label = evaluation["label"]
    yield (
        isinstance(label, str) or (isinstance(label, list) and len(label) > 0),
        "evaluation.label must be the name of a column, or a list of them",
    )
    yield (evaluation["patients"] in {"test", "validation"}, "evaluation.patients must be test or validation")


def _study(study: Mapping[str, Any]) -> Rules:
    yield (
        isinstance(study["variants"], dict) and all(isinstance(v, list) for v in study["variants"].values()),
        'study.variants must be {NAME: ["SETTING=VALUE", ...]}',
    )
    yield (
        isinstance(study["tasks"], dict)
        and all(isinstance(t, dict) and t.keys() <= {"label", "where", "covariates"} for t in study["tasks"].values()),
        "study.tasks must be {NAME: {label: ..., where: ..., covariates: ...}}",
    )
    yield (_share(study["unseen_test"]) and study["unseen_test"] > 0, "study.unseen_test must lie between 0 and 1")
    parts = study["finetune"]["parts"]
    yield (isinstance(parts, list) and set(parts) <= {"all", "last"}, "study.finetune.parts may hold all and last")
    yield (isinstance(study["arms"], list), "study.arms must be a list")


def _simulation(simulation: Mapping[str, Any]) -> Rules:
    yield (
        set(simulation["arms"]) <= {"federated", "single_site", "pooled"},
        "simulation.arms may hold federated, single_site, pooled",
    )
    yield (
        simulation["partition"] in {"natural", "iid", "dirichlet", "modality", "quantity"},
        "simulation.partition must be natural, iid, dirichlet, modality or quantity",
    )
    yield (_whole(simulation["sites"], 1), "simulation.sites must be a whole number of at least 1")
    yield (_positive(simulation["alpha"]), "simulation.alpha must be above 0")
    yield (_share(simulation["scanner_shift"], top=True), "simulation.scanner_shift must lie between 0 and 1")
    yield (
        simulation["shadow"] is None or _whole(simulation["shadow"], 0),
        "simulation.shadow must be null or a whole number of at least 0",
    )
    yield (
        _whole(simulation["canaries"], 0) and (simulation["canaries"] == 0 or simulation["shadow"] is not None),
        "simulation.canaries must be a whole number, 0 where simulation.shadow is null",
    )


def _privacy(privacy: Mapping[str, Any]) -> Rules:
    yield (privacy["unit"] in {"none", "patient"}, "privacy.unit must be none or patient")
    if privacy["unit"] != "patient":
        return
    yield (_positive(privacy["epsilon"]) and privacy["epsilon"] >= 0.1, "privacy.epsilon must be at least 0.1")
    yield (_share(privacy["delta"]) and privacy["delta"] > 0, "privacy.delta must lie between 0 and 1")
    stated = privacy["patients"].values() if isinstance(privacy["patients"], Mapping) else [privacy["patients"]]
    yield (
        len(stated) > 0 and all(_whole(patients, 2) for patients in stated),
        "privacy.patients must be a whole number of at least 2, or {SITE: number, ...}",
    )
    for name in ("batch", "steps", "images", "most_images"):
        yield (_whole(privacy[name], 1), f"privacy.{name} must be a whole number of at least 1")
    clip = privacy["clip"]
    yield (_positive(clip) and 1e-3 <= clip <= 1e3, "privacy.clip must lie between 0.001 and 1000")
    shares = [privacy["vote_share"], privacy["loss_share"]]
    yield (
        all(_share(share) and share > 0 for share in shares) and sum(shares) < 1,
        "privacy.vote_share and privacy.loss_share must lie above 0 and leave something for the gradients",
    )
    yield (_share(privacy["spare"]), "privacy.spare must be at least 0 and below 1")
    sites = privacy["sites"]
    yield (
        sites is None or (isinstance(sites, list) and len(sites) > 0),
        "privacy.sites must be null or a list of names",
    )


def _others(config: Mapping[str, Any]) -> Rules:
    yield (_share(config["optim"]["warmup"], top=True), "optim.warmup must lie between 0 and 1")
    yield (str(config["pairing"]) in {"image", "patient", "series"}, "pairing must be image, patient or series")
    yield (
        isinstance(config["collapse"]["contrast"], int | float) and config["collapse"]["contrast"] >= 1,
        "collapse.contrast must be at least 1",
    )
    yield (not (config["resume"] and config["overwrite"]), "resume=true and overwrite=true exclude each other")


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _share(value: object, *, top: bool = False) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and (0 <= value < 1 or (top and value == 1))


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
