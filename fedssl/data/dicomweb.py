"""A mirror of a site's archive (PACS), pulled by DICOMweb into folders whose names tell no patient.

The layout is ``<patient>/<series>/<instance>.dcm``, all pseudonyms; the files hold the archive's own bytes. A file is
whole or absent, so a pull that was stopped goes on where it was. What the archive has deleted since, or what other
filters chose before, stays in the mirror.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from fedssl import progress
from fedssl.data.dicomweb_client import Item, Server, address_of, matches, number, refuse_another, split, text
from fedssl.data.dicomweb_trouble import Patience, Trouble
from fedssl.data.pseudonym import pseudonym
from fedssl.errors import DataError, StorageError
from fedssl.storage import atomic_file, exclusive

_GIVE_UP_AFTER = 10  # failures in a row that the server, not the image, is to blame for
_TICK_S, _BETWEEN_NOTES_S, _SILENCE_S = 0.2, 5.0, 30.0


@dataclass(frozen=True)
class Pulled:
    """How many instances matched, and how many of them are new, were there before, or failed (by reason)."""

    instances: int
    new: int
    present: int
    failed: dict[str, int]


def pull(
    url: str,
    folder: Path,
    secret: bytes,
    *,
    filters: Mapping[str, str],
    connections: int = 4,
    retries: int = 5,
    timeout: tuple[float, float] = (10.0, 120.0),
    pause: float = 1.0,
) -> Pulled:
    """Pull every instance that matches and is not yet in the mirror.

    Args:
        url: the DICOMweb root, as ``dicomweb+https://host/dicom-web``; who asks is in FEDSSL_DICOMWEB_USER and
            FEDSSL_DICOMWEB_PASSWORD, or in FEDSSL_DICOMWEB_TOKEN.
        folder: the mirror.
        secret: the site's key for pseudonyms.
        filters: keyword and value (PS3.4, section C.2.2.2). Servers may pass over a filter, so answers are checked.
            Beside Modality, ModalitiesInStudy spares looking into studies that hold none.
        connections: how many studies are pulled at a time.
        retries: how often a request is made again.
        timeout: seconds for connecting, and for silence within an answer.
        pause: seconds before the second attempt, doubled each time up to a minute.

    Raises:
        ConfigError: the address, the variables or a filter are unusable.
        DataError: the server cannot be used, stopped answering, or holds nothing that matches.
        StorageError: the mirror could not be written.
    """
    address = address_of(url)
    of_study, of_series = split(filters)
    _make_private(folder)
    run = _Run(folder, secret, of_study, of_series)
    patience = Patience(retries, timeout, pause, run.tell, run.stop)
    with exclusive(folder / ".pulling"), ThreadPoolExecutor(connections) as pool:
        run.begin(lambda: Server(address, patience))
        workers = [pool.submit(run.work) for _ in range(connections)]
        try:
            while (state := wait(workers, _TICK_S, FIRST_EXCEPTION)).not_done:
                run.publish()
                if any(worker.exception() for worker in state.done):
                    break
        finally:
            run.stop.set()
    for worker in workers:
        worker.result()
    return run.result()


def _make_private(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"A folder of the mirror cannot be made ({error.strerror}). Check its rights.") from error


class _Run:
    """One pull: threads take study after study and count; the thread that began publishes."""

    def __init__(self, folder: Path, secret: bytes, of_study: Mapping[str, str], of_series: Mapping[str, str]) -> None:
        self.folder, self.secret, self.stop = folder, secret, threading.Event()
        self.of_study, self.of_series = of_study, of_series
        self.counting, self.listing = threading.Lock(), threading.Lock()
        self.new = self.present = self.expected = self.shown = self.troubles = 0
        self.failed, self.left_out = Counter[str](), Counter[str]()
        self.note, self.noted, self.moved = "", 0.0, time.monotonic()

    def begin(self, connect: Callable[[], Server]) -> None:
        """Make ready to list the studies."""
        self.connect, self.studies = connect, self._studies(connect())

    def tell(self, sentence: str) -> None:
        """Keep a sentence for the next time something is published."""
        self.note = sentence

    def publish(self) -> None:
        """Say how far it is, and why it is waiting or that it still is."""
        now, count = time.monotonic(), self.new + self.present + self.failed.total()
        if count != self.shown:
            self.shown, self.moved = count, now
            progress.publish(progress.Done("pulling images", count, max(count, self.expected)))
        if not self.note and now - max(self.moved, self.noted) > _SILENCE_S:
            self.note = f"Waiting for the DICOMweb server; nothing has come for {now - self.moved:.0f} s."
        if self.note and now - self.noted > _BETWEEN_NOTES_S:
            progress.publish(progress.Note(self.note))
            self.note, self.noted = "", now

    def result(self) -> Pulled:
        """Give the counts, and say what the filters could not be trusted with."""
        self.publish()
        for keyword, count in self.left_out.items():
            sentence = f"{count} answers of the DICOMweb server did not show the {keyword} asked for and were left out."
            progress.publish(progress.Note(f"{sentence} It passes over this filter or cannot show it.", alarm=True))
        if not self.shown:
            raise DataError("The archive shows nothing that matches. Check the filters, and what the account may see.")
        return Pulled(self.shown, self.new, self.present, dict(self.failed))

    def work(self) -> None:
        """Pull study after study until none is left."""
        server = self.connect()
        try:
            while (study := self._next_study()) is not None:
                self._study(server, study)
        except Trouble as trouble:
            raise DataError(trouble.sentence()) from None

    def _next_study(self) -> Item | None:
        with self.listing:
            return None if self.stop.is_set() else next(self.studies, None)

    def _studies(self, server: Server) -> Iterator[Item]:
        fields = ["PatientID", "NumberOfStudyRelatedSeries", "NumberOfStudyRelatedInstances", *self.of_study]
        for page in server.pages("StudyInstanceUID", self.of_study, fields):
            studies = self._fitting(page, self.of_study)
            self._count(expected=sum(number(study, "NumberOfStudyRelatedInstances") for study in studies))
            yield from studies

    def _fitting(self, page: list[Item], wanted: Mapping[str, str]) -> list[Item]:
        fitting = []
        for item in page:
            wrong = [keyword for keyword in wanted if not matches(text(item, keyword), wanted[keyword])]
            with self.counting:
                self.left_out.update(wrong[:1])
            fitting += [] if wrong else [item]
        return fitting

    def _count(self, *, new: int = 0, present: int = 0, expected: int = 0) -> None:
        with self.counting:
            self.new, self.present, self.expected = self.new + new, self.present + present, self.expected + expected
            self.troubles = 0 if new else self.troubles

    def _fail(self, trouble: Trouble, count: int) -> None:
        """Count what failed and go on, unless nothing more can be had."""
        with self.counting:
            self.failed[f"the server {trouble.reason}"] += count
            self.troubles += trouble.again and trouble.status != 500
        if trouble.status == 401 or self.troubles >= _GIVE_UP_AFTER:
            raise DataError(f"{trouble.sentence()} {self.new} new images have come and are kept.")

    def _study(self, server: Server, study: Item) -> None:
        uid, claimed = text(study, "StudyInstanceUID"), number(study, "NumberOfStudyRelatedInstances")
        patient = self.folder / pseudonym(self.secret, "folder-patient", text(study, "PatientID") or uid)
        fields, most = ["NumberOfSeriesRelatedInstances", *self.of_series], number(study, "NumberOfStudyRelatedSeries")
        series: list[Item] = []
        try:
            for page in server.pages("SeriesInstanceUID", self.of_series, fields, (uid,), most):
                series += self._fitting(page, self.of_series)
        except Trouble as trouble:
            self._count(expected=max(1, claimed) - claimed)
            self._fail(trouble, max(1, claimed))
            return
        self._count(expected=sum(number(one, "NumberOfSeriesRelatedInstances") for one in series) - claimed)
        for one in series:
            if not self.stop.is_set():
                self._series(server, uid, one, patient)

    def _series(self, server: Server, study: str, series: Item, patient: Path) -> None:
        uid, claimed, seen = text(series, "SeriesInstanceUID"), number(series, "NumberOfSeriesRelatedInstances"), 0
        folder = patient / pseudonym(self.secret, "folder-series", uid)
        here = {path.name for path in folder.glob("*.dcm")}
        if 0 < claimed == len(here):
            self._count(present=claimed)
            return
        _make_private(patient)
        _make_private(folder)
        for cut_off in folder.glob(".*.tmp"):
            cut_off.unlink(missing_ok=True)
        trouble: Trouble | None = None
        try:
            for page in server.pages("SOPInstanceUID", {}, (), (study, uid), claimed):
                for item in page:
                    if self.stop.is_set():
                        return
                    self._instance(server, (study, uid, text(item, "SOPInstanceUID")), folder, here)
                    seen += 1
        except Trouble as raised:
            trouble = raised
        unseen = max(1 if trouble else 0, claimed - seen)
        self._count(expected=seen + unseen - claimed)
        if unseen:
            self._fail(trouble or Trouble("counts more images than it lists"), unseen)

    def _instance(self, server: Server, uids: tuple[str, str, str], folder: Path, here: set[str]) -> None:
        file = folder / f"{pseudonym(self.secret, 'folder-instance', uids[-1])}.dcm"
        if file.name in here:
            self._count(present=1)
            return

        def fetch() -> None:
            with atomic_file(file, "an image of the mirror") as stream:
                for block in server.instance(*uids):
                    stream.write(block)
                stream.flush()
                refuse_another(Path(stream.name), uids[-1])

        try:
            server.patience.ask(fetch)
        except Trouble as trouble:
            self._fail(trouble, 1)
        else:
            here.add(file.name)
            self._count(new=1)
