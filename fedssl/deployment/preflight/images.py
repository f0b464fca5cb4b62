"""Checks of the hospital's images before joining: index, speed of decoding, time of a round."""

import copy
import os
import resource
import secrets
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from fedssl import progress
from fedssl.build import build_method, first_state
from fedssl.build_site import build_agent
from fedssl.config import Config, fingerprint
from fedssl.data.batches import Batches
from fedssl.data.decoding.workers import Answer, Question, decode_all
from fedssl.data.indexing import journal
from fedssl.data.store import Store
from fedssl.deployment.preflight.look import Look
from fedssl.deployment.preflight.report import FAIL, NOT_TOLD, OK, UNKNOWN, WARN, Figure, Finding
from fedssl.errors import DataError, StorageError
from fedssl.order import Order
from fedssl.private_outlook import plan_privacy
from fedssl.site.agent import SiteAgent
from fedssl.site.memory import SiteMemory

_FEWEST = 5  # patients behind a figure
_MUCH, _OLD_DAYS, _DAY_S = 0.1, 30, 86400.0
_DECODE_S, _FILE_S, _PARTS, _BATCH = 30.0, 20.0, 16, 64
_WARM, _STEPS, _SLOW_S = 2, 5, 60.0
_LATE = 0.7  # share of the deadline
_FIRST = "The index comes first."
_REFUSED = "is refused"


def index(look: Look) -> Finding:
    """Open the index as the agent would, and let the agent say whether it can take part. Nothing is indexed."""
    if look.config is None:
        return Finding("index", UNKNOWN, "Which images are wanted follows from the plan, which cannot be composed.")
    if not look.indexed:
        found = "The images were not indexed yet with the settings of kit and plan; a round would have to wait for it."
        return Finding("index", FAIL, found, f"Index them: {look.index_command()}")
    policy = look.rules.node_config() if look.rules is not None else {}
    try:
        agent = build_agent(look.config, {**look.kit.node_config(), **policy})
        agent.check()
        agent.check_start()
    except (DataError, StorageError) as error:
        if not look.private:
            raise
        progress.publish(progress.Note(f"This stays here: {error}", alarm=True))
        raise DataError("cannot use its images; this machine's own terminal says why") from error
    look.agent = agent
    store = look.store
    assert store is not None
    days = (time.time() - (store.journal / "settings.json").stat().st_mtime) / _DAY_S
    if look.private:
        figures: dict[str, Figure] = {"days_since_scan": days, "images": NOT_TOLD, "patients": NOT_TOLD}
        return _judged("The index opens and the agent can take part. Counts are not told: private.", figures, look)
    figures = {"days_since_scan": days, **_counts(agent, store)}
    found = (
        f"{figures['images']} images of {figures['patients']} patients, of which {figures['training_images']} train."
    )
    return _judged(found, figures, look)


def _judged(found: str, figures: dict[str, Figure], look: Look) -> Finding:
    """Add what is to be said of an index that can be used."""
    advice = [
        f"{figures[name]:.0%} of the files are {name.split('_')[0]}: see unreadable.csv beside the index."
        for name in ("unreadable_share", "refused_share")
        if float(figures.get(name, 0.0)) > _MUCH
    ]
    if float(figures["days_since_scan"]) > _OLD_DAYS:
        advice.append(f"Files that came since the last scan are not known: {look.index_command()}")
    return Finding("index", WARN if advice else OK, found, " ".join(advice), figures)


def _counts(agent: SiteAgent, store: Store) -> dict[str, Figure]:
    images, summary = agent.images.store, store.summary()
    patients, modality = images.column("patient"), images.column("modality")
    files, unreadable = (sum(site[name] for site in summary["sites"]) for name in ("files", "unreadable"))
    refused = sum(count for reason, count in summary["unreadable"].items() if reason.startswith(_REFUSED))
    figures: dict[str, Figure] = {
        "images": len(images), "training_images": len(agent.images), "patients": _told(len(np.unique(patients))),
        "files": files, "unreadable_share": (unreadable - refused) / max(1, files),
        "refused_share": refused / max(1, files),
    }  # fmt: skip
    for name in np.unique(modality):
        here = modality == name
        if len(np.unique(patients[here])) >= _FEWEST:
            figures[f"images_{name}"] = int(here.sum())
    return figures


def _told(patients: int) -> Figure:
    return patients if patients >= _FEWEST else f"fewer than {_FEWEST}"


def decode(look: Look) -> Finding:
    """Decode some files anew in one process, and read images from the cache."""
    if look.agent is None or look.store is None:
        return Finding("decode", UNKNOWN, _FIRST)
    speed, files, failed = _decoded(look.store, look.images)
    figures: dict[str, Figure] = {"images_per_s": speed, "cached_images_per_s": _read(look.agent, look.images)}
    if not look.private:
        figures |= {"files_decoded": files, "files_failed": failed}
    found = (
        f"One process decodes {speed:.0f} images/s; {figures['cached_images_per_s']:.0f} images/s come from the cache."
    )
    if files and failed > files * _MUCH:
        many = "Many" if look.private else f"{failed} of {files}"
        return Finding(
            "decode", WARN, f"{found} {many} files cannot be decoded any more.", look.index_command(), figures
        )
    if not files:
        found = "No file could be decoded anew: those of the index are gone."
        return Finding("decode", WARN, found, f"Look for changes: {look.index_command()}", figures)
    return Finding("decode", OK, found, "", figures)


