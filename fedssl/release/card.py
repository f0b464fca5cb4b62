"""The card of an encoder: what it is, what it was made from, what it gives away, and what it is not for.

Headings after Mitchell et al. 2019 (Model cards for model reporting). Figures and names of sites only: no path, no
file's name, no patient.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedssl import __version__
from fedssl.errors import DataError
from fedssl.run_folder import RunFolder
from fedssl.storage import atomic_file, read_jsonl

CARD, AUDIT, _EVALUATION = "MODEL_CARD.md", "audit.json", "evaluation.json"
_PRIVACY = "privacy/epsilon"
Facts = Mapping[str, Any]


def write_card(folder: RunFolder, identity: Facts) -> Path:
    """Write ``MODEL_CARD.md`` of a checkpoint into its run folder; figures of other weights are not on it.

    Args:
        folder: of the run; its ``evaluation.json`` and ``audit.json`` are used where they are of these weights.
        identity: see ``fedssl.weights.identity``.

    Returns:
        Its path.

    Raises:
        DataError: one of these files is damaged.
    """
    config = folder.config()
    rounds = [row for row in read_jsonl(folder.round_metrics) if row["round"] <= identity["round"]]
    evaluation, audit = (_read(folder.path / name) for name in (_EVALUATION, AUDIT))
    sections = {
        "Model details": _details(identity, config),
        "Intended use": _use(),
        "Training data": _data(identity, audit),
        "Evaluation": _evaluation(identity, evaluation),
        "Privacy": _privacy(config, rounds),
        "Leakage": _leakage(identity, audit),
        "Limits": _limits(identity, audit, evaluation),
    }
    lines = [f"# Model card: {_plain(identity['method'])} encoder {identity['sha256'][:12]}", ""]
    for title, body in sections.items():
        lines += [f"## {title}", "", *body, ""]
    path = folder.path / CARD
    with atomic_file(path, "the model's card") as stream:
        stream.write("\n".join(lines).encode())
    return path


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path.name} is damaged. Delete it, or make it again.") from error
    return loaded


def _plain(text: object) -> str:
    """Keep a name from being read as Markdown or HTML."""
    kept = " ".join(str(text).split())
    return "".join(f"\\{sign}" if sign in "\\`*_{}[]<>#|!" else sign for sign in kept)


def _details(identity: Facts, config: Facts) -> Iterator[str]:
    encoder = config["encoder"]
    yield f"- Image encoder, pretrained without labels by several sites together; fedssl {__version__}."
    yield f"- SHA-256 of the weights: `{identity['sha256']}`"
    yield f"- Fingerprint of the configuration: `{identity['fingerprint']}`"
    yield f"- Method: {_plain(identity['method'])}."
    yield f"- Encoder: {_plain(encoder['name'])} for images of {encoder['in_chans']} channel(s)."
    yield f"- Rounds: {identity['round']}. Images seen in training, with repetition: {identity['images_seen']}."
    yield f"- Sites of the last round: {', '.join(map(_plain, identity['sites']))}."


def _use() -> Iterator[str]:
    yield "Research on medical images: features for classifiers that a site trains on labels of its own."
    yield "Not a medical device: no diagnosis, no treatment, no use on patients without validation at the site."


def _data(identity: Facts, audit: Facts | None) -> Iterator[str]:
    yield f"- {len(identity['sites'])} sites; the images stayed there. Counts only:"
    if audit is not None and _same(audit["checkpoint"], identity):
        data = audit["data"]
        yield (
            f"- Patients compared in the audit (at most 512 on a side): {data['members']} who trained, "
            f"{data['held_out']} held out; {data['images']} images."
        )
        if audit["synthetic"]:
            yield "- The images are synthetic: figures say nothing about real patients."
    else:
        yield f"- {identity['images_seen']} images seen in training, with repetition."


def _same(other: Facts | None, identity: Facts) -> bool:
    return other is not None and other.get("sha256") == identity["sha256"]


def _evaluation(identity: Facts, results: Facts | None) -> Iterator[str]:
    if results is None:
        yield "Not evaluated."
        return
    if not _same(results["encoders"].get("federated"), identity):
        yield "Not evaluated: the evaluation in the run's folder is of other weights."
        return
    yield f"Label: {_plain(results['label'])}. AUROC of linear probes on the frozen features, 95 % interval:"
    yield ""
    yield "| Test patients | Encoder | Share of the labels | AUROC |"
    yield "|---|---|---|---|"
    shown = [row for row in results["scores"] if row["probe"] == "linear" and row["encoder"] in results["encoders"]]
    most = max((row["fraction"] for row in shown), default=1.0)
    for row in shown:
        if row["fraction"] == most and row.get("metric", "auroc") == "auroc":
            yield (
                f"| {_plain(row['domain'])} | {_plain(row['encoder'])} | {100 * row['share']:.0f} % | {_figure(row)} |"
            )


def _figure(row: Facts | None) -> str:
    if row is None or row["value"] is None:
        return "not known"
    if row["low"] is None or row["high"] is None:
        return f"{row['value']:.3f}"
    return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def _privacy(config: Facts, rounds: list[dict[str, Any]]) -> Iterator[str]:
    spent: dict[str, float] = {}
    for row in rounds:  # a site that was absent in the last round has spent what it had spent before
        spent |= row.get(_PRIVACY) or {}
    if not spent:
        yield "No differential privacy: nothing bounds what the weights may give away of a patient."
        return
    delta = (config.get("privacy") or {}).get("delta")
    yield f"Differential privacy for patients, by site (delta {delta if delta is not None else 'not recorded'}):"
    yield ""
    for site, epsilon in sorted(spent.items()):
        yield f"- {_plain(site)}: epsilon {epsilon:.3g}"
    if missing := sorted({site for row in rounds for site in row.get("federation/sites", [])} - spent.keys()):
        yield f"- Without differential privacy: {', '.join(map(_plain, missing))}"


def _leakage(identity: Facts, audit: Facts | None) -> Iterator[str]:
    if audit is None:
        yield "Not audited (`fedssl audit`)."
    elif not _same(audit["checkpoint"], identity):
        yield "Not audited: the audit in the run's folder is of other weights. Run `fedssl audit` again."
    else:
        yield from (f"- {_plain(sentence)}" for sentence in audit["sentences"])


def _limits(identity: Facts, audit: Facts | None, evaluation: Facts | None) -> Iterator[str]:
    yield "- Weights are not anonymous. What was measured is not all that can be found."
    if audit is not None and _same(audit["checkpoint"], identity):
        yield from (f"- {_plain(sentence)}" for sentence in audit["limits"])
    if evaluation is not None and evaluation.get("synthetic"):
        yield "- Evaluated on synthetic images: the figures say nothing about real patients."
    yield "- Features tell where an image was made; a classifier on them may learn the site in place of the disease."
