"""The server's door: a Flower ServerApp that runs the rounds and keeps the run folder."""

import secrets
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedssl import config as settings
from fedssl.build import build_aggregator, check_settings, first_state
from fedssl.checkpoint import Checkpoint
from fedssl.run_folder import RunFolder
from server.exchange import Plan
from server.record import Recorder
from server.remedy import Remedy
from server.rounds import RoundResult, run_rounds

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run or resume the federation that ``overrides`` in the run's configuration describes."""
    config = settings.load(settings.overrides_of(str(context.run_config.get("overrides", ""))))
    fingerprint = settings.fingerprint(config)
    folder = RunFolder(Path(config["run_dir"]))
    method = check_settings(config)
    checkpoint = folder.resume(fingerprint) if config["resume"] else None
    if not config["resume"]:
        folder.start(overwrite=config["overwrite"])
    folder.save_config(config)
    if checkpoint is None:
        checkpoint = Checkpoint(first_state(config, method), secrets.token_hex(8), 0, fingerprint)
    federation = config["federation"]
    plan = Plan(
        checkpoint.run, federation["rounds"], fingerprint, federation["min_sites"], federation["deadline_s"],
        federation["wait_s"], frozenset(method.terms),
    )  # fmt: skip
    collapse = config["collapse"]
    remedy = Remedy(
        plan.rounds, method.num_prototypes, method.num_blocks, method.width, config["seed"], collapse["reseed"],
        collapse["contrast"],
    )  # fmt: skip
    start = RoundResult(checkpoint.round, dict(checkpoint.state), contrast=checkpoint.contrast)
    with Recorder(folder, checkpoint, rounds=plan.rounds) as recorder:
        for result in run_rounds(grid, start, plan, build_aggregator(config), remedy.treat):
            recorder.record(result)
