"""All methods at equal images, views and encoder: ``python -m simulations.method_table OVERRIDES...`` prints a table.

Every method is trained with three seeds through the whole federation and scored by a linear probe on frozen features.
Runs lie in ``run_dir/METHOD-SEED``; finished ones are not repeated, so a stopped table goes on where it was.
"""

import json
import logging
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedssl.config import CONFIG_FOLDER, load
from fedssl.label_efficiency import PRETRAINED, RANDOM, RESULTS, evaluate_run
from fedssl.storage import write_json
from simulations.run import simulate

METHODS = tuple(sorted(path.stem for path in (CONFIG_FOLDER / "method").glob("*.yaml") if path.stem != "hybrid"))
SEEDS = (0, 1, 2)
FRACTIONS = (0.1, 1.0)


def main(overrides: Sequence[str]) -> None:
    """Train and score what is missing, then print and write the table."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    folder = Path(load([*overrides, "simulation.arms=[federated]"])["run_dir"])
    cells = []
    for seed in SEEDS:
        for method in METHODS:
            run = folder / f"{method}-{seed}"
            if not (run / RESULTS).exists():
                _train(overrides, method, seed, run)
            cells += list(scores_of(run, method, seed))
            print(f"{method} seed {seed}: done", file=sys.stderr, flush=True)  # noqa: T201 - a script
    write_json(folder / "methods.json", cells, "the table")
    print(table(cells))  # noqa: T201 - a script


def _train(overrides: Sequence[str], method: str, seed: int, run: Path) -> None:
    kept = [text for text in overrides if not text.startswith(("run_dir=", "method=", "seed="))]
    simulate(
        [*kept, f"method={method}", f"seed={seed}", f"run_dir={run}", "simulation.arms=[federated]", "overwrite=true"]
    )
    evaluate_run(run, changed={"fractions": list(FRACTIONS)})


def scores_of(run: Path, method: str, seed: int) -> Iterator[dict[str, Any]]:
    """AUROC of the trained and of the random encoder by domain and share of labels, with the signs of collapse."""
    rounds = [json.loads(line) for line in (run / "round_metrics.jsonl").read_text().splitlines()]
    collapsed = sorted(rounds[-1]["ssl/collapse"])
    for score in json.loads((run / RESULTS).read_text())["scores"]:
        if score["probe"] == "linear" and score["encoder"] in {PRETRAINED, RANDOM}:
            name = method if score["encoder"] == PRETRAINED else "random weights"
            signs = collapsed if score["encoder"] == PRETRAINED else []
            yield {
                "method": name, "seed": seed, "domain": score["domain"], "fraction": score["fraction"],
                "auroc": score["value"], "collapsed": signs, "loss": rounds[-1]["train/loss"],
            }  # fmt: skip


def table(cells: Sequence[dict[str, Any]]) -> str:
    """Write mean and range over the seeds as a Markdown table, with the sites that collapsed."""
    domains = list(dict.fromkeys(cell["domain"] for cell in cells))
    columns = [(domain, share) for share in reversed(FRACTIONS) for domain in domains]
    titles = [f"{domain}, {share:.0%}" for domain, share in columns]
    lines = [f"| method | {' | '.join(titles)} | collapsed at the end |", "|---" * (len(columns) + 2) + "|"]
    for method in dict.fromkeys(cell["method"] for cell in cells):
        own = [cell for cell in cells if cell["method"] == method]
        row = [_summary([c["auroc"] for c in _at(own, *column)]) for column in columns]
        seeds = sorted({cell["seed"] for cell in own if cell["collapsed"]})
        lines.append(f"| {method} | {' | '.join(row)} | {_collapse(seeds, own)} |")
    return "\n".join(lines)


def _at(cells: Sequence[dict[str, Any]], domain: str, fraction: float) -> list[dict[str, Any]]:
    """Take the cells of one column, one for each seed."""
    chosen = {c["seed"]: c for c in cells if c["domain"] == domain and c["fraction"] == fraction}
    return list(chosen.values())


def _summary(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _collapse(seeds: Sequence[int], cells: Sequence[dict[str, Any]]) -> str:
    sites = sorted({site for cell in cells for site in cell["collapsed"]})
    return f"seeds {', '.join(map(str, seeds))}: {', '.join(sites)}" if seeds else "no"


if __name__ == "__main__":
    main(sys.argv[1:])
