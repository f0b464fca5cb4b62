"""A hospital's policy: what it does not admit is refused with the line; one that cannot be read admits nothing."""

from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from jinja2 import Template

from fedssl import deployment
from fedssl.answering import configuration
from fedssl.build_rules import proposal_of
from fedssl.deployment.settings import Consortium
from fedssl.errors import ConfigError, PolicyError
from fedssl.site.hours import is_open, next_opening, read_hours
from fedssl.site.rules import Proposal, Rules, RulesFile

NOW = datetime(2026, 11, 28, 21, 30, tzinfo=ZoneInfo("Europe/Berlin"))  # a Saturday
MB = 1_000_000
ASKED = Proposal(
    "contrastive_clustering", "resnet18", "0123456789ab", 3, 3, private=False, gpu=False,
    settings={"training.local_epochs": 2.0, "training.threads": 4, "training.precision": "bf16", "resume": False},
)  # fmt: skip
LAX = replace(ASKED, private=True, settings={**ASKED.settings, "privacy.delta": 1e-3})
HEAD = "version: 1\nexpires: 2027-01-31\n"


def rules_of(folder, text):
    (folder / "policy.yaml").write_text(HEAD + text)
    return Rules.read(folder / "policy.yaml")


def refusal(rules, asked=ASKED, now=NOW, uploaded=0):
    try:
        rules.admit(asked, now, uploaded)
    except PolicyError as error:
        return str(error)
    return ""


REFUSED = {
    "methods": ("methods: [simclr]", ASKED, "contrastive_clustering is not among simclr"),
    "encoders": ("encoders: [resnet50]", ASKED, "resnet18 is not among resnet50"),
    "configurations": ("configurations: ['ffffffffffff']", ASKED, "0123456789ab is not among"),
    "an upper bound": ("settings:\n  training.local_epochs: 1", ASKED, "the run has 2.0, at most 1 is allowed"),
    "a list": ("settings:\n  training.precision: [float32]", ASKED, "the run has bf16, one of float32 is allowed"),
    "a word": ("settings:\n  training.precision: float32", ASKED, "the run has bf16, float32 is wanted"),
    "a switch": ("settings:\n  resume: true", ASKED, "the run has False, True is wanted"),
    "no such setting": ("settings:\n  training.speed: 1", ASKED, "the run has no such setting"),
    "min_sites": ("min_sites: 4", ASKED, "a quorum of 3, at least 4 is wanted"),
    "privacy": ("privacy:\n  required: true", ASKED, "without differential privacy"),
    "a private profile": ("privacy:\n  profile: strict", ASKED, "lets only private runs train"),
    "a profile's delta": ("privacy:\n  profile: strict", LAX, "allows a delta of 1e-06 at most; the run has 0.001"),
    "a delta that is required": ("privacy:\n  required: true", LAX, "allows a delta of 1e-06 at most"),
    "a number for a switch": ("settings:\n  resume: [0]", ASKED, "the run has False, one of 0 is allowed"),
    "hours": ("hours: ['22:00-06:00']", ASKED, "it opens again on Saturday at 22:00"),
    "gpu": ("resources:\n  gpu: false", replace(ASKED, gpu=True), "would use the GPU"),
    "threads": ("resources:\n  threads: 2", ASKED, "wants 4 CPU threads, 2 are allowed"),
    "a day's upload": ("resources:\n  upload_mb_per_day: 10", ASKED, "12.0 MB have left in 24 hours"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "asked", "expected"), REFUSED.values(), ids=REFUSED.keys())
def test_each_rule_refuses_what_it_does_not_admit_and_names_its_line(text, asked, expected, tmp_path):
    rules = rules_of(tmp_path, f"# a comment\n\n{text}\n")
    told = refusal(rules, asked, uploaded=12 * MB)
    lines = (tmp_path / "policy.yaml").read_text().splitlines()
    key = text.splitlines()[-1].split(":")[0].strip()
    number = next(i for i, line in enumerate(lines, 1) if line.strip().startswith(key))
    assert expected in told
    assert f"line {number} of policy.yaml" in told
    assert "Ask the hospital's administrator" in told


