"""What privacy costs: ``python -m simulations.privacy_table privacy=patient OVERRIDES...`` prints a table.

The clustering method without noise and at epsilon 8, 3 and 1, three seeds each, with equal splits, encoder and steps,
scored by a linear probe beside random weights. Without noise it trains plainly on equally many images a step. Runs lie
in ``run_dir/NAME-SEED``; finished ones are not repeated, so a stopped table goes on where it was.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedssl.config import Config, load
from fedssl.label_efficiency import RESULTS, evaluate_run
from fedssl.storage import write_json
from simulations.method_table import FRACTIONS, SEEDS, scores_of, table
from simulations.run import simulate

NOBODY = "-"  # the name of no site: all train plainly, with the split of a private run
_EPSILONS = (8.0, 3.0, 1.0)


def main(overrides: Sequence[str]) -> None:
    """Train and score what is missing, then print and write the table."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    config = load([*overrides, "simulation.arms=[federated]"])
    folder = Path(config["run_dir"])
    cells: list[dict[str, Any]] = []
    for seed in SEEDS:
        for name, changed in arms(config).items():
            run = folder / f"{name}-{seed}"
            if not (run / RESULTS).exists():
                _train(overrides, changed, seed, run)
            cells += list(scores_of(run, name, seed))
            print(f"{name} seed {seed}: done", file=sys.stderr, flush=True)  # noqa: T201 - a script
    write_json(folder / "privacy.json", cells, "the table")
    print(table(cells))  # noqa: T201 - a script


def arms(config: Config) -> Mapping[str, list[str]]:
    """Overrides of each arm by name."""
    privacy = config["privacy"]
    plain = [
        f"privacy.sites=['{NOBODY}']",
        f"training.local_steps={privacy['steps']}",
        f"training.batch_size={privacy['batch'] * privacy['images']}",
    ]
    return {"epsilon inf": plain} | {f"epsilon {epsilon:g}": [f"privacy.epsilon={epsilon}"] for epsilon in _EPSILONS}


def _train(overrides: Sequence[str], changed: Sequence[str], seed: int, run: Path) -> None:
    own = {text.split("=", 1)[0] for text in changed} | {"run_dir", "seed", "simulation.arms", "overwrite"}
    kept = [text for text in overrides if text.split("=", 1)[0] not in own]
    place = [f"seed={seed}", f"run_dir={run}", "simulation.arms=[federated]", "overwrite=true"]
    simulate([*kept, *changed, *place])
    evaluate_run(run, changed={"fractions": list(FRACTIONS)})


if __name__ == "__main__":
    main(sys.argv[1:])
