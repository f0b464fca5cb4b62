"""The page of a study: whole, plain, without anything outside itself."""

import copy
import html
import json
import re
from html.parser import HTMLParser

import pytest

from fedssl.evaluation.label_reduction import Reduction
from fedssl.evidence.cards import drawn, few_and_all
from fedssl.evidence.figures import styles_of
from fedssl.evidence.report import write_page
from fedssl.evidence.sentences import limits, sentences

_SITE = "<b>EAST & $west"
_DOMAINS = ("in domain", "unseen site", "unseen site, own labels")
_SECTIONS = (
    "scores", "differences", "delong", "reductions", "convergence", "joining", "left_out", "shortcuts", "robustness",
)  # fmt: skip
_HEADINGS = (
    "The answer", "In words", "How far few labels go", "What a site gains by joining", "Against every other encoder",
    "How soon fine-tuning converges", "How robust it is to changed images",
    "Can site and scanner be told from the embedding?", "All figures", "Which weights", "How it was done, and limits",
    "What the words mean",
)  # fmt: skip


def _arm(encoder, kind, site="", variant="", missing=""):
    own = {"encoder": encoder, "kind": kind, "site": site, "variant": variant, "missing": missing}
    if missing:
        return own
    facts = {
        "folder": f"{encoder.split()[-1]}-ab12",
        "collapse": [],
        "round": 2,
        "images_seen": 12345,
        "sites": [site] if site else ["NORTH", _SITE],
        "method": "SwAV",
    }
    return own | facts | {"fingerprint": "feed", "sha256": "0123456789abcdef" * 4}


def _reduction(probe, **changed):
    found = Reduction(4.2, 1.9, 10.0, 4.0, at_least=False, high_at_least=True, low_at_least=False, reached=0.995)
    found = Reduction(**(vars(found) | changed))
    return {
        "task": "lesion", "encoder": "federated", "probe": probe, "baseline": "no pretraining",
        "baseline_probe": "fine-tuned", "domain": "in domain", "text": found.text(), **vars(found),
    }  # fmt: skip


def _scores(domains=_DOMAINS):
    metrics = ("auroc", "auprc", "balanced_accuracy", "sensitivity_at_95_specificity", "calibration_error")
    probes = dict.fromkeys(("no pretraining", "federated"), ("linear", "knn", "fine-tuned"))
    probes |= {f"{_SITE} alone": ("linear", "knn"), "raw pixels (PCA)": ("linear",)}
    return [
        {"task": "lesion", "encoder": encoder, "probe": probe, "fraction": share, "labelled_patients": patients,
         "labelled_images": 2 * patients, "share": patients / 31, "domain": domain, "metric": metric,
         "value": 0.6 + 0.2 * share + 0.001 * number, "low": 0.5, "high": 0.95}
        for number, metric in enumerate(metrics) for domain in domains for encoder, used in probes.items()
        for probe in used for share, patients in ((0.1, 3), (1.0, 31))
    ]  # fmt: skip


def _gap(difference, **more):
    low, high = difference - 0.05, difference + 0.05
    verdict = "tie" if low < 0 < high else ("better" if low > 0 else "worse")
    return {
        "task": "lesion", "difference": difference, "low": low, "high": high, "p": 0.01, "p_holm": 0.0321,
        "verdict": verdict, **more,
    }  # fmt: skip


def _joining(site, difference, **more):
    counts = {"train_patients": 21, "test_patients": 17, "test_images": 40}
    return _gap(difference, site=site, variant="", **counts, **more)


def _robustness():
    keys = {"task": "lesion", "encoder": "federated", "domain": "in domain", "kind": "rotation"}
    levels = [keys | {"level": level, "value": 0.8, "low": 0.7, "high": 0.9} for level in (0.0, 5.0, 10.0)]
    return [*levels, keys | {"drop": 0.0437, "low": 0.01, "high": 0.08}]


