"""What an audit found, in plain words: each sentence gives a figure, its interval and what chance would give."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedssl.evaluation.leakage.likelihood_ratio import PATIENTS, TARGET
from fedssl.evaluation.leakage.membership import LEAST_PATIENTS, leaks
from fedssl.evaluation.leakage.points import FEATURES

TRAINED, UNTRAINED = "trained", "untrained"
LEAK, NO_LEAK = "This is more than chance: membership leaks.", "No leak was found this way."
LIMITS = (
    "An attack that fails proves nothing: another attacker may know more, or be cleverer. Only differential privacy "
    "bounds every attack.",
    "Figures are of patients on average. A single unusual patient may be found where the average is not; canaries are "
    "the only figure of the worst case.",
    "The held-out patients are of the same sites. Whoever may compare with patients of elsewhere finds a difference "
    "that has nothing to do with training.",
    "Single updates of a site, which a curious server sees in every round, give away more than the final weights that "
    "are audited here.",
)
Row = Mapping[str, Any]


def spoken(results: Mapping[str, Any]) -> list[str]:
    """Give the sentences of an audit, see ``fedssl.leakage_audit.audit_run``."""
    data, shadows = results["data"], results["shadows"]
    said = list(_membership(results["membership"], data))
    if shadows is None:
        said.append(
            "No shadow encoders were trained (--shadows 0): the likelihood-ratio attack, which finds more, and the "
            "worst case by canaries are not measured."
        )
    else:
        said += _shadows(shadows)
    return [*said, *_prototypes(results["prototypes"]), *_attributes(results["attributes"])]


def _membership(rows: Sequence[Row], data: Mapping[str, int]) -> Iterator[str]:
    if rows[0]["auroc"] is None:
        yield _too_few("membership", data["members"], data["held_out"])
        return
    plain = {row["score"]: row["auroc"] for row in rows if row["encoder"] == UNTRAINED}
    for row in rows:
        if row["encoder"] == TRAINED:
            holds = "the encoder" if row["score"] == FEATURES else "the encoder and its head"
            luck = f" (by luck alone, with the untrained encoder: {_cases(plain[row['score']])})"
            yield _guesses(f"An attacker who holds {holds} and compares views of images", row, luck)


def _guesses(attack: str, row: Row, luck: str = "") -> str:
    text = (
        f"{attack} tells a patient who trained from one who did not, right in {_cases(row['auroc'])} of 100 pairs; "
        f"chance is 50{luck}."
    )
    rate = row["tpr_at_10"]
    if rate is not None:
        text += (
            f" If 10 of 100 others may be accused wrongly, {_cases(rate)} of 100 who trained are found; chance is "
            f"{100 * rate['chance']:.0f}."
        )
    return f"{text} {LEAK if leaks(row['auroc']) else NO_LEAK}"


def _shadows(shadows: Mapping[str, Any]) -> Iterator[str]:
    for row in shadows["attacks"]:
        what = f"the likelihood-ratio attack with {shadows['number']} shadow encoders ({row['score']})"
        if row["auroc"] is None:
            yield _too_few(f"{what} on {row['who']}", row["members"], row["held_out"])
        elif row["attacked"] == TARGET:
            yield _guesses(what.capitalize(), row)
        elif row["who"] == PATIENTS:
            yield _guesses(f"On the shadow encoders themselves {what}", row)
        else:
            planted = f"{shadows['canaries']} patients whose images were replaced by random patterns"
            yield _guesses(f"The worst case: on {planted}, {what}", row)


def _prototypes(row: Row | None) -> Iterator[str]:
    if row is None:
        return
    if row.get("too_few"):
        yield _too_few("prototypes", row["members"], row["held_out"])
        return
    share = row["member_nearest"]
    yield (
        f"Among equally many images of training and held-out patients, the nearest image of {_cases(share)} of 100 "
        f"prototypes trained; chance is 50. {row['sits_on_member']} of {row['prototypes']} prototypes are "
        f"ten times nearer to one training image than to any held-out one ({row['sits_on_held_out']} the other way "
        f"round); the five nearest training images are of {row['patients_near']:.1f} patients on average, of one alone "
        f"for {row['one_patient']} prototypes ({row['one_held_out_patient']} for held-out images). "
        + ("Prototypes sit on training patients." if row["alarm"] else "No prototype was found to sit on a patient.")
    )


def _attributes(rows: Sequence[Row]) -> Iterator[str]:
    plain = {row["what"]: row["balanced_accuracy"] for row in rows if row["encoder"] == UNTRAINED}
    for row in rows:
        figure = row["balanced_accuracy"]
        if row["encoder"] == UNTRAINED:
            continue
        if figure is None:
            yield f"Whether features tell {row['what']} is not known: fewer than two values with three patients each."
            continue
        yield (
            f"A linear probe of the features tells {row['what']} among {row['values']}, right in {_cases(figure)} of "
            f"100 (classes weighed equally); chance is {100 * figure['chance']:.0f}, the untrained encoder "
            f"{_cases(plain[row['what']])}."
        )


def _cases(row: Row) -> str:
    """Word a share as cases of 100, with its interval."""
    return f"{100 * row['value']:.0f} [{100 * row['low']:.0f}, {100 * row['high']:.0f}]"


def _too_few(what: str, members: int, held_out: int) -> str:
    return (
        f"Too few patients for {what}: {members} trained and {held_out} did not, and {LEAST_PATIENTS} are needed on "
        "each side. No figure is given."
    )


def table(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """List the figures of an audit for a terminal."""
    rows = []
    names = {"auroc": "AUROC", "advantage": "advantage", "tpr_at_1": "found at 1 % false", "tpr_at_10": "found at 10 %"}
    attacks = [
        (f"membership, {row['score']}", row["encoder"], row) for row in results["membership"]
    ] + [
        (f"likelihood ratio, {row['who']}, {row['score']}", row["attacked"], row)
        for row in (results["shadows"] or {"attacks": []})["attacks"]
    ]  # fmt: skip
    for what, encoder, row in attacks:
        rows += [_line(what, encoder, name, row[key]) for key, name in names.items()]
    prototypes = results["prototypes"]
    if prototypes is not None and not prototypes.get("too_few"):
        rows.append(_line("prototypes", TRAINED, "nearest image trained", prototypes["member_nearest"]))
    for row in results["attributes"]:
        rows.append(_line(row["what"], row["encoder"], "balanced accuracy", row["balanced_accuracy"]))
    return rows


def _line(what: str, encoder: str, figure: str, row: Row | None) -> dict[str, str]:
    value = "not known" if row is None else f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
    chance = "" if row is None else f"{row['chance']:.3f}"
    return {"attack": what, "encoder": encoder, "figure": figure, "value": value, "chance": chance}
