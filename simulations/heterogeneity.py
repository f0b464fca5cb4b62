"""How to learn across unequal sites: ``python -m simulations.heterogeneity FOLDER OVERRIDES...`` prints a table.

Three hospitals with brain MR and six sites that each hold one class of MedNIST train together, by several rules, each
with three seeds and at equal images seen; then a linear probe finds tumours at the three and at two unseen hospitals.
``FOLDER`` holds ``brain-mr`` and ``mednist`` (see the README of the data). Finished runs are not repeated.
"""

import csv
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedssl.config import load
from fedssl.label_efficiency import RESULTS, evaluate_run
from fedssl.storage import write_json
from simulations.method_table import FRACTIONS, SEEDS, scores_of, table
from simulations.run import simulate

RULES: Mapping[str, Sequence[str]] = {
    "mean, local equipartition": (),
    "site marginals": ("federation.equipartition=site-marginals",),
    "federated Sinkhorn": ("federation.equipartition=federated-sinkhorn",),
    "step-normalised mean": ("aggregation=step_normalised",),
    "L-DAWA": ("aggregation=divergence_aware",),
    "FedEMA": ("local=ema",),
}
_A_CLASS = 200  # images of each class of MedNIST


def main(arguments: Sequence[str]) -> None:
    """Train and score what is missing, then print and write the table."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    source, overrides = Path(arguments[0]).absolute(), list(arguments[1:])
    folder = Path(load([*overrides, "data.root=."])["run_dir"])
    data = _write_manifest(source, folder)
    cells: list[dict[str, Any]] = []
    for seed in SEEDS:
        for rule, changed in RULES.items():
            run = folder / f"{rule.replace(', ', '-').replace(' ', '-')}-{seed}"
            if not (run / RESULTS).exists():
                _train([*overrides, *data, *changed, f"seed={seed}"], run)
            cells += list(scores_of(run, rule, seed))
            print(f"{rule} seed {seed}: {_telemetry(run)}", file=sys.stderr, flush=True)  # noqa: T201 - a script
    write_json(folder / "heterogeneity.json", cells, "the table")
    print(table(cells))  # noqa: T201 - a script


def _train(overrides: Sequence[str], run: Path) -> None:
    kept = [text for text in overrides if not text.startswith("run_dir=")]
    simulate([*kept, f"run_dir={run}", "simulation.arms=[federated]", "overwrite=true"])
    evaluate_run(run, changed={"fractions": list(FRACTIONS)})


def _write_manifest(source: Path, folder: Path) -> list[str]:
    """Write one manifest over both sets and one table of tumour labels; returns the overrides that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    images = list(_brain_mr(source)) + list(_mednist(source))
    labels = [row for row in images if "tumor" in row]
    _write(folder / "manifest.csv", images, ("image", "patient_id", "site"))
    _write(folder / "labels.csv", labels, ("image", "position", "tumor"))
    return [
        "+experiment=unequal_sites",
        f"data.root={folder / 'manifest.csv'}",
        f"evaluation.labels={folder / 'labels.csv'}",
    ]


def _brain_mr(source: Path) -> Iterator[dict[str, str]]:
    with (source / "brain-mr" / "labels.csv").open(encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            known = {"patient_id": row["patient"], "site": row["site"], "position": row["position"]}
            yield {"image": str(source / "brain-mr" / row["file"]), "tumor": row["tumor"], **known}


def _mednist(source: Path) -> Iterator[dict[str, str]]:
    """Give the first images of each class, each a patient of its own, the class its site."""
    taken: dict[str, int] = {}
    with (source / "mednist" / "labels.csv").open(encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            taken[row["label"]] = taken.get(row["label"], 0) + 1
            if taken[row["label"]] <= _A_CLASS:
                yield {
                    "image": str(source / "mednist" / row["file"]),
                    "patient_id": Path(row["file"]).stem + row["label"],
                    "site": row["label"],
                }


def _write(path: Path, rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file" if name == "image" and path.name == "labels.csv" else name for name in columns])
        writer.writerows([row[name] for name in columns] for row in rows)


def _telemetry(run: Path) -> str:
    """Say what the last round showed of the clusters."""
    last = json.loads((run / "round_metrics.jsonl").read_text().splitlines()[-1])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["round"] == last["round"]]
    figures = [(row["site"], row["effective_prototypes"], row["released_prototypes"]) for row in rows]
    used = ", ".join(f"{site} {effective:.0f}/{released:.0f}" for site, effective, released in figures)
    return (
        f"loss {last['train/loss']:.3f}, agreement {last['ssl/prototype_agreement']:.3f}, information of the cluster "
        f"on the site {last['ssl/site_nmi']}, effective/released prototypes: {used}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