def _results(**changed):
    """A small study in which everything was measured."""
    nan, others = float("nan"), ("no pretraining", f"{_SITE} alone", "raw pixels (PCA)")
    arms = [_arm("no pretraining", "scratch"), _arm("natural images", "natural", missing="no file was given")]
    arms += [_arm("federated", "federated"), _arm(f"{_SITE} alone", "alone", _SITE), _arm("without NORTH", "without")]
    curve = {"task": "lesion", "images": [0.0, 64.0, 128.0]}
    place = {"task": "lesion", "encoder": "federated", "places": 2, "low": 0.6, "high": 0.8, "chance": 0.5}
    results = {
        "protocol": "ab12" * 16, "synthetic": True, "on": "validation", "sites": {"NORTH": 40, _SITE: 23},
        "notes": [], "unseen_sites": ["FAR"], "seeds": 2, "resamples": 200, "arms": arms,
        "tasks": [{"task": "lesion", "kind": "binary", "outputs": ["0", "1"], "train_patients": 31, "train_images": 62,
                   "tests": {"in domain": {"images": 30, "patients": 15}}}],
        "scores": _scores(),
        "differences": [
            _gap(0.1234, encoder="federated", other=other, probe=probe, fraction=share, share=patients / 31,
                 labelled_patients=patients, domain=domain)
            for other in others for probe in ("linear", "knn") for share, patients in ((0.1, 3), (1.0, 31))
            for domain in _DOMAINS
        ],
        "delong": [{"task": "lesion", "encoder": "federated", "other": other, "domain": "in domain",
                    "difference": 0.01, "low": nan, "high": nan, "p": nan} for other in others],
        "reductions": [_reduction("fine-tuned"), _reduction("linear", times=0.0, low=0.0, high=0.0, grid=0.0)],
        "convergence": [curve | {"encoder": "no pretraining", "values": [0.5, 0.6, 0.7]},
                        curve | {"encoder": "federated", "values": [0.5, 0.8, nan], "speed_up": {},
                                 "text": "speed-up of 75.0 % [60.1, 80.2]"}],
        "joining": [_joining("NORTH", 0.2, federated=0.9, alone=0.7), _joining(_SITE, 0.01, federated=0.8, alone=0.79),
                    {"task": "lesion", "site": "TINY", "variant": "", "reason": "too few labelled patients"}],
        "left_out": [_joining("NORTH", -0.1, without=0.6, no_pretraining=0.7)],
        "shortcuts": [place | {"what": "site", "balanced_accuracy": 0.71, "label_gap": 0.33, "alarm": True},
                      place | {"what": "scanner", "balanced_accuracy": 0.64, "label_gap": 0.02, "alarm": False}],
        "robustness": _robustness(),
    }  # fmt: skip
    results |= changed
    results |= {"sentences": sentences(results), "limits": limits(results)}
    return json.loads(json.dumps(results).replace("NaN", "null"))


def _written(tmp_path, results):
    return write_page(tmp_path / "my study", results).read_text()


def _words(page):
    """What a reader sees, in one line."""
    text = re.sub(r"<(style|svg).*?</\1>", " ", page, flags=re.S)
    text = re.sub(r"<[^>]*>", "", re.sub(r"</t[hd]>", " | ", text))
    return " ".join(html.unescape(text).replace("\xa0", " ").split())


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return _written(tmp_path_factory.mktemp("page"), _results(scores=_scores()))


class _Tags(HTMLParser):
    """Checks that tags are closed in order, and keeps ids, links and tables' heads."""

    _VOID = frozenset({"meta", "path", "use", "br", "rect", "line"})

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.heads, self.pictures = [], [], [], [], []

    def handle_starttag(self, tag, attributes):
        known = dict(attributes)
        self.ids += [known["id"]] if "id" in known else []
        self.links += [known[name] for name in ("href", "src", "xlink:href") if name in known]
        self.heads += [known] if tag == "th" else []
        self.pictures += [known] if tag == "svg" else []
        self.open += [] if tag in self._VOID else [tag]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self._VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self._VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def tags(page):
    parser = _Tags()
    parser.feed(page)
    return parser


