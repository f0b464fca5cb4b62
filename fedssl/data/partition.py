"""One data set dealt out to simulated sites, by whole patients.

Patients that share images (``group`` of the index) count as one and are never torn apart. Patients are sorted before
anything is drawn: the outcome depends on the seed and on who the patients are, not on the order of the images.
"""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Int, Shaped

from fedssl.data.modality import MODALITIES, modality_groups
from fedssl.errors import ConfigError, DataError

LEAST_PATIENTS = 2  # of a drawn site: one to learn from and one that can be held out
LARGEST_ALPHA = 1e9  # shares are equal to four digits; far above, the draw overflows
_DRAWS = 100

Images = Shaped[np.ndarray, " images"]
Patients = Int[np.ndarray, " patients"]


def assign(
    kind: str,
    *,
    groups: Images,
    labels: Images,
    modalities: Images,
    natural_sites: Images,
    sites: int,
    alpha: float,
    seed: int,
) -> Images:
    """Assign every image to a simulated site, by one of five partitions.

    Args:
        kind: ``natural`` (the sites as they are), ``iid``, ``dirichlet``, ``modality`` or ``quantity``.
        groups: [images] patient of each image, patients that share images as one (column ``group``).
        labels: [images] their labels as text, empty where unknown; only ``dirichlet`` looks at them.
        modalities: [images] Modality (0008,0060); only ``modality`` looks at them.
        natural_sites: [images] site of each image in the index.
        sites: how many to draw, for ``iid``, ``dirichlet`` and ``quantity``.
        alpha: concentration of the Dirichlet distribution, for ``dirichlet`` and ``quantity``.
        seed: decides the draw.

    Returns:
        [images] names of sites: ``site-1``, ...; modalities; or the natural sites.

    Raises:
        ConfigError: ``kind``, ``sites`` or ``alpha`` is impossible.
        DataError: the images cannot be divided so.
    """
    makers: Mapping[str, Callable[[], Images]] = {
        "natural": lambda: natural_sites,
        "iid": lambda: iid(groups, sites, seed),
        "dirichlet": lambda: dirichlet(groups, labels, sites, alpha, seed),
        "modality": lambda: by_modality(groups, modalities),
        "quantity": lambda: by_quantity(groups, sites, alpha, seed),
    }
    if kind not in makers:
        raise ConfigError(f"There is no partition {kind!r}. Choose one of {', '.join(makers)}.")
    return makers[kind]()


def iid(groups: Images, sites: int, seed: int) -> Images:
    """Deal shuffled patients out one by one: sites differ by chance only, and by at most one patient in size.

    Args:
        groups: [images] patient of each image.
        sites: how many.
        seed: decides the order.

    Returns:
        [images] names of sites, ``site-1``, ...

    Raises:
        ConfigError: fewer than one site.
        DataError: fewer than two patients a site.
    """
    patient, count = _patients(groups, sites)
    return _names(np.random.default_rng(seed).permutation(count) % sites, sites)[patient]


def dirichlet(groups: Images, labels: Images, sites: int, alpha: float, seed: int) -> Images:
    """Skew the labels: the patients of each label are divided over the sites in shares drawn from Dir(alpha).

    For each label k, p_k ~ Dir(alpha 1) over the sites (Yurochkin et al. 2019, arXiv 1905.12022; Li et al. 2022, arXiv
    2102.02079, section 4). Alike but not equal: Hsu et al. 2019, arXiv 1909.06335, draw the labels' shares of each
    site, all sites of one size. A patient's label is the most frequent of their labelled images, the first by name
    where two are. Sites differ in size, too. If a site has fewer than two patients the draw is repeated, up to 100
    times; after that, such sites take patients from the largest one.

    Args:
        groups: [images] patient of each image.
        labels: [images] their labels as text, empty where unknown.
        sites: how many.
        alpha: small: few labels a site; large: the same labels everywhere.
        seed: decides the draw.

    Returns:
        [images] names of sites, ``site-1``, ...

    Raises:
        ConfigError: fewer than one site, or alpha is not above 0 and at most 1e9.
        DataError: fewer than two patients a site, a patient without label, or fewer than two labels.
    """
    _check_alpha(alpha)
    patient, count = _patients(groups, sites)
    label = _labels_of_patients(patient, count, labels)
    rng = np.random.default_rng(seed)
    for _ in range(_DRAWS):
        site = _skewed(label, sites, alpha, rng)
        if np.bincount(site, minlength=sites).min() >= LEAST_PATIENTS:
            break
    return _names(_filled_up(site, sites, rng), sites)[patient]


def by_modality(groups: Images, modalities: Images) -> Images:
    """Make one site of each group of modalities; a patient with several goes to the most frequent of their images.

    Sites may be of any size, as natural ones.

    Args:
        groups: [images] patient of each image.
        modalities: [images] Modality (0008,0060) or a manifest's column.

    Returns:
        [images] names from ``fedssl.data.modality.MODALITIES``.

    Raises:
        DataError: all patients belong to one group.
    """
    names = np.array(MODALITIES)
    _, patient = np.unique(groups, return_inverse=True)
    group = _most_frequent(patient, modality_groups(modalities.tolist()))
    found = names[np.unique(group)].tolist()
    if len(found) < 2:
        raise DataError(
            f"A partition by modality needs images of two modalities or more; found: {found[0] if found else 'none'}. "
            "Choose simulation.partition=iid or another."
        )
    return names[group][patient]


