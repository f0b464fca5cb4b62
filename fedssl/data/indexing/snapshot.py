"""From the journal to the index: one Parquet row an image, in partitions that each fit into memory.

Partitions are ranges of the patients' public hash, so that a patient and its series never span two. The index holds
pseudonyms in place of patients, studies, series and files, and no date; ``unreadable.csv`` beside it names files for
the site's own staff.
"""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fedssl import progress
from fedssl.data.index import coded
from fedssl.data.indexing import journal
from fedssl.data.indexing.duplicates import LEAST_EDGE, Duplicates, find_duplicates, joined
from fedssl.data.indexing.identity import Identities
from fedssl.data.indexing.journal import Dead
from fedssl.data.indexing.series import series_order, series_range
from fedssl.data.indexing.summary import NO_PATIENT, Summary
from fedssl.data.indexing.walk import order_of
from fedssl.data.pseudonym import pseudonym
from fedssl.data.shards import LAYOUT_NAMES, Shards
from fedssl.storage import atomic_folder, write_json

_ROWS_IN_A_PARTITION = 2**17
_LEAST_PATIENTS_OF_A_DESCRIPTION = 3
_OWN = [
    "image", "frame", "site", "study", "series", "modality", "scanner", "description", "instance", "position", "plane",
    "rows", "columns", "meaning", "slot", "scale", "offset", "low", "high", "digest", "flags",
]  # fmt: skip
_GIVEN = {"study": "study_id", "series": "series_id", "modality": "modality", "scanner": "scanner"}


def build_snapshot(folder: Path, target: Path, dead: Dead, identities: Identities, *, edge: int) -> None:
    """Write the index of all live files into the new folder ``target``, with ``summary.json``.

    Raises:
        DataError: nothing can be trained on it.
        StorageError: the disk is full.
    """
    names = journal.live_parts(folder, dead)
    total = 0
    for name in names:
        rows = journal.live_rows(folder, name, dead)
        identities.learn(rows)
        total += rows.num_rows
    bits = max(0, int(np.ceil(np.log2(max(total, 1) / _ROWS_IN_A_PARTITION))))
    summary = Summary()
    with atomic_folder(target, "the index") as made:
        nameless = _distribute(folder, names, dead, identities, made, bits)
        for partition in sorted(made.glob("raw-*.parquet")):
            table = _finished(pq.read_table(partition), alone=identities.patient_from == "file")
            pq.write_table(table, made / partition.name.replace("raw", "data"))
            partition.unlink()
            progress.publish(progress.Done("building the index", int(partition.stem[4:]) + 1, 2**bits))
            summary.add_images(table)
        _list_unreadable(_files(folder, names, dead, nameless), made / "unreadable.csv", summary)
        summary.refuse_unusable()
        summary.add_duplicates(*_groups(folder, names, made, identities.linked(), edge))
        write_json(made / "summary.json", summary.as_dict(), "the index")
        write_json(made / "parts.json", names, "the index")


def _distribute(folder: Path, names: list[str], dead: Dead, identities: Identities, made: Path, bits: int) -> set[str]:
    """Resolve the patients part by part and sort the rows into partitions; return the files that have none."""
    writers: dict[int, pq.ParquetWriter] = {}
    nameless: set[str] = set()
    try:
        for number, name in enumerate(names):
            rows = _resolved(journal.live_rows(folder, name, dead), number, identities)
            named = pa.compute.not_equal(rows["patient"], "")
            nameless.update(rows.filter(pa.compute.invert(named))["file"].to_pylist())
            rows = rows.filter(named)
            places = np.asarray(rows["shuffle"]) >> (16 - bits)
            for place in np.unique(places):
                if place not in writers:
                    writers[place] = pq.ParquetWriter(made / f"raw-{place:05d}.parquet", rows.schema)
                writers[place].write_table(rows.filter(pa.array(places == place)))
    finally:
        for writer in writers.values():
            writer.close()
    return nameless


