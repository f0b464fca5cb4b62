"""Lists that name files: for the site's own staff, readable by their owner only, and never sent anywhere."""

import csv
import io
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from fedssl.data.cache import ImageStore
from fedssl.data.indexing.scan import read_manifest, scan
from fedssl.data.indexing.walk import order_of
from fedssl.data.store import Source
from fedssl.errors import ConfigError
from fedssl.evaluation.next_studies import Suggestion
from fedssl.storage import atomic_file

_GONE = "(removed since it was indexed)"
_FIRST = ["file", "frame"]


def files_of(store: ImageStore, source: Source, rows: Sequence[int]) -> list[str]:
    """Return the path below the root of the file of each image; the index holds only its pseudonym.

    Args:
        store: opened from ``source``.
        source: a folder, a mirror of a PACS, or a manifest: it is walked through again.
        rows: of the store.
    """
    if not rows:
        return []
    manifest = read_manifest(source.root) if source.root.is_file() else None
    base = source.root if manifest is None else source.root.parent
    files = [found.entry.file for found in scan(base, source.site, manifest)]
    names = dict(zip(store.names_of(files), files, strict=True))
    return [names.get(name, _GONE) for name in store.column("image")[list(rows)].tolist()]


def write_suggestions(path: Path, suggestions: Sequence[Suggestion], files: Sequence[str], studies: np.ndarray) -> None:
    """Write the studies to label next, the most useful first: one of their files, pseudonym, cluster, and why.

    Args:
        path: of the CSV.
        suggestions: in order.
        files: of each suggestion's row.
        studies: [images of the store] pseudonyms.
    """
    lines = [
        [rank, file, studies[one.row], one.cluster, one.why]
        for rank, (one, file) in enumerate(zip(suggestions, files, strict=True), 1)
    ]
    _write(path, ["rank", "file", "study", "cluster", "why"], lines, "the list of studies")


def write_predictions(
    path: Path,
    images: tuple[Sequence[str], Sequence[int]],
    probabilities: Float[np.ndarray, "images outputs"],
    outputs: Sequence[str],
    decisions: dict[str, list[str]],
) -> None:
    """Write a line for each image, sorted by file and frame.

    Args:
        path: of the CSV.
        images: file and frame of each.
        probabilities: of each output.
        outputs: their names.
        decisions: a column of words for each name.
    """
    columns = [*images, *(column.tolist() for column in probabilities.T), *decisions.values()]
    lines = sorted(zip(*columns, strict=True), key=lambda line: (order_of(line[0]), line[1]))
    _write(path, [*_FIRST, *outputs, *decisions], lines, "the predictions")


def refuse_sites_below(images: str, site: str, sites: Collection[str]) -> None:
    """Refuse a folder of sites that is said to be one site's: its sites would count as patients.

    Args:
        images: a folder; anything else is let through.
        site: name of the one site that is said to own it.
        sites: of the training run.

    Raises:
        ConfigError: below the folder lie folders of these names.
    """
    root = Path(images)
    below = {entry.name for entry in root.iterdir() if entry.is_dir()} if root.is_dir() else set[str]()
    found = sorted(below & {site, *sites})
    if found:
        raise ConfigError(
            f"The images' folder holds folders of sites ({', '.join(found)}), but with --site the folders in it are "
            "patients. Give --images IMAGES/SITE, or leave out --site."
        )


def refuse_predictions(path: Path, *, overwrite: bool) -> None:
    """Check, before any image is read, that predictions may be written there.

    Raises:
        ConfigError: something else is there, or predictions and ``overwrite`` is false.
    """
    if path.is_dir():
        raise ConfigError("The output of a prediction is a CSV file, but the path given is a folder. Add a file name.")
    if path.exists() and not path.read_bytes().startswith(",".join(_FIRST).encode()):
        raise ConfigError(f"{path.name} exists and holds no predictions, so it is not replaced. Choose another output.")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path.name} exists. Replace it with --overwrite, or choose another output.")


def _write(path: Path, header: Sequence[str], lines: Iterable[Sequence[object]], what: str) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    with atomic_file(path, what) as stream:
        stream.write(text.getvalue().encode())
