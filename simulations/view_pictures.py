"""The pictures of docs/views.md: ``python -m simulations.view_pictures`` draws them into docs/images.

``views.png`` shows each change alone, ``presets.png`` the views of each preset. All images are synthetic
(``fedssl.data.phantom``); nothing in them comes from a patient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Generator, Tensor
from torch.nn import functional as F

from fedssl import intensity
from fedssl.augment import Changes, Crops
from fedssl.build import build_views
from fedssl.config import load
from fedssl.data import phantom
from fedssl.data.batches import ImageBatch
from fedssl.data.cache import HOUNSFIELD_LOW, HOUNSFIELD_SPAN
from fedssl.data.modality import MODALITIES
from fedssl.intensity import Images

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "images"
IMAGE_SEED, DRAWS = 3, 5
IMAGE_EDGE, TILE, LOCAL = 192, 96, 60  # pixels of an image, of a tile or global view, of a local view
LABEL_WIDTH, GAP, HEADER = 190, 4, 26
SHADES = 51  # of grey in the file, to keep it small
KINDS = {"radiography": "CR", "ct": "CT", "mr": "MR", "ultrasound": "US"}
NAMES = {"radiography": "radiograph", "ct": "CT", "mr": "MR", "ultrasound": "ultrasound"}
# The grey values of the phantom's air, fat, soft tissue, liver and bone, and what they are in Hounsfield units.
PHANTOM_GREY, PHANTOM_UNITS = (0.0, 0.2, 0.44, 0.55, 0.9), (-1000.0, -100.0, 30.0, 70.0, 800.0)
OWN_WINDOW = (40.0, 400.0)  # centre and width


@dataclass(frozen=True)
class Row:
    """One row of tiles.

    Attributes:
        title: what is shown.
        setting: its name and strength.
        kind: of the image, a key of ``KINDS``.
        draw: makes views with grey values from 0 to 1.
        seed: of the draws, one that shows how far they go.
    """

    title: str
    setting: str
    kind: str
    draw: Callable[[ImageBatch, Generator], Images]
    seed: int = 0


def main() -> None:
    """Draw both pictures."""
    _save("views.png", ["image", *["view"] * DRAWS], [_row_of_changes(row) for row in ROWS])
    titles = ["image", *["global view"] * 3, *["local view"] * 3]
    _save("presets.png", titles, [_row_of_preset(kind) for kind in KINDS])


def synthetic(kind: str, count: int) -> ImageBatch:
    """Draw one synthetic image of a modality and repeat it."""
    rng = np.random.default_rng(IMAGE_SEED)
    anatomy = phantom.random_anatomy(rng)
    finding = phantom.random_finding(rng, KINDS[kind], lesion=True)
    grey = phantom.draw(KINDS[kind], anatomy, 0.0, finding, IMAGE_EDGE)
    is_ct = kind == "ct"
    low, high = 0.0, 1.0
    if is_ct:
        grey = (np.interp(grey, PHANTOM_GREY, PHANTOM_UNITS) - HOUNSFIELD_LOW) / HOUNSFIELD_SPAN
        centre, width = OWN_WINDOW
        low, high = ((centre + side * width / 2.0 - HOUNSFIELD_LOW) / HOUNSFIELD_SPAN for side in (-1.0, 1.0))
    values = torch.tensor(grey, dtype=torch.float32).expand(count, 1, -1, -1).contiguous()
    limits = [torch.full((count, 1, 1, 1), value) for value in (low, high)]
    mask = torch.full((count, 1, 1, 1), fill_value=True) if is_ct else None
    group = torch.full((count,), MODALITIES.index(kind))
    return ImageBatch(values, limits[0], limits[1], mask, group)


def _whole(images: Images) -> Images:
    """The whole image at the size of a tile."""
    return F.interpolate(images, size=(TILE, TILE), mode="area")


def _crops(edge: int, area: tuple[float, float], changes: Changes) -> Callable[[ImageBatch, Generator], Images]:
    return lambda images, generator: _grey(changes.view(images, generator, Crops(DRAWS, edge, area)))


def _values(change: Callable[[Images, Generator], Images]) -> Callable[[ImageBatch, Generator], Images]:
    return lambda images, generator: change(_whole(images.shown()), generator)


def _windows(probability: float, jitter: float) -> Callable[[ImageBatch, Generator], Images]:
    return lambda images, generator: _whole(
        intensity.clinical_window(images, generator, probability=probability, jitter=jitter)
    )


def _grey(view: Tensor) -> Tensor:
    """Undo ``fedssl.augment.standardise``."""
    return view * 0.25 + 0.25


ROWS = (
    Row("crops, global", "area [0.3, 1.0]", "radiography", _crops(TILE, (0.3, 1.0), Changes())),
    Row("crops, local", "area [0.08, 0.3]", "radiography", _crops(LOCAL, (0.08, 0.3), Changes()), 1),
    Row("rotation", "rotation: 45", "radiography", _crops(TILE, (1.0, 1.0), Changes(rotation=45.0)), 18),
    Row("flip", "flip: true", "ultrasound", _crops(TILE, (1.0, 1.0), Changes(flip=True)), 3),
    Row("energy", "energy: 0.8", "mr", _values(lambda x, g: intensity.energy(x, g, strength=0.8)), 4),
    Row("gamma", "gamma: 0.4", "radiography", _values(lambda x, g: intensity.gamma(x, g, strength=0.4)), 5),
    Row(
        "linear intensity", "contrast: 0.4, brightness: 0.15", "mr",
        _values(lambda x, g: intensity.linear_intensity(x, g, contrast=0.4, brightness=0.15)), 6,
    ),
    Row("blur", "blur: 2.0", "ultrasound", _values(lambda x, g: intensity.blur(x, g, sigma=2.0)), 7),
    Row("noise", "noise: 0.05", "mr", _values(lambda x, g: intensity.noise(x, g, sigma=0.05)), 8),
    Row("CT windows", "ct_windows: 1.0", "ct", _windows(1.0, 0.0)),
    Row("CT window jitter", "ct_jitter: 0.2", "ct", _windows(0.0, 0.2), 10),
)  # fmt: skip
Line = tuple[str, str, list[Tensor]]


def _row_of_changes(row: Row) -> Line:
    images = synthetic(row.kind, DRAWS)
    views = row.draw(images, torch.Generator().manual_seed(row.seed))
    return row.title, f"{row.setting}\n{NAMES[row.kind]}", [_whole(images.shown())[0, 0], *views[:, 0]]


def _row_of_preset(kind: str) -> Line:
    sizes = [f"augment.crops.global.edge={TILE}", f"augment.crops.local.edge={LOCAL}"]
    counts = ["augment.crops.global.count=3", "augment.crops.local.count=3"]
    views = build_views(load(["data.root=.", f"augment={kind}", *sizes, *counts]))
    images = synthetic(kind, 1)
    made = views(images, torch.Generator().manual_seed(3)).views
    return NAMES[kind], f"augment={kind}", [_whole(images.shown())[0, 0], *[_grey(view)[0, 0] for view in made]]


def _save(name: str, titles: Sequence[str], lines: Sequence[Line]) -> None:
    """Write rows of tiles with their labels."""
    step = TILE + GAP
    picture = Image.new("L", (LABEL_WIDTH + step * len(titles), HEADER + step * len(lines)), 255)
    pen, large, small = ImageDraw.Draw(picture), ImageFont.load_default(15), ImageFont.load_default(12)
    for column, title in enumerate(titles):
        pen.text((LABEL_WIDTH + column * step + TILE // 2, HEADER // 2), title, 0, small, anchor="mm")
    for row, (title, setting, tiles) in enumerate(lines):
        top = HEADER + row * step
        pen.text((10, top + 14), title, 0, large)
        pen.multiline_text((10, top + 38), setting, 90, small, spacing=5)
        for column, tile in enumerate(tiles):
            shades = (tile.clamp(0.0, 1.0) * (SHADES - 1)).round() * (255.0 / (SHADES - 1))
            inset = (TILE - tile.shape[-1]) // 2
            place = (LABEL_WIDTH + column * step + inset, top + inset)
            picture.paste(Image.fromarray(shades.numpy().astype(np.uint8)), place)
    FOLDER.mkdir(parents=True, exist_ok=True)
    picture.save(FOLDER / name, optimize=True)


if __name__ == "__main__":
    main()