def test_what_all_rules_admit_is_admitted_and_the_roll_call_is_answered_outside_hours(tmp_path):
    text = (
        "methods: [contrastive_clustering]\nencoders: [resnet18]\nconfigurations: [0123456789ab]\nmin_sites: 3\n"
        "settings: {training.local_epochs: 2, training.precision: [bf16, float32]}\nhours: ['21:00-06:00']\n"
        "resources: {threads: 4, gpu: false, upload_mb_per_day: 10}\n"
    )
    rules = rules_of(tmp_path, text)
    assert refusal(rules, uploaded=9 * MB) == ""
    noon = NOW.replace(hour=12)
    assert "hours" in refusal(rules, now=noon)
    assert refusal(rules, replace(ASKED, number=0), now=noon) == ""


def test_all_reasons_are_told_at_once(tmp_path):
    told = refusal(rules_of(tmp_path, "methods: [simclr]\nmin_sites: 9\nencoders: [a]\n"))
    assert all(f"line {number} of policy.yaml" in told for number in (3, 4, 5))


def test_a_policy_ends_after_its_last_day_and_a_pause_file_pauses_even_the_roll_call(tmp_path):
    rules = rules_of(tmp_path, "pause_file: pause\n")
    assert refusal(rules, now=NOW.replace(year=2027, month=1, day=31)) == ""
    assert "line 2 of policy.yaml, expires" in refusal(rules, now=NOW.replace(year=2027, month=2, day=1))
    (tmp_path / "pause").touch()
    assert "line 3 of policy.yaml, pause_file" in refusal(rules, replace(ASKED, number=0))
    (tmp_path / "pause").unlink()
    assert refusal(rules) == ""


def test_a_tensor_that_is_not_on_the_list_does_not_leave(tmp_path):
    caps = "resources:\n  upload_mb_per_message: 2\n  upload_mb_per_day: 5\n"
    rules = rules_of(tmp_path, f"tensors: [encoder., prototypes]\n{caps}")
    rules.admit_message(["encoder.conv.weight", "prototypes"], 2 * MB, 3 * MB)
    for names, size, uploaded, expected in (
        (["encoder.w", "queue"], 1, 0, "line 3 of policy.yaml, tensors: queue"),
        (["prototypes2"], 1, 0, "prototypes2"),
        (["encoderx"], 1, 0, "encoderx"),
        (["prototypes"], 2 * MB + 1, 0, "line 5 of policy.yaml, resources.upload_mb_per_message"),
        (["prototypes"], 2 * MB, 3 * MB + 1, "line 6 of policy.yaml, resources.upload_mb_per_day"),
    ):
        with pytest.raises(PolicyError, match=expected):
            rules.admit_message(names, size, uploaded)


