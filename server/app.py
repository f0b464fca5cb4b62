"""The server's door: a Flower ServerApp that runs the rounds and keeps the run folder."""

import secrets
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedssl import config as settings
from fedssl.build import build_aggregator, build_method
from fedssl.checkpoint import Checkpoint
from fedssl.run_folder import RunFolder
from fedssl.update import shared_state
from server.record import Recorder
from server.rounds import Plan, run_rounds

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run or resume the federation that ``overrides`` in the run's configuration describes."""
    config = settings.load(settings.overrides_of(str(context.run_config.get("overrides", ""))))
    fingerprint = settings.fingerprint(config)
    folder = RunFolder(Path(config["run_dir"]))
    method = build_method(config)
    checkpoint = folder.resume(fingerprint) if config["resume"] else None
    if not config["resume"]:
        folder.start(overwrite=config["overwrite"])
    folder.save_config(config)
    if checkpoint is None:
        checkpoint = Checkpoint(shared_state(method), secrets.token_hex(8), 0, fingerprint)
    federation = config["federation"]
    plan = Plan(
        checkpoint.run, federation["rounds"], fingerprint, federation["min_sites"], federation["deadline_s"],
        federation["wait_s"],
    )  # fmt: skip
    with Recorder(
        folder, checkpoint, rounds=plan.rounds, num_prototypes=method.num_prototypes, width=method.width
    ) as recorder:
        for result in run_rounds(grid, dict(checkpoint.state), checkpoint.round, plan, build_aggregator(config)):
            recorder.record(result)