def _resolved(rows: pa.Table, part: int, identities: Identities) -> pa.Table:
    records = rows.select(["file", "site", "patient", "shuffle", "folder", "folder_shuffle"]).to_pylist()
    people = [identities.of(record) for record in records]
    table = rows.select([*_OWN, "file", "quantiles", "hash", "hash_turned"])
    manifest = identities.manifest
    given: list[Mapping[str, str]] = [manifest[record["file"]] if manifest else {} for record in records]
    for column, name in _GIVEN.items():
        if any(facts.get(name) for facts in given):
            table = _overridden(table, column, [facts.get(name, "") for facts in given], identities.secret)
    layouts = [LAYOUT_NAMES.index(name) for name in rows["layout"].to_pylist()]
    extra = {
        "patient": pa.array([patient for patient, _ in people], pa.string()),
        "shuffle": pa.array([shuffle for _, shuffle in people], pa.int32()),
        "label": pa.array([facts.get("label", "") for facts in given], pa.string()),
        "part": pa.array([part] * len(people), pa.int32()),
        "layout": pa.array(layouts, pa.int8()),
    }
    for name, values in extra.items():
        table = table.append_column(name, values)
    return table


def _overridden(table: pa.Table, column: str, given: list[str], secret: bytes) -> pa.Table:
    """Let the manifest's word stand where it says something; studies and series as pseudonyms."""
    secretly = column in ("study", "series")
    own = table[column].to_pylist()
    values = [
        (pseudonym(secret, column, word) if secretly else word) if word else value
        for word, value in zip(given, own, strict=True)
    ]
    return table.set_column(table.column_names.index(column), column, pa.array(values, pa.string()))


def _finished(rows: pa.Table, *, alone: bool) -> pa.Table:
    """Sort a partition by file and frame, order its series and pool the range of series without a fixed scale.

    Args:
        rows: of the partition.
        alone: every file is its own patient, so that nobody knows how many patients share a description.
    """
    keys = [order_of(file) for file in rows["file"].to_pylist()]
    order = sorted(range(len(keys)), key=keys.__getitem__)  # stable: frames keep their order
    rows = rows.take(order)
    series = np.asarray(rows["series"].to_pylist())
    position = np.asarray(rows["position"].to_numpy(), np.float64)
    rank, length = series_order(series, position, _numbers(rows, "instance") * 100_000 + _numbers(rows, "frame"))
    _, scaled_together = np.unique([rows["patient"].to_pylist(), series.tolist()], axis=1, return_inverse=True)
    low, high = _ranges(rows, scaled_together)  # a series number may be shared: no patient's grey values move another's
    rows = rows.drop_columns(["file", "quantiles", "low", "high", "position", "instance"])
    columns = {
        "order": pa.array(rank, pa.int32()), "series_length": pa.array(length, pa.int32()),
        "low": pa.array(low, pa.float32()), "high": pa.array(high, pa.float32()),
    }  # fmt: skip
    for name, values in columns.items():
        rows = rows.append_column(name, values)
    return _without_descriptions(rows, pa.array([], pa.string())) if alone else _without_rare_descriptions(rows)


def _numbers(rows: pa.Table, column: str) -> np.ndarray:
    return np.asarray(rows[column].to_numpy(), np.int64)


