"""A page that shows what was found: samples of each kind of series, and of what looks wrong. It stays at the site."""

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape
from PIL import Image

from fedssl.data.cache import ImageStore
from fedssl.storage import atomic_file

_KINDS, _SAMPLES = 60, 8
_COPIES = 12


@dataclass(frozen=True)
class _Middle:
    """[images] number of the patient, and slices between the image and the middle of its series."""

    patients: np.ndarray
    off_centre: np.ndarray


@dataclass(frozen=True)
class Strip:
    """Images of one kind: what they have in common, how many there are, and samples as data addresses."""

    title: str
    images: int
    patients: int
    samples: list[str]


def write_contact_sheet(folder: Path, store: ImageStore, summary: dict[str, Any]) -> Path:
    """Write ``contact-sheet.html`` into ``folder`` and return its path.

    Args:
        folder: of the index; for the site's own eyes.
        store: the images.
        summary: see ``fedssl.data.indexing.summary``.
    """
    off_centre = np.abs(store.column("order") - (store.column("series_length") - 1) / 2)
    middle = _Middle(np.unique(store.column("patient"), return_inverse=True)[1], off_centre)
    environment = Environment(loader=PackageLoader("fedssl.data", ""), autoescape=select_autoescape(default=True))
    page = environment.get_template("contact_sheet.html.j2").render(
        summary=summary,
        kinds=list(_kinds(store, middle)),
        wrong=list(_wrong(store, middle)),
        copies=_copies(store, middle),
    )
    path = folder / "contact-sheet.html"
    with atomic_file(path, "the contact sheet") as stream:
        stream.write(page.encode())
    return path


def _kinds(store: ImageStore, middle: _Middle) -> Iterator[Strip]:
    """The most frequent kinds: modality, series description, plane and site."""
    parts = [store.column(name) for name in ("modality", "description", "plane", "site")]
    codes = np.zeros(len(store), np.int64)
    for part in parts:
        values, code = np.unique(part, return_inverse=True)
        codes = np.unique(codes * len(values) + code, return_inverse=True)[1]
    for kind in np.argsort(-np.bincount(codes), kind="stable")[:_KINDS]:
        rows = np.flatnonzero(codes == kind)
        modality, description, plane, site = (str(part[rows[0]]) for part in parts)
        words = [modality, description or "(description shared by fewer than three patients)", plane, f"site {site}"]
        yield _strip(store, middle, rows, ", ".join(word for word in words if word))


def _wrong(store: ImageStore, middle: _Middle) -> Iterator[Strip]:
    flags = store.column("flags")
    names = sorted({name for text in np.unique(flags).tolist() for name in text.split()})
    for name in names:
        yield _strip(store, middle, np.flatnonzero(np.char.find(flags, name) >= 0), name)


def _strip(store: ImageStore, middle: _Middle, rows: np.ndarray, title: str) -> Strip:
    """Samples of as many patients as possible, from the middle of their series."""
    patients, off_centre = middle.patients[rows], middle.off_centre[rows]
    order = np.lexsort([off_centre, patients])
    first = order[np.unique(patients[order], return_index=True)[1]]
    spread = first[np.linspace(0, len(first) - 1, min(_SAMPLES, len(first))).astype(int)]
    return Strip(title, len(rows), len(first), [_picture(store, int(row)) for row in rows[spread]])


def _copies(store: ImageStore, middle: _Middle) -> list[list[str]]:
    """Sets of equal or nearly equal images of different patients."""
    copies = store.column("copies")
    order = np.argsort(copies, kind="stable")
    starts = np.flatnonzero(np.diff(copies[order], prepend=-1))
    number = middle.patients[order]
    mixed = np.minimum.reduceat(number, starts) != np.maximum.reduceat(number, starts)
    ends = np.append(starts[1:], len(order))
    shown = zip(starts[mixed][:_COPIES], ends[mixed][:_COPIES], strict=True)
    return [[_picture(store, int(row)) for row in order[start:end][:_SAMPLES]] for start, end in shown]


def _picture(store: ImageStore, row: int) -> str:
    shown = np.rint(store.read(np.array([row])).shown()[0] * 255.0).astype(np.uint8)
    image = Image.fromarray(shown[0] if len(shown) == 1 else shown.transpose(1, 2, 0))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
