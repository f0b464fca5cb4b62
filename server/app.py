"""The server's door: a Flower ServerApp that runs the rounds and keeps the run folder."""

import secrets
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedssl import config as settings
from fedssl import progress
from fedssl.build import build_aggregator, check_settings, first_state
from fedssl.build_privacy import by_patient, check_privacy
from fedssl.checkpoint import Checkpoint
from fedssl.config import Config
from fedssl.methods.base import Method
from fedssl.run_folder import RunFolder
from server.chronicle import chronicled
from server.exchange import Plan
from server.record import Recorder
from server.remedy import Remedy
from server.rounds import RoundResult, run_rounds

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run or resume the federation that ``overrides`` in the run's configuration describes."""
    config = settings.load(settings.overrides_of(str(context.run_config.get("overrides", ""))))
    with chronicled(Path(config["run_dir"])):
        _run(grid, config)


def _run(grid: Grid, config: Config) -> None:
    fingerprint = settings.fingerprint(config)
    folder = RunFolder(Path(config["run_dir"]))
    method = check_settings(config)
    check_privacy(config, method)
    aggregator = build_aggregator(config)
    checkpoint = folder.resume(fingerprint) if config["resume"] else None
    if not config["resume"]:
        folder.start(overwrite=config["overwrite"])
    folder.save_config(config)
    if checkpoint is None:
        checkpoint = Checkpoint(first_state(config, method), secrets.token_hex(8), 0, fingerprint)
    plan = _plan(config, checkpoint, method, aggregator.least_sites)
    remedy = _remedy(config, method)
    del method  # a whole model, of no use from here on
    patience = config["federation"]["patience"]
    with Recorder(folder, checkpoint, rounds=plan.rounds, robust=aggregator.robust) as recorder:
        results = run_rounds(grid, _start(checkpoint), plan, aggregator, remedy.treat)
        while not recorder.checkpoint.stale(patience) and (result := next(results, None)):
            recorder.record(result)
        if recorder.checkpoint.stale(patience):
            done = recorder.checkpoint
            text = f"Stopped after round {done.round}: no lower loss since round {done.best_round}."
            progress.publish(progress.Note(text))


def _remedy(config: Config, method: Method) -> Remedy:
    collapse = config["collapse"]
    return Remedy(
        config["federation"]["rounds"], method.num_prototypes, method.num_blocks, method.width, config["seed"],
        collapse["reseed"], collapse["contrast"],
    )  # fmt: skip


def _start(checkpoint: Checkpoint) -> RoundResult:
    """Stand where the last round left off."""
    return RoundResult(
        checkpoint.round, dict(checkpoint.state), dict(checkpoint.memory), dict(checkpoint.mass),
        dict(checkpoint.answered), dict(checkpoint.ledgers), checkpoint.contrast, checkpoint.usual_change,
    )  # fmt: skip


def _plan(config: Config, checkpoint: Checkpoint, method: Method, least_sites: int) -> Plan:
    federation, training = config["federation"], config["training"]
    privacy = config["privacy"] if by_patient(config) else {"batch": 0, "steps": 0}
    return Plan(
        checkpoint.run, federation["rounds"], checkpoint.fingerprint, max(federation["min_sites"], least_sites),
        federation["deadline_s"], federation["wait_s"], frozenset(method.terms), tuple(federation["sites"] or ()),
        federation["participation"], config["seed"], federation["precision"], federation["largest_change"],
        federation["equipartition"], federation["sinkhorn_iterations"],
        max(training["batch_size"], privacy["batch"]), training["local_epochs"], training["local_steps"],
        training["local_seconds"] is not None, privacy["steps"], federation["rejoin_s"],
    )  # fmt: skip
