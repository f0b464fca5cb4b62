"""Scanner shift: every simulated site sees its images as if they came from another machine.

What differs between scanners and their processing: sharpness, noise, brightness, contrast (the changes of Zhang et al.
2020, IEEE TMI 39(7), 2531, arXiv 1906.03347), gamma, and a smooth bias field (Tustison et al. 2010, IEEE TMI 29(6),
1310; on radiographs the heel effect looks alike, on ultrasound the gain by depth). The ranges are ours.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.ndimage import gaussian_filter

from fedssl.data.cache import HOUNSFIELD_SPAN, Pixels, Subset
from fedssl.errors import ConfigError

# At strength 1. Each is drawn uniformly from minus to plus this, noise from a third of it to all of it.
GAMMA, CONTRAST, BRIGHTNESS, FIELD = 0.5, 0.4, 0.1, 0.15
BLUR = 0.012  # of the image's edge: the standard deviation of the point spread
SHARPENING = 1.0
NOISE, HOUNSFIELD_NOISE = 0.05, 30.0  # standard deviations: grey values from 0 to 1, Hounsfield units

Values = Float[np.ndarray, "batch channels edge edge"]


@dataclass(frozen=True)
class ScannerShift:
    """The fixed change of one site's images. ``draw`` makes one.

    Grey values from 0 to 1 become clip(c (x' - 1/2) + 1/2 + b + s n), x' = clip(P(x) exp(field))^g, P the point spread
    and n white Gaussian noise. Hounsfield units have a meaning that calibration keeps equal on all scanners: CT in
    Hounsfield units gets only point spread and noise, P(x) + s n, and its window stays.

    Attributes:
        strength: 0 to 1; at 0 images stay exactly as they are.
        blur: standard deviation of a Gaussian as a share of the image's edge; 0 where the site sharpens.
        sharpening: factor a of unsharp masking, x + a (x - G(x)); 0 where the site blurs.
        field: coefficients of x, y, xy, x^2 - 1/3 and y^2 - 1/3 in the logarithm of the bias field; x and y run from
            -1 to 1 over the image.
        gamma: exponent g.
        contrast: factor c.
        brightness: summand b.
        noise: standard deviation as a share of the full range: 0.05 in grey values, 30 Hounsfield units.
        noise_seed: of the noise; that of an image is a function of this and its row.
    """

    strength: float
    blur: float
    sharpening: float
    field: tuple[float, float, float, float, float]
    gamma: float
    contrast: float
    brightness: float
    noise: float
    noise_seed: int

    @classmethod
    def draw(cls, site: str, strength: float, seed: int) -> "ScannerShift":
        """Draw a site's change, a pure function of its name and the seed; the strength scales it.

        Args:
            site: its name.
            strength: 0 (images stay as they are) to 1.
            seed: another one makes other scanners.

        Raises:
            ConfigError: the strength is not from 0 to 1.
        """
        if not 0.0 <= strength <= 1.0:
            raise ConfigError(f"simulation.scanner_shift must be a number from 0 to 1, not {strength:g}.")
        digest = hashlib.sha256(f"{seed}/{site}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8]))
        sharpness, gamma, contrast, brightness, *field = (strength * rng.uniform(-1.0, 1.0, 9)).tolist()
        x, y, xy, xx, yy = (FIELD * coefficient for coefficient in field)
        return cls(
            strength=strength,
            blur=BLUR * max(0.0, -sharpness),
            sharpening=SHARPENING * max(0.0, sharpness),
            field=(x, y, xy, xx, yy),
            gamma=float(np.exp(GAMMA * gamma)),
            contrast=float(np.exp(CONTRAST * contrast)),
            brightness=BRIGHTNESS * brightness,
            noise=strength * rng.uniform(1.0 / 3.0, 1.0),
            noise_seed=int.from_bytes(digest[8:16]),
        )

    def apply(self, pixels: Pixels, rows: Int[np.ndarray, " batch"]) -> Pixels:
        """Change images; equal rows get equal noise whenever they are read.

        Args:
            pixels: the images; they are left as they are.
            rows: [batch] their rows in the store.

        Returns:
            New pixels: grey values from 0 to 1, Hounsfield units unclipped; with the limits of the old ones.
        """
        if self.strength == 0.0:
            return pixels
        values = self._point_spread(pixels.values)
        grey = ~pixels.hounsfield
        values[grey] = self._processed(values[grey])
        values += self._noise(rows, pixels.hounsfield, values.shape[-1])
        values[grey] = values[grey].clip(0.0, 1.0)
        return Pixels(values, pixels.low, pixels.high, pixels.hounsfield)

    def _point_spread(self, values: Values) -> Values:
        """Blur or sharpen; a new array, whose flat regions have their old values."""
        share = BLUR if self.sharpening else self.blur
        sigma = share * values.shape[-1]
        smooth = gaussian_filter(values, (0.0, 0.0, sigma, sigma), mode="nearest")
        return values + np.float32(self.sharpening) * (values - smooth) if self.sharpening else smooth

    def _processed(self, values: Values) -> Values:
        """Bias field, gamma, contrast and brightness of grey values from 0 to 1."""
        place = np.linspace(-1.0, 1.0, values.shape[-1])
        x, y = place[None, :], place[:, None]
        terms = (x, y, x * y, x**2 - 1.0 / 3.0, y**2 - 1.0 / 3.0)
        gain = np.exp(sum(weight * term for weight, term in zip(self.field, terms, strict=True)))
        bent = (values * gain.astype(np.float32)).clip(0.0, 1.0) ** np.float32(self.gamma)
        return np.float32(self.contrast) * (bent - np.float32(0.5)) + np.float32(0.5 + self.brightness)

    def _noise(
        self, rows: Int[np.ndarray, " batch"], hounsfield: Bool[np.ndarray, " batch"], edge: int
    ) -> Float[np.ndarray, "batch 1 {edge} {edge}"]:
        """White noise, the same in all channels: a grey image stays grey."""
        level = self.noise * np.where(hounsfield, HOUNSFIELD_NOISE / HOUNSFIELD_SPAN, NOISE).astype(np.float32)
        drawn = np.empty((len(rows), 1, edge, edge), np.float32)
        for image, row in zip(drawn, rows.tolist(), strict=True):
            np.random.default_rng([self.noise_seed, row]).standard_normal(out=image, dtype=np.float32)
        return level[:, None, None, None] * drawn


@dataclass(frozen=True)
class Together(Subset):
    """Images of several sites as one site, each as it is at its own.

    Attributes:
        parts: of the sites; ``rows`` are theirs in this order.
    """

    parts: Sequence[Subset]

    @classmethod
    def of(cls, parts: Sequence[Subset]) -> "Together":
        """Put the images of sites together, ordered as in the store."""
        rows = np.concatenate([part.rows for part in parts])
        return cls(parts[0].store, rows, parts)

    def read(self, positions: np.ndarray) -> Pixels:
        """Copy images out of the map by their position in this subset."""
        ends = np.cumsum([len(part) for part in self.parts])
        owner = np.searchsorted(ends, positions, side="right")
        read: list[Pixels] = []
        order: list[np.ndarray] = []
        for number in np.unique(owner):
            places = np.flatnonzero(owner == number)
            part = self.parts[number]
            read.append(part.read(positions[places] - (ends[number] - len(part))))
            order.append(places)
        back = np.argsort(np.concatenate(order))
        return Pixels(*(np.concatenate([getattr(one, field.name) for one in read])[back] for field in fields(Pixels)))


@dataclass(frozen=True)
class ShiftedSubset(Subset):
    """Rows of a store as a site's scanner shows them.

    Attributes:
        shift: of the site.
    """

    shift: ScannerShift

    def read(self, positions: np.ndarray) -> Pixels:
        """Copy images out of the map by their position in this subset, changed by the site's scanner."""
        rows = self.rows[positions]
        return self.shift.apply(self.store.read(rows), rows)
