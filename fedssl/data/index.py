"""The index of a site as it is used: columns read when they are needed, from Parquet partitions."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fedssl.errors import DataError

_GROUPS = {"group", "copies"}


class Index:
    """One row an image, in partitions ``data-*.parquet`` with ``groups-*.parquet`` beside them.

    Columns: ``image`` (pseudonym of the file), ``frame``, ``site``, ``patient``, ``study``, ``series`` (pseudonyms),
    ``modality``, ``scanner``, ``description`` (shared by three patients or more, else empty), ``label``, ``order``,
    ``series_length``, ``plane``, ``rows``, ``columns``, ``shuffle`` (16-bit public hash of the patient), ``group``
    (patients that share images), ``copies`` (equal images), ``flags``, ``digest``, and where and how pixels are kept.

    Args:
        folder: of a snapshot.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths = sorted(folder.glob("data-*.parquet"))
        self.num_rows = sum(pq.read_metadata(path).num_rows for path in self.paths)

    def column(self, name: str) -> np.ndarray:
        """Read one column; strings as fixed-width text."""
        paths = [
            path.with_name(path.name.replace("data", "groups")) if name in _GROUPS else path for path in self.paths
        ]
        try:
            tables = [pq.read_table(path, columns=[name], read_dictionary=[name], memory_map=True) for path in paths]
        except FileNotFoundError as error:
            raise DataError("The index was renewed twice since it was opened. Start the command again.") from error
        values = pa.concat_tables(tables).column(0)
        if not pa.types.is_dictionary(values.type):
            return values.to_numpy()
        codes, words = coded(values)
        if words and isinstance(words[0], bytes):
            return np.asarray(words, object)[codes]
        return np.asarray(words, np.str_)[codes]


def coded(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str] | list[bytes]]:
    """Take a dictionary column apart: the number of each row's value, and the values."""
    whole = column.unify_dictionaries().combine_chunks()
    whole = whole if isinstance(whole, pa.DictionaryArray) else whole.chunk(0)
    return whole.indices.to_numpy(), whole.dictionary.to_pylist()
