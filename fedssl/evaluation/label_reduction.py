"""How many fewer labels, and how many fewer images seen, a pretrained model needs to reach a baseline.

Whatever is not reached counts as the worst in an interval, whose ends are always draws, never a mixture of two.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Real

from fedssl.evaluation.statistics import TAIL, tail_of

_ROUNDING = 1e-12  # running means of a plateau differ by as much
_FEWER = " times fewer"


@dataclass(frozen=True)
class Reduction:
    """Label reduction 1 / f*, a factor; NaN: not known.

    Attributes:
        times: interpolated on log f; 0: not reached.
        low: lower end of the 95 % interval; 0: not reached.
        high: upper end, at most 1 / the smallest fraction; 0: not reached.
        grid: the conservative figure, 1 / the smallest measured fraction from which on all reach it; 0: none.
        at_least: the curve is there at its first point already, so that ``times`` is a lower limit.
        high_at_least: likewise for ``high``.
        low_at_least: likewise for ``low``.
        reached: share of the bootstrap draws in which it is reached.
    """

    times: float
    low: float
    high: float
    grid: float
    at_least: bool
    high_at_least: bool
    low_at_least: bool
    reached: float

    def text(self) -> str:
        """Say it in words, as "4.2 times fewer labels (95 % interval 1.9 to at least 33)"."""
        estimate = _in_words(self.times, at_least=self.at_least)
        unit = " labels" if self.times > 0 else " even with all labels" if self.times == 0 else ""
        low = _in_words(self.low, at_least=self.low_at_least)
        high = _in_words(self.high, at_least=self.high_at_least)
        if low == high:
            ends = f": {low}"
        elif not all(end.endswith(_FEWER) for end in (estimate, low, high)):
            ends = f": {low.removesuffix(_FEWER) if high.endswith(_FEWER) else low} to {high}"
        else:
            ends = f" {low.removesuffix(_FEWER)} to {high.removesuffix(_FEWER)}"
        return f"{estimate}{unit} (95 % interval{ends})"


def _in_words(times: float, *, at_least: bool) -> str:
    """Say a factor with at most three digits; a lower limit is rounded down."""
    if not times > 0:
        return "not reached" if times == 0 else "not known"
    scale = 10.0 if times < 10 else 1.0 if times < 1000 else 10.0 ** (2 - math.floor(math.log10(times)))
    rounded = (math.floor(times * scale + _ROUNDING) if at_least else round(times * scale)) / scale
    number = f"{rounded:.1f}".removesuffix(".0")
    if number == "1":
        return "at most as many" if at_least else "as many"
    return "at least " * at_least + number + _FEWER


def label_reduction(
    curve: Float[np.ndarray, "fractions draws"],
    baseline: Float[np.ndarray, " draws"],
    fractions: Sequence[float],
    patients: int | None = None,
) -> Reduction:
    """Compare a curve over label fractions with a baseline trained on all labels: 1 / f* (REMEDIS, Azizi et al. 2022).

    f* is the smallest fraction at which the curve, linear in log f between the measured fractions, is at least the
    baseline.

    Args:
        curve: metric of the pretrained model; column 0 is the estimate, the others are bootstrap draws.
        baseline: metric of the baseline in the same draws. Draws with a NaN in either are left out.
        fractions: of the labels, truly labelled, in any order, above 0 and up to 1.
        patients: how many the draws are of; the interval of few is widened, see ``statistics.tail_of``.
    """
    shares, order = np.sort(np.asarray(fractions, dtype=np.float64)), np.argsort(fractions)
    assert shares[0] > 0
    assert shares[-1] <= 1
    gaps = curve[order].astype(np.float64) - baseline
    known = ~np.isnan(gaps).any(0)
    most = float(1 / shares[0])
    times = np.full(len(known), np.nan)
    times[known] = _times(gaps[:, known], shares)
    draws = times[1:][known[1:]]
    low, high = _ends(draws, tail_of(patients))
    return Reduction(
        times=float(times[0]),
        low=low,
        high=high,
        grid=_grid(gaps[:, 0], shares) if known[0] else math.nan,
        at_least=bool(times[0] >= most),
        high_at_least=high >= most,
        low_at_least=low >= most,
        reached=float((draws > 0).mean()) if len(draws) else math.nan,
    )


def _times(
    gaps: Float[np.ndarray, "points draws"], shares: Float[np.ndarray, " points"]
) -> Float[np.ndarray, " draws"]:
    """1 / f* of each draw; 0 where it is not reached, exactly 1 / f_min where it is at the first point."""
    times = np.minimum(np.exp(-_first_reached(gaps, np.log(shares))), 1 / shares[0])
    times[gaps[0] >= 0] = 1 / shares[0]
    return np.nan_to_num(times, nan=0.0)


def _grid(gaps: Float[np.ndarray, " points"], shares: Float[np.ndarray, " points"]) -> float:
    """1 / the smallest measured fraction from which on all reach it; 0: not even the largest does."""
    lasting = np.logical_and.accumulate((gaps >= 0)[::-1])[::-1]
    return float(1 / shares[lasting.argmax()]) if lasting.any() else 0.0


def _first_reached(
    gaps: Float[np.ndarray, "points draws"], places: Float[np.ndarray, " points"]
) -> Float[np.ndarray, " draws"]:
    """First place at which the piecewise-linear gap is at least 0; NaN: nowhere.

    Args:
        gaps: finite, at each place.
        places: rising.
    """
    above, draws = gaps >= 0, np.arange(gaps.shape[1])
    after = above.argmax(0)
    before = np.maximum(after - 1, 0)
    rise, missing = gaps[after, draws] - gaps[before, draws], -gaps[before, draws]
    part = np.divide(missing, rise, out=np.zeros_like(rise), where=rise > 0)  # 0 at the first place
    return np.where(above.any(0), places[before] + part * (places[after] - places[before]), np.nan)


def _ends(values: Float[np.ndarray, " draws"], tail: float = TAIL) -> tuple[float, float]:
    """Draws at two percentiles, rounded outwards, with a share of the draws beyond each; NaN of no draws."""
    if not len(values):
        return math.nan, math.nan
    ordered, outside = np.sort(values), math.floor(tail * (len(values) - 1) + _ROUNDING)
    return float(ordered[outside]), float(ordered[-1 - outside])


@dataclass(frozen=True)
class SpeedUp:
    """Convergence speed-up in percent; NaN: not reached; negative: slower.

    Attributes:
        percent: of the mean curves over seeds.
        low: lower end of the 95 % interval over draws of seeds.
        high: upper end.
        reached: share of the seeds whose curve reaches the best value of its own scratch run.
    """

    percent: float
    low: float
    high: float
    reached: float

    def text(self) -> str:
        """Say it in words, as "speed-up of 75.0 % [60.1, 80.2]"."""
        estimate = "not reached" if math.isnan(self.percent) else f"speed-up of {self.percent:.1f} %"
        low, high = ("not reached" if math.isnan(end) else f"{end:.1f}" for end in (self.low, self.high))
        seeds = f", reached by {self.reached:.0%} of the seeds" if self.reached < 1 else ""
        return f"{estimate} [{low}, {high}]{seeds}"


def smoothed(values: Float[np.ndarray, " checks"], window: int = 3) -> Float[np.ndarray, " checks"]:
    """Centred running mean over an odd number of checks, over fewer at the ends."""
    assert window % 2 == 1
    half, kernel = window // 2, np.ones(window)
    inside = slice(half, half + len(values))
    return np.convolve(values, kernel)[inside] / np.convolve(np.ones(len(values)), kernel)[inside]


def speed_up(
    curves: Float[np.ndarray, "seeds checks"],
    scratch: Float[np.ndarray, "seeds checks"],
    images: Real[np.ndarray, " checks"],
    *,
    seed: int = 0,
    draws: int = 1000,
) -> SpeedUp:
    """Convergence speed-up 100 (1 - T / T_scratch) (Ghesu et al. 2022).

    T is the first number of images at which the smoothed mean curve over seeds, linear between checks, reaches the best
    smoothed value of the mean scratch curve; T_scratch when scratch itself does. A curve that is there at the first
    check has T = images[0]. If scratch is best before it has seen an image, any T above 0 counts as not reached.

    The interval holds the spread of the seeds alone: of one seed it has no width, of a few it is narrow.

    Args:
        curves: validation metric of the pretrained model, finite, higher is better.
        scratch: likewise without pretraining; row by row the same seeds.
        images: seen at each check, rising; the first may be 0.
        seed: of the draws.
        draws: of pairs of seeds with replacement.
    """
    assert np.isfinite(curves).all()
    assert np.isfinite(scratch).all()
    assert images[0] >= 0
    assert (np.diff(images) > 0).all()
    alone = np.arange(len(curves))
    picked = np.random.default_rng(seed).integers(len(curves), size=(draws, len(curves)))
    fast, slow = (np.stack([smoothed(row) for row in rows.astype(np.float64)]) for rows in (curves, scratch))
    together, each, drawn = (
        _percent(fast[rows].mean(1), slow[rows].mean(1), images.astype(np.float64))
        for rows in (alone[None], alone[:, None], picked)
    )
    values = float(together[0]), *_ends(drawn)
    percent, low, high = (value if math.isfinite(value) else math.nan for value in values)
    return SpeedUp(percent, low, high, reached=float(np.isfinite(each).mean()))


def _percent(
    curves: Float[np.ndarray, "draws checks"],
    scratch: Float[np.ndarray, "draws checks"],
    images: Float[np.ndarray, " checks"],
) -> Float[np.ndarray, " draws"]:
    """Speed-up of each pair of smoothed curves; minus infinity where it is not reached."""
    goal = scratch.max(1) - _ROUNDING
    time, time_scratch = (_first_reached(values.T - goal, images) for values in (curves, scratch))
    ratio = np.divide(time, time_scratch, out=np.where(time == 0, 1.0, np.inf), where=time_scratch > 0)
    return 100 * (1 - np.nan_to_num(ratio, nan=np.inf, posinf=np.inf))
