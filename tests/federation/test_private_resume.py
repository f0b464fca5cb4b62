"""A private run that was interrupted goes on, and pays for the round that was cut off."""

import json

import pytest

from fedssl import progress
from fedssl.run_folder import RunFolder
from fedssl.storage import read_jsonl
from simulations.run import simulate


def test_an_interrupted_private_run_is_resumed_within_its_budget_and_the_cut_off_round_is_paid_for(tiny, tmp_path):
    kept = [text for text in tiny if not text.startswith(("heads.num_prototypes", "augment.crops.local"))]
    settings = [
        *kept, "augment.crops.local.count=0", "privacy=patient", "method.num_prototypes=4", "privacy.batch=3",
        "privacy.patients=30", "privacy.steps=2", "privacy.images=1", "privacy.engine=loop", "privacy.spare=0.9",
        "data.sites=[EAST,SOUTH]", "federation.rounds=3", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip

    def interrupt(event):
        if isinstance(event, progress.Step) and event.round == 2 and event.site == "SOUTH":
            raise KeyboardInterrupt

    stop = progress.listen(interrupt)
    with pytest.raises(KeyboardInterrupt):
        simulate(settings)
    stop()
    simulate([*settings, "resume=true"])
    rows = read_jsonl(RunFolder(tmp_path / "run").metrics)
    assert [row["round"] for row in rows if row["site"] == "SOUTH"] == [1, 2, 3]
    assert all(row["epsilon"] <= 8.0 for row in rows)
    rounds = {}
    for path in (tmp_path / "run" / "ledgers").glob("*/ledger.jsonl"):
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        rounds[entries[0]["site"]] = [entry["round"] for entry in entries if entry["kind"] == "reserve"]
    assert rounds == {"EAST": [1, 2, 3], "SOUTH": [1, 2, 2, 3]}  # EAST had answered, and answers with the same bits
