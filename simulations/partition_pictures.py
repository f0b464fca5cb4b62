"""The picture of docs/partitions.md: ``python -m simulations.partition_pictures`` draws it into docs/images.

Charts: images of each class at each site, by every partition, of MedNIST (each file its own patient) and of the brain
MR set; sets that are absent are left out. Below: images through the scanners of four sites. The charts hold counts
only; all images shown are synthetic (``fedssl.data.phantom``) and nothing in them comes from a patient.
"""

import argparse
import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from pyarrow import csv
from torch.nn import functional as F

from fedssl.data import partition
from fedssl.data.cache import Pixels
from fedssl.data.scanner_shift import ScannerShift
from simulations.view_pictures import FOLDER, GAP, KINDS, NAMES, SHADES, TILE, synthetic

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SITES, SEED = 5, 0
STRENGTHS, SCANNERS = (0.5, 1.0), ("site-1", "site-2", "site-3", "site-4")
MODALITY_OF = {"AbdomenCT": "CT", "BreastMRI": "MR", "CXR": "CR", "ChestCT": "CT", "Hand": "CR", "HeadCT": "CT"}
DRAWN = (
    ("iid", 1.0), ("modality", 1.0), ("quantity", 0.5), ("dirichlet", 0.1), ("dirichlet", 1.0), ("dirichlet", 100.0),
)  # fmt: skip
COLUMNS = 4  # charts in a row
DOTS, WIDTH, CHART, LEFT, TITLES, LABEL, HEADER = 100, 1020, 265, 82, 60, 102, 62  # dots an inch; the others in pixels


class Panel(NamedTuple):
    """One chart: the site and the class of each image."""

    title: str
    sites: np.ndarray
    classes: np.ndarray


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mednist", type=Path, default=SHARED / "mednist", help="folder with labels.csv")
    parser.add_argument("--brain-mr", type=Path, default=SHARED / "brain-mr", help="folder with labels.csv")
    parser.add_argument("--target", type=Path, default=FOLDER / "partitions.png")
    arguments = parser.parse_args()
    brain = list(_brain_panels(arguments.brain_mr / "labels.csv"))
    panels = [*brain[:1], *_mednist_panels(arguments.mednist / "labels.csv"), *brain[1:]]
    rows = -(-len(panels) // COLUMNS)
    tiles = HEADER + len(KINDS) * (TILE + GAP)
    height = rows * CHART + tiles
    figure = Figure(figsize=(WIDTH / DOTS, height / DOTS), dpi=DOTS)
    for number, panel in enumerate(panels):
        row, column = divmod(number, COLUMNS)
        left, bottom = LEFT + column * WIDTH / COLUMNS, height - (row + 1) * CHART + TITLES - 22
        box = (WIDTH / COLUMNS - LEFT - 8, CHART - TITLES - 22)
        _chart(figure.add_axes((left / WIDTH, bottom / height, box[0] / WIDTH, box[1] / height)), panel)
    _scanners(figure, tiles, height)
    _save(figure, arguments.target)


def _save(figure: Figure, target: Path) -> None:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DOTS)
    target.parent.mkdir(parents=True, exist_ok=True)
    grey = np.asarray(Image.open(stream).convert("L")) / 255.0
    shades = np.rint(np.rint(grey * (SHADES - 1)) * (255.0 / (SHADES - 1)))
    Image.fromarray(shades.astype(np.uint8)).save(target, optimize=True)


def _brain_panels(labels: Path) -> Iterator[Panel]:
    """The five hospitals as they are, and the same patients dealt out by tumour."""
    if not labels.exists():
        return
    table = csv.read_csv(labels)
    sites, patients = (np.array(table[name].to_pylist()) for name in ("site", "patient"))
    tumour = np.where(table["tumor"].to_numpy() == 1, "tumour", "no tumour")
    for kind, title in (("natural", "natural"), ("dirichlet", "dirichlet, alpha 0.1")):
        made = partition.assign(
            kind, groups=patients, labels=tumour, modalities=np.full(len(sites), "MR"), natural_sites=sites,
            sites=SITES, alpha=0.1, seed=SEED,
        )  # fmt: skip
        yield Panel(f"{title}\n(brain MR, 110 patients)", made, tumour)