def _ranges(rows: pa.Table, series: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low, high = (np.asarray(rows[name].to_numpy(), np.float64).copy() for name in ("low", "high"))
    raw = np.asarray(rows["meaning"].to_pylist()) == "raw"
    if raw.any():
        quantiles = np.array(rows["quantiles"].filter(pa.array(raw)).to_pylist())
        pooled = series_range(series[raw], quantiles, (_numbers(rows, "rows") * _numbers(rows, "columns"))[raw])
        inverted = low[raw] > high[raw]
        low[raw], high[raw] = np.where(inverted, pooled[::-1], pooled)
    return low, high


def _without_rare_descriptions(rows: pa.Table) -> pa.Table:
    """Free text that few patients share could name one of them."""
    pairs = rows.select(["description", "patient"]).group_by(["description", "patient"]).aggregate([])
    counts = pairs.group_by("description").aggregate([("patient", "count")])
    common = counts.filter(pa.compute.greater_equal(counts["patient_count"], _LEAST_PATIENTS_OF_A_DESCRIPTION))
    return _without_descriptions(rows, common["description"].combine_chunks())


def _without_descriptions(rows: pa.Table, kept_ones: pa.Array) -> pa.Table:
    shared = pa.compute.is_in(rows["description"], value_set=kept_ones)
    kept = pa.compute.if_else(shared, rows["description"], "")
    return rows.set_column(rows.column_names.index("description"), "description", kept)


def _groups(
    folder: Path, names: list[str], made: Path, linked: list[tuple[str, str]], edge: int
) -> tuple[Duplicates, np.ndarray]:
    """Find duplicates over all partitions and join their patients; the group of each row goes into its own file."""
    paths = sorted(made.glob("data-*.parquet"))
    columns = ["part", "layout", "slot", "patient", "series", "digest", "hash", "hash_turned", "flags"]
    words = ["patient", "series"]
    table = pa.concat_tables(pq.read_table(path, columns=columns, read_dictionary=words) for path in paths)
    shards = Shards(folder, names, edge)
    where = [_numbers(table, name) for name in ("part", "layout", "slot")]
    constant = pa.compute.match_substring(table["flags"], "constant").to_numpy()
    read = None if edge < LEAST_EDGE else lambda row: shards.grey(*(int(column[row]) for column in where))
    digests, hashes, turned = (_bytes(table, name) for name in ("digest", "hash", "hash_turned"))
    code, patients = coded(table["patient"])
    series = (
        coded(table["series"])[0].astype(np.int64) * len(patients) + code
    )  # a folder of many patients' pictures is no one series
    found = find_duplicates(digests, hashes, turned, constant, series, read)
    number = {name: place for place, name in enumerate(patients)}
    links = [(number[a], number[b]) for a, b in linked if a in number and b in number]
    pairs = np.concatenate([code[found.every()], np.array(links, np.int64).reshape(-1, 2)])
    groups = _by_first_row(joined(len(number), pairs)[code])
    copies = _by_first_row(joined(table.num_rows, found.every()))
    start = 0
    for path in paths:
        here = slice(start, start + pq.read_metadata(path).num_rows)
        pair = pa.table({"group": pa.array(groups[here], pa.int32()), "copies": pa.array(copies[here], pa.int32())})
        pq.write_table(pair, path.with_name(path.name.replace("data", "groups")))
        start = here.stop
    return found, code


def _bytes(table: pa.Table, column: str) -> np.ndarray:
    width = table.schema.field(column).type.byte_width
    chunks = [chunk for chunk in table[column].chunks if len(chunk)]
    rows = [np.frombuffer(chunk.buffers()[1], np.uint8).reshape(-1, width) for chunk in chunks]
    return np.concatenate([row[chunk.offset :][: len(chunk)] for row, chunk in zip(rows, chunks, strict=True)])


def _by_first_row(numbers: np.ndarray) -> np.ndarray:
    """Number sets by their first row, so that the numbers do not depend on the site's secret."""
    _, first, inverse = np.unique(numbers, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def _list_unreadable(files: Iterator[dict[str, Any]], path: Path, summary: Summary) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        path.chmod(0o600)
        writer = csv.writer(stream)
        writer.writerow(["file", "site", "reason"])
        for file in files:
            summary.add_file(file)
            if file["kind"] == "unreadable":
                writer.writerow([file["file"], file["site"], file["reason"]])


def _files(folder: Path, names: list[str], dead: Dead, nameless: set[str]) -> Iterator[dict[str, Any]]:
    for name in names:
        for file in journal.live_files(folder, name, dead).to_pylist():
            yield {**file, "kind": "unreadable", "reason": NO_PATIENT} if file["file"] in nameless else file
