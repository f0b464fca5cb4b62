"""What the page of a study shows first, and in which words: cards, sentences in groups, which pretraining, shares."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fedssl.evaluation.features import METADATA, PIXELS
from fedssl.evaluation.probe import LINEAR
from fedssl.evaluation.task import IN_DOMAIN
from fedssl.evidence.encoders import ALONE, FEDERATED, NOTHING
from fedssl.evidence.fits import TUNED

Rows = Sequence[Mapping[str, Any]]
_WHOLE, _FEW, _TENTH = 0.999, 0.05, 0.1  # shares of the labels
_MOST_LINES = 9
_GROUPS = {
    "labels": "Labels saved",
    "joining": "What a site gains by joining",
    "left_out": "What a site gains that stays outside",
    "speed": "How soon fine-tuning converges",
}


def gap(row: Mapping[str, Any]) -> str:
    """Word a difference with its interval."""
    return f"{signed(row['difference'])} [{signed(row['low'])}, {signed(row['high'])}]"


def signed(value: float | None) -> str:
    """Word a difference."""
    return "?" if value is None else f"{value:+.3f}"


def percent(share: float) -> str:
    """Word a share without its sign, with no more digits than it needs."""
    return f"{100 * share:.0f}" if share >= _TENTH else f"{100 * share:.2g}"


def labelled(share: float, patients: int | None) -> str:
    """Word a share of the labels, as "10 % (6 patients)"."""
    if patients is None:
        return f"{percent(share)}\u00a0% of the labels"
    return f"{percent(share)}\u00a0% ({patients}\u00a0patient{'s' if patients != 1 else ''})"


def whole(row: Mapping[str, Any]) -> bool:
    """Tell whether all patients were labelled."""
    return bool(row["fraction"] == 1.0 or row["share"] >= _WHOLE)


def few_and_all(rows: Rows) -> list[Mapping[str, Any]]:
    """Keep the rows with all labels and with about a tenth, which differs by domain; sort them by domain and share."""
    domains, kept = list(dict.fromkeys(row["domain"] for row in rows)), []
    for domain in domains:
        own = [row for row in rows if row["domain"] == domain]
        few = [row["share"] for row in own if row["share"] >= _FEW and not whole(row)]
        tenth = min(few, key=lambda share: (round(abs(share - _TENTH), 9), share), default=None)
        kept += sorted((row for row in own if whole(row) or row["share"] == tenth), key=lambda row: float(row["share"]))
    return kept


def pivot(rows: Rows, line: Sequence[str], column: Sequence[str], order: Iterable[str]) -> dict[str, Any]:
    """Make a table of rows: the columns, and for each line its cells, None where there is no such row.

    Lines are ordered by their first key, an encoder, as legends are.
    """
    cells = {(tuple(row[key] for key in line), tuple(row[key] for key in column)): row for row in rows}
    columns, places = list(dict.fromkeys(column for _, column in cells)), list(order)
    names = sorted(dict.fromkeys(key for key, _ in cells), key=lambda key: places.index(str(key[0])))
    return {"columns": columns, "lines": {key: [cells.get((key, column)) for column in columns] for key in names}}


def cards(task: str, results: Mapping[str, Any]) -> Rows:
    """Pick what is shown in large letters: the study's own federated encoder against no pretraining, in domain."""
    own = {arm["encoder"] for arm in results["arms"] if arm["kind"] == FEDERATED and not arm["variant"]}
    rows = {row["probe"]: row for row in _against_nothing(task, IN_DOMAIN, results) if row["encoder"] in own}
    counts = {row["share"]: row["labelled_patients"] for row in results["scores"]
              if (row["task"], row["domain"]) == (task, IN_DOMAIN)}  # fmt: skip
    return [{**rows[probe], "state": _state(rows[probe]), "grid_share": _grid_share(rows[probe], counts)}
            for probe in (TUNED, LINEAR) if probe in rows]  # fmt: skip