def test_the_page_is_one_file_that_needs_nothing_outside_and_no_script(page, tags, tmp_path):
    assert "http" not in page
    assert "<script" not in page
    assert "@import" not in page
    assert all(link.startswith("#") for link in tags.links)
    assert not re.search(r"url\((?!#)", page)
    write_page(tmp_path / "study", _results())
    assert [path.name for path in (tmp_path / "study").iterdir()] == ["study.html"]


def test_every_tag_is_closed_ids_are_unique_and_every_reference_is_met(page, tags):
    assert not tags.open
    assert len(tags.ids) == len(set(tags.ids))
    wanted = {link[1:] for link in tags.links} | set(re.findall(r"url\(#([^)]*)\)", page))
    assert wanted <= set(tags.ids)


def test_heads_of_tables_have_a_scope_and_pictures_a_text(tags):
    assert tags.heads
    assert all("scope" in head for head in tags.heads)
    assert tags.pictures
    shown = [picture for picture in tags.pictures if picture.get("aria-hidden") != "true"]  # the others: in legends
    assert shown
    assert all(picture["role"] == "img" and picture["aria-label"] for picture in shown)


def test_every_section_stands_on_the_page(page):
    for heading in _HEADINGS:
        assert re.search(rf"<h[23][^>]*>{re.escape(heading)}</h[23]>", page), heading


def test_the_head_names_study_protocol_sites_and_what_the_figures_are_not(page):
    words = _words(page)
    assert "<h1>my study</h1>" in page
    for told in ("ab12ab12ab12", "NORTH (40 patients)", "Never took part: FAR", "Synthetic images.", "Validation pat"):
        assert told in words
    assert "ab12ab12ab12a" not in page


def test_the_answer_stands_in_large_letters_with_interval_and_conservative_figure(page):
    words = _words(page)
    assert "<strong>4.2</strong> times fewer labels" in page
    assert "95 % interval 1.9 to ≥ 10" in words
    assert "no pretraining at its best (fine-tuned), all labels" in words
    assert "at measured shares only: 4 times, as well with 25 % of the labels and with every larger share." in words
    assert "Better: the whole interval" in words
    assert "<strong>not reached</strong>" in page
    assert "Not reached: with no measured share" in words


@pytest.mark.parametrize(
    ("changed", "state", "said"),
    [
        ({"low": 0.0}, "uncertain", "Uncertain: the interval goes from “not reached” to labels saved."),
        ({"low": 0.0, "times": 0.0, "high": 33.0}, "uncertain", "Best estimate not reached"),
        ({"low": 1.0}, "even", "Uncertain: the interval goes from 1,"),
        ({"grid": 0.0}, "unsteady", "Not steady: it does as well with few labels"),
        ({"times": 1.0, "low": 0.0, "grid": 1.0}, "uncertain", "1, as well with all labels only"),
        ({"times": 1.0, "low": 0.0, "high": 1.0}, "none", "No labels saved: the interval does not go beyond 1."),
        ({"times": 0.0, "low": 0.0, "high": 0.0, "reached": 0.0}, "missed", "not reached at both ends"),
        ({"times": float("nan"), "low": float("nan"), "grid": float("nan")}, "unknown", "too few test patients"),
    ],
)
def test_a_card_says_and_shows_only_what_its_whole_interval_allows(tmp_path, changed, state, said):
    page = _written(tmp_path, _results(reductions=[_reduction("fine-tuned", **changed)]))
    assert said in _words(page)
    assert f'<div class="card {state}">' in page
    assert "Better: the whole interval" not in _words(page)
    assert ("<strong>cannot be told</strong>" in page) == (state in {"uncertain", "even"})


def test_a_study_without_fine_tuning_says_that_the_answer_was_not_measured(tmp_path):
    scores = [row for row in _scores() if row["probe"] != "fine-tuned"]
    words = _words(_written(tmp_path, _results(reductions=[], convergence=[], scores=scores)))
    assert "Not measured: this study did not fine-tune" in words
    assert "Fine-tuned: not measured." in words
    assert "nothing was fine-tuned long enough" in words