def _mednist_panels(labels: Path) -> Iterator[Panel]:
    if not labels.exists():
        return
    table = csv.read_csv(labels)
    files, classes = (np.array(table[name].to_pylist()) for name in ("file", "label"))
    modalities = np.array([MODALITY_OF[name] for name in classes.tolist()])
    for kind, alpha in DRAWN:
        made = partition.assign(
            kind, groups=files, labels=classes, modalities=modalities, natural_sites=np.full(len(files), "all"),
            sites=SITES, alpha=alpha, seed=SEED,
        )  # fmt: skip
        suffix = f", alpha {alpha:g}" if kind in {"quantity", "dirichlet"} else ""
        yield Panel(f"{kind}{suffix}\n(MedNIST)", made, classes)


def _chart(axes: Axes, panel: Panel) -> None:
    """Number of images of each class at each site; below, all of the site."""
    sites, site = np.unique(panel.sites, return_inverse=True)
    classes, row = np.unique(panel.classes, return_inverse=True)
    counts = np.zeros((len(classes), len(sites)), np.int64)
    np.add.at(counts, (row, site), 1)
    axes.imshow(counts, cmap="Greys", vmin=0, vmax=1.4 * counts.max(), aspect="auto")
    for (i, j), count in np.ndenumerate(counts):
        colour = "white" if count > 0.6 * counts.max() else "black" if count else "#aaaaaa"
        axes.text(j, i, str(count), ha="center", va="center", fontsize=7, color=colour)
    ticks = [f"{name}\n{total}" for name, total in zip(sites, counts.sum(0), strict=True)]
    axes.set_xticks(range(len(sites)), ticks, fontsize=7)
    axes.set_yticks(range(len(classes)), classes, fontsize=7)
    axes.set_title(panel.title, fontsize=9)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)


def _scanners(figure: Figure, top: int, height: int) -> None:
    """One synthetic image of each kind as it is, and through each site's scanner at two strengths."""
    shifts = [ScannerShift.draw(site, strength, SEED) for strength in STRENGTHS for site in SCANNERS]
    step = TILE + GAP

    def write(text: str, left: float, bottom: float, side: str = "center") -> None:
        figure.text(left / WIDTH, bottom / height, text, ha=side, va="center", fontsize=8)

    for row, kind in enumerate(KINDS):
        bottom = top - HEADER - (row + 1) * step
        pixels = _pixels(kind)
        seen = [pixels, *(shift.apply(pixels, np.array([row])) for shift in shifts)]
        for column, tile in enumerate(seen):
            left = LABEL + column * step + (GAP * 2) * -(-column // len(SCANNERS))
            figure.figimage(tile.shown()[0, 0], left, bottom, cmap="gray", vmin=0.0, vmax=1.0, origin="upper")
            if row == 0:
                write(["as stored", *SCANNERS * len(STRENGTHS)][column], left + TILE / 2, top - HEADER + 8)
        write(NAMES[kind] + ("\n(Hounsfield)" if pixels.hounsfield[0] else ""), LABEL - 8, bottom + TILE / 2, "right")
    for number, strength in enumerate(STRENGTHS):
        middle = LABEL + (1 + (number + 0.5) * len(SCANNERS)) * step + 2 * GAP * (number + 1)
        write(f"scanner shift {strength:g} (synthetic images)", middle, top - HEADER + 26)


def _pixels(kind: str) -> Pixels:
    """A synthetic image at the size of a tile, as the store would give it."""
    batch = synthetic(kind, 1)
    values = F.interpolate(batch.values, size=(TILE, TILE), mode="area").numpy()
    low, high = batch.low.numpy()[:, 0, 0, 0], batch.high.numpy()[:, 0, 0, 0]
    return Pixels(values, low, high, np.array([batch.hounsfield is not None]))


if __name__ == "__main__":
    main()