def _decoded(store: Store, most: int) -> tuple[float, int, int]:
    """Images a second, files, and how many of those failed; the start of the process does not count."""
    given, decoding = _questions(store, most, time.monotonic() + _DECODE_S), store.decoding
    answers = decode_all(
        given, count=1, edge=decoding.edge, burned_in=decoding.burned_in, memory_gb=decoding.memory_gb,
        timeout_s=min(_FILE_S, decoding.timeout_s),
    )  # fmt: skip
    images, files, failed, begin, first = 0, 0, 0, time.perf_counter(), 0.0
    for answer in answers:
        files, failed = files + 1, failed + (answer.found["kind"] != "image")
        images += _images(answer)
        first = first or time.perf_counter() - begin
        if files == 1:
            images, begin = 0, time.perf_counter()
            alone = _images(answer)
    if files < 2:
        return (alone / first if files else 0.0), files, failed
    return images / max(1e-9, time.perf_counter() - begin), files, failed


def _images(answer: Answer) -> int:
    return len(answer.found["records"])


def _questions(store: Store, most: int, end: float) -> Iterator[Question]:
    """Ask for files that were images, chosen by chance from some parts of the journal."""
    rng, root = np.random.default_rng(), store.source.root
    base = root.parent if root.is_file() else root
    names = journal.parts(store.journal)
    chosen = rng.permutation(names)[:_PARTS]
    tables = [
        pq.read_table(store.journal / name / "files.parquet", columns=["file", "kind", "stated"]) for name in chosen
    ]
    known = {row["file"]: row["stated"] for table in tables for row in table.to_pylist() if row["kind"] == "image"}
    for file in rng.permutation(np.asarray(sorted(known), object))[:most]:
        path = base / file
        if time.monotonic() > end:
            return
        if path.exists():
            facts = path.stat()
            request = {"path": os.fspath(path), "modality": known[file], "trouble": "", "bytes": facts.st_size,
                       "modified_ns": facts.st_mtime_ns}  # fmt: skip
            yield Question(request, None)


def _read(agent: SiteAgent, most: int) -> float:
    rows = np.random.default_rng().integers(len(agent.images), size=max(1, most))
    begin = time.perf_counter()
    for start in range(0, len(rows), _BATCH):
        agent.images.read(rows[start : start + _BATCH])
    return len(rows) / (time.perf_counter() - begin)


def round_time(look: Look) -> Finding:
    """Say how long a round will take; a private plan is measured on noise, so that no patient's budget is touched."""
    if look.agent is None or look.config is None:
        return Finding("round", UNKNOWN, _FIRST)
    config = look.config
    if look.private:
        cost = plan_privacy(["data.root=unused", *look.kit.plan])["cost"]
        step, whole, steps, memory = cost["step_s"], cost["round_s"], int(config["privacy"]["steps"]), cost["memory_gb"]
    else:
        step, whole, steps, memory = _trained(look.agent, config)
    figures: dict[str, Figure] = {"step_s": step, "steps": steps, "round_s": whole, "memory_gb": memory}
    rounds = int(config["federation"]["rounds"])
    found = f"A round takes about {_span(whole)} ({step:.2g} s a step), all {rounds} of them {_span(whole * rounds)}."
    deadline = float(config["federation"]["deadline_s"])
    if whole > _LATE * deadline:
        late = whole > deadline
        advice = (
            f"The server waits {_span(deadline)} for a round. Use a GPU, or ask the operator for fewer local steps "
            "(training.local_steps, training.local_seconds) or a longer federation.deadline_s."
        )
        return Finding("round", FAIL if late else WARN, found, advice, figures)
    return Finding("round", OK, found, "", figures)


def _span(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


def _trained(agent: SiteAgent, config: Config) -> tuple[float, float, int, float]:
    """Train a few steps on the site's images; gives seconds of step and round, steps of a round, peak memory in GB."""
    trial, state = copy.copy(agent), first_state(config, build_method(config))
    with tempfile.TemporaryDirectory(prefix="fedssl-preflight-") as folder:
        trial.memory = SiteMemory(Path(folder), agent.site)
        step, rest = _timed(trial, _order(config), state, _WARM)
        if step * _WARM < _SLOW_S:
            step, rest = _timed(trial, _order(config), state, _STEPS)
    work = agent.work
    batches = Batches(
        agent.images, work.batch_size, work.epochs, 0, work.pairing, agent.labels, agent.method.classes, work.steps
    )
    whole = rest + (step * len(batches) if work.seconds is None else max(work.seconds, step))
    device = next(agent.method.parameters()).device
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    return step, whole, len(batches), memory / 1e9


def _order(config: Config) -> Order:
    return Order(secrets.token_hex(8), 1, int(config["federation"]["rounds"]), fingerprint(config))


def _timed(agent: SiteAgent, order: Order, state: Any, steps: int) -> tuple[float, float]:  # noqa: ANN401 - tensors by name
    """Seconds of a step, and of all that a round does beside its steps."""
    agent.work = replace(agent.work, steps=steps, seconds=None)
    begin = time.perf_counter()
    seconds = agent.train(order, state).metrics["seconds"]
    return seconds / steps, max(0.0, time.perf_counter() - begin - seconds)