BROKEN = {
    "an unknown key": ("method: [simclr]", "line 3: method is unknown (do you mean methods?)"),
    "an unknown key below": ("resources:\n  memory: 3", "line 4: resources.memory is unknown (do you mean memory_gb?)"),
    "a key twice": ("min_sites: 2\nmin_sites: 3", "line 4: min_sites stands there twice"),
    "another kind": ("methods: simclr", "line 3: methods has a value of the wrong kind (str)"),
    "a switch for a number": ("min_sites: true", "line 3: min_sites has a value of the wrong kind (bool)"),
    "an unknown profile": ("privacy: {profile: lax}", "line 3: privacy.profile must be one of"),
    "a contradiction": ("privacy: {profile: strict, required: false}", "privacy.required contradicts"),
    "a negative cap": ("resources: {memory_gb: -1}", "resources.memory_gb must be above 0"),
    "no window": ("hours: ['25:00-06:00']", "line 3: '25:00-06:00' is no time window"),
    "an empty window": ("hours: ['06:00-06:00']", "is no time window"),
    "a tag": ("min_sites: !!python/object:os.system 3", "line 3: min_sites has a value that cannot be read"),
    "a key that is a list": ("settings:\n  ? [a]\n  : 1", "line 4: a key is no word"),
    "a block for a setting": ("settings: {training: {threads: 4}}", "line 3: settings.training must be a number"),
    "a setting that has no name": ("settings: {the threads: 4}", "line 3: settings.the threads is no name"),
    "a merge": ("privacy: &a {required: true}\n<<: *a", "line 4: << is unknown"),
    "a cap without end": ("resources: {memory_gb: .inf}", "resources.memory_gb must be above 0 and finite"),
    "a pause without a name": ("pause_file: ''", "line 3: pause_file must be the name of a file"),
    "two windows that are none": ("hours: [x, y]\nmin_sites: 0", "line 4: min_sites must be at least 1; line 3: 'x'"),
    "brackets without end": ("methods: " + "[" * 3000, "is no YAML"),
    "no YAML": ("methods: [simclr", "is no YAML (line"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), BROKEN.values(), ids=BROKEN.keys())
def test_a_policy_that_is_wrong_is_refused_whole_with_the_line(text, expected, tmp_path):
    with pytest.raises(ConfigError) as caught:
        rules_of(tmp_path, text + "\n")
    assert expected in str(caught.value)


NOTHING = [b"", b"[]", b"version: 1", b"version: 2\nexpires: 2027-01-01", b"\xff\xfe", None]
NO_DAYS = [b"version: 1\nexpires: " + day for day in (b"2027-02-30", b"2027-01-31 10:00:00", b"'2027-01-31'", b"soon")]