def test_figures_in_tables_are_those_of_the_rows(page):
    words = _words(page)
    for told in (
        "0.620 [0.500, 0.950]",  # AUROC with a tenth of the labels
        "0.804 [0.500, 0.950]",  # calibration error with all
        "+0.123 better [+0.073, +0.173], p 0.032",
        "NORTH | 21 | 17 | 0.900 | 0.700 | +0.200 [+0.150, +0.250] | 0.032 | better |",
        "| 0.600 | 0.700 | -0.100 [-0.150, -0.050] | 0.032 | worse |",
        "0.044 [0.010, 0.080]",  # mean drop
        "| 0.71 [0.60, 0.80] | 0.50 | 0.33 | alarm |",
        "+0.010 [?, ?]",  # DeLong's
        "speed-up of 75.0 % [60.1, 80.2]",
        "| 12,345 | SwAV | 0123456789abcdef | feed |",
    ):
        assert told in words, told
    assert "0123456789abcdef0" not in page


def test_the_worst_site_is_marked_and_a_site_of_which_nothing_is_known_is_named(page):
    assert page.count("gains least</small>") == 1
    least = page[page.index('<tr class="least">') :]
    assert least.index("&lt;b&gt;EAST") < least.index("gains least</small>") < least.index("</tr>")
    assert "TINY: the gain cannot be told: too few labelled patients." in _words(page)


def test_alarms_and_missing_encoders_are_told(page):
    assert "Alarm. The site can be told from: federated." in _words(page)
    assert "The scanner can be told from" not in page
    assert "missing: no file was given" in page
    assert "natural images" not in re.search(r'<ul class="legend">.*?</ul>', page, flags=re.S)[0]


def test_every_sentence_and_limit_is_on_the_page(tmp_path):
    results = _results(sites={"NORTH": 40}, joining=[])
    words = _words(_written(tmp_path, results))
    assert all(sentence in words for sentence in results["limits"])
    for sentence in results["sentences"]:
        assert sentence["text"][0].upper() + sentence["text"][1:] in words


def test_sentences_stand_under_headings_and_name_the_task_only_where_there_are_several(tmp_path):
    results = _results()
    words = _words(_written(tmp_path, results))
    assert "lesion: to do" not in words
    headings = ("Labels saved", "What a site gains by joining", "What a site gains that stays outside",
                "How soon fine-tuning converges", "Alarms")  # fmt: skip
    part = words[words.index("In words Labels saved") :]
    assert sorted(headings, key=part.index) == list(headings)
    assert part.index("To do as well as") < part.index("gains least by joining") < part.index("Fine-tuning federated")
    results["tasks"].append(results["tasks"][0] | {"task": "edema"})
    assert "lesion: to do as well as" in _words(_written(tmp_path, results))


def test_a_site_with_odd_letters_in_its_name_stays_text(page):
    assert "<b>" not in page
    assert "&lt;b&gt;EAST &amp; $west" in page
    pictures = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.S))
    assert "&lt;b&gt;EAST &amp; $west, 17 test patients" in pictures


def test_no_path_of_the_machine_is_on_the_page(tmp_path):
    page = _written(tmp_path, _results())
    assert str(tmp_path) not in page
    assert not re.search(r"/(home|tmp|work|root|usr|Users)/", page)


def test_several_tasks_have_a_section_and_an_answer_each_and_shared_parts_stand_once(tmp_path):
    results = _results()
    results["tasks"].append(copy.deepcopy(results["tasks"][0]) | {"task": "edema"})
    for section in _SECTIONS:
        results[section] += [row | {"task": "edema"} for row in results[section]]
    page = _written(tmp_path, results)
    assert re.findall(r"<h2>Task: (\w+)</h2>", page) == ["lesion", "edema"]
    assert "edema: how many fewer labels" in page
    assert page.count("<h2>Which weights</h2>") == page.count("<h3>What the words mean</h3>") == 1
    assert page.count("<h3>All figures</h3>") == 2


def test_the_figures_of_one_task_are_not_those_of_another(tmp_path):
    results = _results()
    results["tasks"].append(copy.deepcopy(results["tasks"][0]) | {"task": "edema"})
    results["scores"] += [row | {"task": "edema", "value": 0.777} for row in results["scores"]]
    lesion, edema = _written(tmp_path, results).split("<h2>Task: edema</h2>")
    assert "0.777" not in lesion
    assert "0.777" in edema