def _against_nothing(task: str, domain: str, results: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for row in results["reductions"]:
        if (row["task"], row["baseline"], row["domain"]) == (task, NOTHING, domain):
            yield row


def _grid_share(row: Mapping[str, Any], counts: Mapping[float, int]) -> str:
    """Word the smallest share from which on all shares reach the goal."""
    if not row["grid"]:
        return ""
    share = 1 / float(row["grid"])
    near = min(counts, key=lambda known: abs(known - share), default=share)
    return labelled(share, counts[near] if near in counts and abs(near - share) < 1e-6 else None)


def _state(row: Mapping[str, Any]) -> str:
    """Say what the whole interval allows to say, as a word that the page explains and colours."""
    low, high = row["low"], row["high"]
    if row["times"] is None or low is None or high is None:
        return "unknown"
    if high <= 1:
        return "missed" if high == 0 else "none"
    if low <= 1:
        return "uncertain" if low == 0 else "even"
    return "shown" if row["grid"] else "unsteady"


def goals(task: str, results: Mapping[str, Any]) -> dict[str, float]:
    """Find the AUROC of no pretraining at its best with all labels, by domain."""
    found: dict[str, dict[str, float]] = {}
    for row in results["scores"]:
        nothing = (row["task"], row["metric"], row["encoder"]) == (task, "auroc", NOTHING) and whole(row)
        if nothing and row["value"] is not None and row["probe"] in {TUNED, LINEAR}:
            found.setdefault(row["domain"], {})[row["probe"]] = row["value"]
    best = {}
    for domain, values in found.items():
        used = next((row["baseline_probe"] for row in _against_nothing(task, domain, results)), "")
        best[domain] = values.get(used, max(values.values()))
    return best


def which_pretraining(task: str, results: Mapping[str, Any], order: Iterable[str]) -> dict[str, Any] | None:
    """Tabulate federated encoders against each other, each pair once, the study's own first; None: there is one."""
    arms = sorted((arm for arm in results["arms"] if arm["kind"] == FEDERATED), key=lambda arm: bool(arm["variant"]))
    names = [arm["encoder"] for arm in arms]
    rows = few_and_all([
        row for row in results["differences"]
        if row["task"] == task and row["probe"] in {LINEAR, TUNED} and {row["encoder"], row["other"]} <= set(names)
        and names.index(row["encoder"]) < names.index(row["other"])
    ])  # fmt: skip
    if not rows:
        return None
    counts: dict[tuple[str, str], dict[str, int]] = {}
    for row in rows:
        told = counts.setdefault((row["encoder"], row["other"]), {})
        told[row.get("verdict") or "not known"] = told.get(row.get("verdict") or "not known", 0) + 1
    table = pivot(rows, ["encoder", "other", "probe"], ["domain", "share", "labelled_patients"], order)
    return table | {"counts": counts}


def told(results: Mapping[str, Any]) -> dict[str, Any]:
    """Sort the sentences: alarms, groups with a heading, and those aside; a task is named where there are several."""
    several = len(results["tasks"]) > 1

    def word(row: Mapping[str, Any]) -> str:
        return f"{row['task']}: {row['text']}" if several else _capital(row["text"])

    rows = results["sentences"]  # of a collapse the page speaks by itself
    main = {
        title: [word(row) for row in rows if row["group"] == group and not row["aside"]]
        for group, title in _GROUPS.items()
    }
    return {
        "alarms": [f"Alarm: {word(row)}" for row in rows if row["group"] == "alarm"],
        "against": [word(row) for row in rows if row["aside"]],
        "main": {title: said for title, said in main.items() if said},
    }


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def collapsed(results: Mapping[str, Any]) -> Rows:
    """Pick the encoders that showed signs of collapse."""
    return [arm for arm in results["arms"] if arm.get("collapse")]


def drawn(names: Iterable[str], arms: Rows) -> list[str]:
    """Choose the lines of figures, by groups: all of a group or none, so that no site is left out by chance."""
    present, arms_by_name = list(dict.fromkeys(names)), {arm["encoder"]: arm for arm in arms}

    def group(name: str) -> int:
        arm = arms_by_name.get(name)
        if arm is None:
            return {PIXELS: 3, METADATA: 4}.get(name, 5)
        if arm["kind"] == ALONE:
            return 6 if arm["variant"] else 2
        return 1 if arm["variant"] else 0

    chosen: list[str] = []
    for number in range(7):
        more = [name for name in present if group(name) == number]
        if not chosen or len(chosen) + len(more) <= _MOST_LINES:
            chosen += more
    return chosen
