"""A federation's cost on real Flower processes: ``python -m simulations.flower_benchmark`` prints figures and goals.

One SuperLink and 2, then 8 SuperNodes on loopback, a state of 100 MB in 300 tensors, sites that answer at once; fresh
processes for every line of the table. Beside fedssl's loop, in the same run: Flower's own FedAvg with the same arrays.
Goals: the ServerApp's peak memory with 8 sites is at most 1.3 times that with 2; half precision halves the bytes.
"""

import argparse
import json
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from simulations.flower_benchmark_app.arrays import expected_state, make_state
from simulations.flower_processes import Job, Outcome, run_job

_LIMIT_S = 3600.0
_NAMES = {"ours": "fedssl", "theirs": "FedAvg"}


def main() -> int:
    """Run all jobs, print the table and the goals; 1 if a job failed."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the processes are stopped
    rows: list[dict[str, Any]] = []
    failures = 0
    for job in _jobs(options):
        try:
            with tempfile.TemporaryDirectory(prefix="flower-benchmark-") as folder:
                rows.append(_row(job, run_job(job, Path(folder), _LIMIT_S)))
                _say(_line(rows[-1]))
        except RuntimeError as error:
            failures += 1
            _say(str(error))
    goals = list(_goals(rows, *options.sites))
    for text in goals:
        _say(text)
    if options.out:
        options.out.write_text(json.dumps({"jobs": rows, "goals": goals}, indent=1))
    return min(failures, 1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100.0, help="size of the state")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sites", type=int, nargs=2, default=[2, 8], metavar=("FEW", "MANY"))
    parser.add_argument("--out", type=Path, help="write all figures here, too, as JSON")
    return parser.parse_args()


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - a script


def _jobs(options: argparse.Namespace) -> Iterator[Job]:
    few, many = options.sites
    yield Job("ours", few, options.rounds, options.megabytes)
    yield Job("ours", many, options.rounds, options.megabytes)
    yield Job("ours", many, options.rounds, options.megabytes, "float16")
    yield Job("ours", many, options.rounds, options.megabytes, "bfloat16")
    yield Job("theirs", few, options.rounds, options.megabytes)
    yield Job("theirs", many, options.rounds, options.megabytes)


def _row(job: Job, outcome: Outcome) -> dict[str, Any]:
    expected = expected_state(make_state(job.megabytes), job.sites, job.rounds, spherical=job.loop == "ours")
    figures = outcome.figures
    return {
        **asdict(job),
        **figures,
        "growth_mb": figures["peak_mb"] - figures["before_mb"],
        "round_s": statistics.median(part["seconds"] for part in figures["rounds"]),
        "up_mb": statistics.median(part["bytes_up"] for part in figures["rounds"]) / 1e6,
        "down_mb": statistics.median(part["bytes_down"] for part in figures["rounds"]) / 1e6,
        "deviation": _deviation(outcome.state, expected),
        "processes": outcome.processes,
        "job_seconds": outcome.seconds,
    }


def _deviation(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Largest difference of any value."""
    assert state.keys() == expected.keys()
    return max(float((state[name] - value).abs().max()) for name, value in expected.items())


def _line(row: Mapping[str, Any]) -> str:
    rounds = ", ".join(f"{part['seconds']:.1f} (push {part['push_seconds']:.1f})" for part in row["rounds"])
    processes = "; ".join(
        f"{kind} x{use['count']}: {use['peak_mb']:.0f} MB, {use['cpu_s']:.0f} CPU s"
        for kind, use in sorted(row["processes"].items())
    )
    return (
        f"{_NAMES[row['loop']]}, {row['sites']} sites, {row['precision']}: ServerApp peak {row['peak_mb']:.0f} MB "
        f"(ru_maxrss {row['ru_maxrss_mb']:.0f}), {row['growth_mb']:.0f} above its start; "
        f"a round {row['round_s']:.1f} s ({rounds}); up {row['up_mb']:.1f} MB, down {row['down_mb']:.1f} MB; "
        f"final state within {row['deviation']:.1e} of the formula; {row['job_seconds']:.0f} s in all\n"
        f"    highest peak of one and CPU of all: {processes}"
    )


def _goals(rows: list[dict[str, Any]], few: int, many: int) -> Iterator[str]:
    found = {(row["loop"], row["sites"], row["precision"]): row for row in rows}
    for loop, goal in (("ours", " (goal 1.3)"), ("theirs", "")):
        low, high = found.get((loop, few, "float32")), found.get((loop, many, "float32"))
        if low and high:
            peak, growth = high["peak_mb"] / low["peak_mb"], high["growth_mb"] / low["growth_mb"]
            yield (
                f"{_NAMES[loop]}, memory of {many} : {few} sites: {peak:.2f}{goal}; above the start alone: {growth:.2f}"
            )
    full = found.get(("ours", many, "float32"))
    for precision in ("float16", "bfloat16"):
        half = found.get(("ours", many, precision))
        if full and half:
            up, down = half["up_mb"] / full["up_mb"], half["down_mb"] / full["down_mb"]
            yield f"bytes of {precision} : float32: up {up:.3f}, down {down:.3f} (goal 0.5)"
    for sites in (few, many):
        ours, theirs = found.get(("ours", sites, "float32")), found.get(("theirs", sites, "float32"))
        if ours and theirs:
            yield (
                f"a round with {sites} sites: fedssl {ours['round_s']:.1f} s, FedAvg {theirs['round_s']:.1f} s "
                f"(ratio {ours['round_s'] / theirs['round_s']:.2f})"
            )


if __name__ == "__main__":
    sys.exit(main())