@pytest.mark.parametrize("section", ["shortcuts", "robustness", "delong", "left_out", "joining", "convergence"])
def test_a_part_that_was_not_measured_leaves_the_page_whole(tmp_path, section):
    page = _written(tmp_path, _results(**{section: []}))
    assert "Which weights" in page
    assert ("What a site gains that stays outside" in page) == (section != "left_out")
    assert ("DeLong's test (" in page) == (section != "delong")
    assert ("Not measured" in page) == (section not in {"left_out", "delong"})


def test_a_study_of_which_almost_nothing_is_known_still_has_a_page(tmp_path):
    nothing = {section: [] for section in _SECTIONS}
    reasons = [{"task": "lesion", "site": "TINY", "variant": "v", "reason": "it has too few labels"}]
    scores = [row | {"value": None, "low": None, "high": None} for row in _scores()]
    gaps = [row | {"difference": None, "low": None, "high": None} for row in _results()["differences"]]
    told = {"sentences": [], "limits": []}
    unknown = nothing | {"left_out": reasons, "joining": reasons, "scores": scores, "differences": gaps}
    page = _written(tmp_path, _results() | unknown | told | {"unseen_sites": [], "synthetic": False, "on": "test"})
    assert _words(page).count("TINY (v): the gain cannot be told: it has too few labels.") == 2
    assert "? [?, ?]" in _words(page)
    assert "Synthetic" not in page
    assert "No site was kept unseen." in page


def test_an_encoder_has_one_colour_everywhere_and_baselines_are_dotted():
    results = _results()
    styles = styles_of(results["arms"], results["scores"])
    assert list(styles) == ["federated", "no pretraining", f"{_SITE} alone", "raw pixels (PCA)"]
    assert [bool(style.dashes) for style in styles.values()] == [False, False, False, True]
    assert len({style.css for style in styles.values()}) == len(styles)


def test_a_variant_has_the_colour_of_its_like_and_other_dashes_and_hues_are_few():
    sites = [f"S{number}" for number in range(12)]
    arms = [_arm("no pretraining", "scratch")]
    for variant in ("", "a", "b"):
        arms += [_arm(f"{kind} {variant}", kind, variant=variant) for kind in ("federated", "pooled")]
        arms += [_arm(f"{site} alone {variant}", "alone", site, variant) for site in sites]
    styles = styles_of(arms, _scores())
    for own in ("federated", "pooled", "S3 alone"):
        alike = [styles[f"{own} {variant}"] for variant in ("", "a", "b")]
        assert len({(style.hue, style.marker) for style in alike}) == 1
        assert len({style.dashes for style in alike}) == 3
    assert len(set(styles.values())) == len(styles)
    assert len({style.hue for style in styles.values()}) <= 9


def test_a_crowded_figure_leaves_out_whole_groups_never_one_site_of_several():
    sites = [f"S{number}" for number in range(9)]
    arms = [_arm("federated", "federated"), _arm("no pretraining", "scratch")]
    arms += [_arm(f"{site} alone", "alone", site) for site in sites]
    names = [arm["encoder"] for arm in arms] + ["raw pixels (PCA)", "metadata only"]
    assert drawn(names, arms) == ["federated", "no pretraining", "raw pixels (PCA)", "metadata only"]
    few = [name for name in names if name not in {f"{site} alone" for site in sites[3:]}]
    assert set(drawn(few, arms)) == set(few)


def _with_variant(**changed):
    """A study with a second pretraining, whose encoder showed signs of collapse."""
    results = _results(**changed)
    results["arms"].append(_arm("federated (B)", "federated", variant="B") | {"collapse": ["EAST: few prototypes"]})
    results["scores"] += [row | {"encoder": "federated (B)"} for row in results["scores"]
                          if row["encoder"] == "federated"]  # fmt: skip
    pair = {"encoder": "federated", "other": "federated (B)"}
    rows = [_gap(gap, probe="linear", fraction=share, share=patients / 31, labelled_patients=patients,
                 domain="in domain") | pair
            for share, patients, gap in ((0.1, 3, 0.2), (1.0, 31, 0.0))]  # fmt: skip
    results["differences"] += [*rows, *(row | {"encoder": "federated (B)", "other": "federated"} for row in rows)]
    return results