def by_quantity(groups: Images, sites: int, alpha: float, seed: int) -> Images:
    """Skew the sizes: two patients for each site, the others at random in shares drawn from Dir(alpha).

    q ~ Dir(alpha 1) over the sites (Li et al. 2022, arXiv 2102.02079, section 4). Shares are of patients.

    Args:
        groups: [images] patient of each image.
        sites: how many.
        alpha: small: one large site and many small ones; large: equal sites.
        seed: decides the draw.

    Returns:
        [images] names of sites, ``site-1``, ...

    Raises:
        ConfigError: fewer than one site, or alpha is not above 0 and at most 1e9.
        DataError: fewer than two patients a site.
    """
    _check_alpha(alpha)
    patient, count = _patients(groups, sites)
    rng = np.random.default_rng(seed)
    own = np.repeat(np.arange(sites), LEAST_PATIENTS)
    others = _divided(count - len(own), rng.dirichlet(np.full(sites, alpha)))
    return _names(rng.permutation(np.concatenate([own, others])), sites)[patient]


def _patients(groups: Images, sites: int) -> tuple[Int[np.ndarray, " images"], int]:
    """Number the patients in sorted order; returns each image's patient and how many there are."""
    if sites < 1:
        raise ConfigError(f"simulation.sites must be a whole number of at least 1, not {sites}.")
    names, patient = np.unique(groups, return_inverse=True)
    if len(names) < LEAST_PATIENTS * sites:
        raise DataError(
            f"{sites} simulated sites need {LEAST_PATIENTS * sites} patients or more, {LEAST_PATIENTS} each; there are "
            f"{len(names)} (patients that share images count as one). Lower simulation.sites or add patients."
        )
    return patient, len(names)


def _check_alpha(alpha: float) -> None:
    if not 0.0 < alpha <= LARGEST_ALPHA:
        raise ConfigError(
            f"simulation.alpha must be above 0 and at most {LARGEST_ALPHA:g}, not {alpha:g}: 0.1 gives very unequal "
            "sites, 100 nearly equal ones."
        )


def _names(site: Patients, sites: int) -> Shaped[np.ndarray, " patients"]:
    """Name sites from 1, all as long as the last, so that they sort."""
    return np.array([f"site-{number + 1:0{len(str(sites))}d}" for number in range(sites)])[site]


def _labels_of_patients(patient: Int[np.ndarray, " images"], count: int, labels: Images) -> Patients:
    """Number of each patient's most frequent label."""
    known = labels.astype(np.str_) != ""
    without = count - len(np.unique(patient[known]))
    if without:
        raise DataError(
            f"A partition by label needs the label of every patient; {without} of {count} patients have none. Complete "
            "data.labels, check simulation.partition_label, or choose simulation.partition=iid."
        )
    _, code = np.unique(labels[known].astype(np.str_), return_inverse=True)
    chosen = np.unique(_most_frequent(patient[known], code), return_inverse=True)[1]
    if chosen.max() == 0:
        raise DataError(
            f"A partition by label needs two labels or more; all {count} patients have the same one (a patient counts "
            "by the most frequent label of their images). Choose another simulation.partition_label, or "
            "simulation.partition=quantity."
        )
    return chosen


def _most_frequent(patient: Int[np.ndarray, " images"], code: Int[np.ndarray, " images"]) -> Patients:
    """The code that most images of each patient have, the smallest of equally frequent ones."""
    width = int(code.max(initial=0)) + 1
    pairs, images = np.unique(patient * width + code, return_counts=True)
    owner, value = np.divmod(pairs, width)
    best_first = np.lexsort([value, -images, owner])
    return value[best_first][np.unique(owner[best_first], return_index=True)[1]]


def _skewed(label: Patients, sites: int, alpha: float, rng: np.random.Generator) -> Patients:
    """Draw a site for every patient, label by label."""
    site = np.empty(len(label), np.int64)
    for members in np.split(np.argsort(label, kind="stable"), np.cumsum(np.bincount(label))[:-1]):
        site[rng.permutation(members)] = _divided(len(members), rng.dirichlet(np.full(sites, alpha)))
    return site


def _divided(count: int, shares: np.ndarray) -> Int[np.ndarray, " count"]:
    """Sites of ``count`` patients in a row, cut at the rounded sums of the shares."""
    ends = np.rint(np.cumsum(shares)[:-1] * count)
    return np.searchsorted(ends, np.arange(count), side="right")


def _filled_up(site: Patients, sites: int, rng: np.random.Generator) -> Patients:
    """Let sites with too few patients take some from the largest, which have them: ``_patients`` has checked."""
    counts = np.bincount(site, minlength=sites)
    while counts.min() < LEAST_PATIENTS:
        giver, taker = counts.argmax(), counts.argmin()
        site[rng.choice(np.flatnonzero(site == giver))] = taker
        counts[giver], counts[taker] = counts[giver] - 1, counts[taker] + 1
    return site
