"""The page of a study: whole, plain, without anything outside itself."""

import copy
import html
import json
import re
from html.parser import HTMLParser

import pytest

from fedssl.evaluation.label_reduction import Reduction
from fedssl.evidence.figures import drawn, styles_of
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
    facts = {"round": 2, "images_seen": 12345, "sites": [site] if site else ["NORTH", _SITE], "method": "SwAV"}
    return own | facts | {"fingerprint": "feed", "sha256": "0123456789abcdef" * 4}


def _reduction(probe, **changed):
    found = Reduction(4.2, 1.9, 10.0, 4.0, at_least=False, high_at_least=True, low_at_least=False, reached=0.995)
    found = Reduction(**(vars(found) | changed))
    return {
        "task": "lesion", "encoder": "federated", "probe": probe, "baseline": "no pretraining",
        "baseline_probe": "fine-tuned", "domain": "in domain", "text": found.text(), **vars(found),
    }  # fmt: skip


def _scores(domains=_DOMAINS[:1]):
    metrics = ("auroc", "auprc", "balanced_accuracy", "sensitivity_at_95_specificity", "calibration_error")
    probes = dict.fromkeys(("no pretraining", "federated"), ("linear", "knn", "fine-tuned"))
    probes |= {f"{_SITE} alone": ("linear", "knn"), "raw pixels (PCA)": ("linear",)}
    return [
        {"task": "lesion", "encoder": encoder, "probe": probe, "fraction": share, "labelled_patients": patients,
         "labelled_images": 2 * patients, "domain": domain, "metric": metric,
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
        "unseen_sites": ["FAR"], "seeds": 2, "resamples": 200, "arms": arms,
        "tasks": [{"task": "lesion", "kind": "binary", "outputs": ["0", "1"], "train_patients": 31, "train_images": 62,
                   "tests": {"in domain": {"images": 30, "patients": 15}}}],
        "scores": _scores(),
        "differences": [
            _gap(0.1234, encoder="federated", other=other, probe=probe, fraction=share, domain=domain)
            for other in others for probe in ("linear", "knn") for share in (0.1, 1.0) for domain in _DOMAINS
        ],
        "delong": [{"task": "lesion", "encoder": "federated", "other": other, "domain": "in domain",
                    "difference": 0.01, "low": nan, "high": nan, "p": nan} for other in others],
        "reductions": [_reduction("fine-tuned"), _reduction("linear", times=0.0, low=0.0, grid=0.0)],
        "convergence": [curve | {"encoder": "no pretraining", "values": [0.5, 0.6, 0.7]},
                        curve | {"encoder": "federated", "values": [0.5, 0.8, nan], "speed_up": {},
                                 "text": "speed-up of 75.0 % [60.1, 80.2]"}],
        "joining": [_joining("NORTH", 0.2, federated=0.9, alone=0.7), _joining(_SITE, 0.01, federated=0.8, alone=0.79),
                    {"task": "lesion", "site": "TINY", "variant": "", "reason": "too few labelled patients"}],
        "left_out": [_joining("NORTH", -0.1, without=0.6, no_pretraining=0.7, **{"with": 0.75})],
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
    return _written(tmp_path_factory.mktemp("page"), _results(scores=_scores(_DOMAINS)))


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
    assert all(picture["role"] == "img" and picture["aria-label"] for picture in tags.pictures)


def test_every_section_stands_on_the_page(page):
    for heading in _HEADINGS:
        assert re.search(rf"<h[23]>{re.escape(heading)}</h[23]>", page), heading


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
    assert "4 times: with 25 % of the labels" in words
    assert "Shown: the whole interval" in words
    assert "<strong>not reached</strong>" in page
    assert "Not reached: with no measured share" in words


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"low": 0.0}, "Not certain: the interval includes “not reached”"),
        ({"low": 1.0}, "Not certain: the interval includes 1,"),
        ({"grid": 0.0}, "Not steady: it does as well with few labels"),
        ({"times": 1.0, "low": 0.0, "grid": 1.0}, "1: it does as well with all labels only"),
        ({"times": 0.0, "low": 0.0, "high": 0.0, "reached": 0.0}, "Not reached: with no measured share"),
        ({"times": float("nan"), "low": float("nan"), "grid": float("nan")}, "Not known: too few test patients"),
    ],
)
def test_what_is_not_shown_is_said_to_be_not_shown(tmp_path, changed, said):
    rows = [_reduction("fine-tuned", **changed)]
    words = _words(_written(tmp_path, _results(reductions=rows)))
    assert said in words
    assert "Shown: the whole interval" not in words


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
        "better +0.123 [+0.073, +0.173], p 0.032",
        "NORTH | 21 | 17 | 0.900 | 0.700 | +0.200 [+0.150, +0.250] | 0.032 | better |",
        "| 0.600 | 0.700 | 0.750 | -0.100 [-0.150, -0.050] | 0.032 | worse |",
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
    for sentence in [*results["sentences"], *results["limits"]]:
        assert sentence in words


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


def test_an_encoder_has_one_colour_everywhere_and_baselines_are_dashed():
    results = _results()
    styles = styles_of(results["arms"], results["scores"])
    assert list(styles) == ["federated", "no pretraining", f"{_SITE} alone", "raw pixels (PCA)"]
    assert [style.dashed for style in styles.values()] == [False, False, False, True]
    assert len({style.css for style in styles.values()}) == len(styles)


def test_a_crowded_figure_leaves_out_whole_groups_never_one_site_of_several():
    sites = [f"S{number}" for number in range(9)]
    arms = [_arm("federated", "federated"), _arm("no pretraining", "scratch")]
    arms += [_arm(f"{site} alone", "alone", site) for site in sites]
    names = [arm["encoder"] for arm in arms] + ["raw pixels (PCA)", "metadata only"]
    assert drawn(names, arms) == ["federated", "no pretraining", "raw pixels (PCA)", "metadata only"]
    few = [name for name in names if name not in {f"{site} alone" for site in sites[3:]}]
    assert set(drawn(few, arms)) == set(few)