def test_two_pretrainings_are_compared_once_in_a_place_of_their_own(tmp_path):
    page = _written(tmp_path, _with_variant())
    words = _words(page)
    assert '<a href="#which">' in page
    assert "federated against federated (B): better in 1, tie in 1 of 2 comparisons" in words
    assert words.count("federated less federated (B)") == 1
    assert "federated (B) less federated" not in words
    assert "Which pretraining?" not in _written(tmp_path, _results())


def test_an_encoder_that_collapsed_raises_an_alarm_at_the_top_and_is_marked_in_the_table(tmp_path):
    page = _written(tmp_path, _with_variant())
    top = _words(page[: page.index("<main>")])
    assert "The encoder federated (B) showed signs of collapse in its last round: EAST: few prototypes; its fig" in top
    assert "cannot be trusted" in top
    assert '<span class="verdict worse">EAST: few prototypes</span>' in page
    assert "signs of collapse in its last round" not in _written(tmp_path, _results())


def test_folders_of_runs_and_their_use_are_told(page):
    assert "<code>federated-ab12</code>" in page
    assert "fedssl finetune ENCODERS/FOLDER --labels ..." in page


def test_notes_stand_under_limits_once(tmp_path):
    results = _results() | {"notes": ["lesion: not done, as 4 patients are too few"]}
    assert _words(_written(tmp_path, results)).count("4 patients are too few") == 1
    results["limits"] = [*results["limits"], *results["notes"]]
    assert _words(_written(tmp_path, results)).count("4 patients are too few") == 1


def test_shares_are_those_that_were_labelled_in_tables_and_figures(page):
    words = _words(page)
    assert "9.7 % (3 patients)" in words
    assert "10 %" not in words.split("All figures")[1].split("Which weights")[0]
    assert ">9.7</text>" in page


def test_about_a_tenth_is_the_nearest_share_of_at_least_a_twentieth_in_each_domain():
    shares = {"a": (0.04, 0.12, 0.28, 1.0), "b": (0.2, 0.6, 1.0), "c": (1.0,), "d": (0.08, 0.12, 1.0)}
    rows = [{"domain": domain, "share": share, "fraction": share} for domain in shares for share in shares[domain]]
    found = [(row["domain"], row["share"]) for row in few_and_all(rows)]
    assert found == [("a", 0.12), ("a", 1.0), ("b", 0.2), ("b", 1.0), ("c", 1.0), ("d", 0.08), ("d", 1.0)]


def test_too_few_patients_to_tell_is_neither_green_nor_red(tmp_path):
    rows = [_joining("NORTH", -0.2, federated=0.7, alone=0.9) | {"verdict": "too few patients to tell"}]
    page = _written(tmp_path, _results(joining=rows, left_out=[]))
    assert '<span class="verdict tie">too few patients to tell</span>' in page
    figure = next(svg for svg in re.findall(r"<svg.*?</svg>", page, flags=re.S) if "federated less alone" in svg)
    assert "var(--red)" not in figure


def test_no_row_is_bold_for_being_federated(page):
    drops = page[page.index("Mean drop of AUROC") :]
    assert 'class="own"' not in drops[: drops.index("</table>")]
    assert "tr.own > *, " not in page


def test_many_lines_have_no_bands_and_the_page_says_so(tmp_path):
    results = _results()
    sites = [_arm(f"S{number} alone", "alone", f"S{number}") for number in range(5)]
    results["arms"] += sites
    results["scores"] += [row | {"encoder": arm["encoder"]} for arm in sites for row in results["scores"]
                          if (row["encoder"], row["probe"]) == ("federated", "linear")]  # fmt: skip
    words = _words(_written(tmp_path, results))
    assert "so many lines have no bands" in words
    assert "bands are 95 % intervals" in words  # fine-tuned