@pytest.mark.parametrize("content", NOTHING + NO_DAYS)
def test_a_policy_that_is_empty_missing_or_no_text_admits_nothing(content, tmp_path):
    if content is not None:
        (tmp_path / "policy.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"policy\.yaml"):
        RulesFile(tmp_path / "policy.yaml").current()


def test_a_changed_policy_is_in_force_at_once_and_a_broken_change_admits_nothing(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(HEAD)
    file = RulesFile(path)
    assert refusal(file.current()) == ""
    first = file.digest
    path.write_text(HEAD + "methods: [simclr]\n")
    assert "simclr" in refusal(file.current())
    assert file.digest != first
    path.write_text(HEAD + "methods: [simclr\n")
    for _ in range(2):
        with pytest.raises(ConfigError):
            file.current()
    assert file.digest == ""
    path.unlink()
    with pytest.raises(ConfigError):
        file.current()


MARKS = [
    "[",
    "{",
    "? ",
    "- ",
    "\t",
    "'",
    '"\\U',
    "!!int ",
    "!!bool ",
    "!!timestamp x",
    "&a ",
    "*a",
    "<<: ",
    "~",
    ".nan",
    "1",
]


@given(st.integers(0, 300), st.integers(0, 8), st.sampled_from(MARKS) | st.text(max_size=4))
@hypothesis_settings(deadline=None, max_examples=300)
def test_whatever_is_typed_into_a_policy_is_either_read_or_refused_in_a_sentence(tmp_path_factory, at, gone, typed):
    blocks = {text.partition(":")[0]: text for text, _, _ in REFUSED.values()}
    whole = HEAD + "pause_file: pause\n" + "\n".join(blocks.values())
    path = tmp_path_factory.mktemp("policy") / "policy.yaml"
    path.write_text(whole[:at] + typed + whole[at + gone :], encoding="utf-8")
    told = "policy.yaml."
    try:
        refusal(Rules.read(path))
    except ConfigError as error:  # nothing else is raised
        told = str(error)
    assert told.startswith("policy.yaml")
    assert told.endswith(".")


def by_hand(windows, moment):
    """Whether a window is open, by looking at the clock and the calendar of today and yesterday."""
    for day, begin, end in windows:
        clock = moment.strftime("%H:%M")
        names = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
        today, yesterday = names[moment.weekday()], names[(moment.weekday() - 1) % 7]
        over = end <= begin
        if day in (None, today) and begin <= clock and (over or clock < end):
            return True
        if over and day in (None, yesterday) and clock < end:
            return True
    return False


@pytest.mark.parametrize("monday", [datetime(2026, 10, 19, tzinfo=UTC), datetime(2027, 3, 22, tzinfo=UTC)])
def test_windows_are_open_as_a_look_at_the_clock_says_minute_by_minute_over_a_change_of_the_clock(monday):
    windows = [(None, "20:00", "06:00"), ("sat", "00:00", "24:00"), ("sun", "23:30", "00:15")]
    minutes = read_hours([f"{day + ' ' if day else ''}{begin}-{end}" for day, begin, end in windows], 1)
    berlin = ZoneInfo("Europe/Berlin")
    moments = [(monday + timedelta(minutes=minute)).astimezone(berlin) for minute in range(14 * 24 * 60)]
    assert {moment.utcoffset() for moment in moments} == {timedelta(hours=1), timedelta(hours=2)}
    assert [is_open(minutes, moment) for moment in moments] == [by_hand(windows, moment) for moment in moments]
    closed = [at for at, moment in enumerate(moments) if not is_open(minutes, moment)]
    for at in closed[: -14 * 60 : 97]:  # the last ones open after the fortnight
        assert next_opening(minutes, moments[at]) == next(one for one in moments[at:] if is_open(minutes, one))


@given(st.sets(st.sampled_from(sorted(REFUSED)), max_size=5), st.sampled_from(sorted(REFUSED)))
@hypothesis_settings(deadline=None, max_examples=60)
def test_more_rules_never_admit_what_fewer_refuse(tmp_path_factory, chosen, one_more):
    folder = tmp_path_factory.mktemp("policy")
    blocks = {REFUSED[name][0].splitlines()[0].split(":")[0]: REFUSED[name][0] for name in sorted(chosen)}
    fewer = refusal(rules_of(folder, "\n".join(blocks.values()) + "\n"), uploaded=12 * MB)
    more = REFUSED[one_more][0]
    blocks.setdefault(more.splitlines()[0].split(":")[0], more)
    assert not fewer or refusal(rules_of(folder, "\n".join(blocks.values()) + "\n"), uploaded=12 * MB)


def test_what_the_policy_says_of_privacy_reaches_the_agent(tmp_path):
    rules = rules_of(tmp_path, "privacy: {profile: strict, epsilon_cap: 2.5, prototype_patients: 9}\n")
    assert rules.node_config() == {"privacy-profile": "strict", "epsilon-cap": 2.5, "prototype-patients": 9}
    assert rules_of(tmp_path, "privacy: {required: true}\n").node_config() == {"privacy-profile": "consortium"}
    assert rules_of(tmp_path, "").node_config() == {}


def test_the_kits_policy_reads_and_admits_the_default_run(tmp_path):
    told = Consortium("trial", "localhost", 8443, ("A", "B", "C"), ("encoder=tiny",))
    template = (Path(deployment.__file__).parent / "templates" / "policy.yaml.j2").read_text()
    (tmp_path / "policy.yaml").write_text(
        Template(template).render(consortium=told, site="A", expires=date(2027, 11, 28))
    )
    rules = Rules.read(tmp_path / "policy.yaml")
    config = configuration("data.root=unused encoder=tiny federation.min_sites=3")
    asked = proposal_of(config, "0123456789ab", 1, False)
    assert (asked.method, asked.encoder, asked.min_sites) == ("contrastive_clustering", "test_resnet", 3)
    assert refusal(rules, asked) == ""
    assert "min_sites" in refusal(rules, proposal_of(configuration("data.root=unused"), "0123456789ab", 1, False))
    simclr = configuration("data.root=unused method=simclr federation.min_sites=3")
    assert "simclr is not among" in refusal(rules, proposal_of(simclr, "0123456789ab", 1, False))
