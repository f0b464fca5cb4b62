"""A site's own model: trained on its labels, written down, used on new images."""

import csv
import dataclasses
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from typer.testing import CliRunner

from fedssl import progress
from fedssl.augment import standardise
from fedssl.build_images import open_images
from fedssl.checkpoint import load_checkpoint, save_checkpoint
from fedssl.cli import app
from fedssl.encoders import build_encoder
from fedssl.errors import ConfigError, DataError
from fedssl.evaluation import model_folder, out_of_fold
from fedssl.evaluation.calibration_page import calibration_page
from fedssl.evaluation.recipe import Recipe
from fedssl.run_folder import RunFolder
from fedssl.site_model import fit_site_model, predict_images
from simulations.run import simulate

QUICK = {"part": "head", "least_steps": 8, "most_steps": 8, "checks": 2, "resamples": 30}
FILES = {"model.safetensors", "model.json", "calibration.html", "next-studies.csv"}


def _once(tmp_path_factory, name, make):
    """Make a folder once a session; tests only read it."""
    folder = tmp_path_factory.getbasetemp() / "site-models" / name
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        make(folder)
    return folder


@pytest.fixture
def run(tiny, tmp_path_factory):
    return _once(tmp_path_factory, "run", lambda folder: simulate([*tiny, f"run_dir={folder}"]))


@pytest.fixture
def some_labels(hospitals, tmp_path):
    """Labels of all but the last patients of each site."""
    rows = _read(hospitals / "labels.csv")
    return _write(tmp_path / "some.csv", [row for row in rows if row["patient"][-1] not in "89"])


@pytest.fixture
def fitted(run, some_labels, tmp_path_factory):
    def make(folder):
        fit_site_model(run, some_labels, label="lesion", output=folder, **QUICK)

    return _once(tmp_path_factory, "fitted", make)


@pytest.fixture
def copy(fitted, tmp_path):
    return shutil.copytree(fitted, tmp_path / "copy")


def _read(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def _write(path, rows):
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def _alarms(heard):
    return [event.text for event in heard if isinstance(event, progress.Note) and event.alarm]


def _command(*arguments):
    """Run the command; returns its exit code and everything that it said, on one line."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, " ".join(result.output.split())


def _facts(folder):
    return json.loads((folder / "model.json").read_text())


def _files(root, suffix=".dcm"):
    return {path.relative_to(root).as_posix() for path in root.rglob(f"*{suffix}")}


def test_a_model_is_four_files_that_only_their_owner_reads(fitted):
    assert {path.name for path in fitted.iterdir()} == FILES
    assert fitted.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in fitted.iterdir()} == {0o600}


def test_the_facts_say_what_was_learned_from_whom_and_by_which_weights(fitted, run, some_labels):
    facts, rows = _facts(fitted), _read(some_labels)
    assert (facts["outputs"], facts["label"], facts["exclusive"], facts["part"]) == (["0", "1"], "lesion", True, "head")
    assert facts["images"] == len(rows)
    assert facts["patients"] == len({row["patient"] for row in rows})
    assert facts["patients_by_output"]["1"]["with"] == len({row["patient"] for row in rows if row["lesion"] == "1"})
    assert set(facts["cutoffs"]) == {"1"}
    assert facts["folds"] == 5
    checkpoint = load_checkpoint(RunFolder(run).last)
    assert facts["origin"]["images_seen"] == checkpoint.images_seen
    assert facts["origin"]["fingerprint"] == checkpoint.fingerprint
    assert facts["origin"]["had_these_images"]


def test_a_head_that_alone_was_trained_leaves_the_encoder_as_it_was(fitted, run):
    state, shared = load_file(fitted / "model.safetensors"), load_checkpoint(RunFolder(run).last).state
    assert {name.split(".")[0] for name in state} == {"encoder", "head"}
    for name, value in state.items():
        if name.startswith("encoder."):
            assert torch.equal(value, shared[name])


def test_predictions_are_those_of_the_written_weights_calibrated_by_hand(fitted, run, hospitals, tmp_path):
    out = tmp_path / "predictions.csv"
    counts = predict_images(fitted, str(hospitals), output=out)
    lines, facts, state = _read(out), _facts(fitted), load_file(fitted / "model.safetensors")
    assert {line["file"] for line in lines} == _files(hospitals)
    assert [line["file"] for line in lines] == sorted(line["file"] for line in lines)
    assert out.stat().st_mode & 0o777 == 0o600
    assert (counts["images"], counts["unreadable"]) == (len(lines), 0)
    encoder = build_encoder(facts["encoder"]["name"], norm_groups=facts["encoder"]["norm_groups"]).eval()
    encoder.load_state_dict({n.removeprefix("encoder."): v for n, v in state.items() if n.startswith("encoder.")})
    store = open_images(RunFolder(run).config())
    row_of = {name: row for row, name in enumerate(store.column("image").tolist())}
    for line in lines[::17]:
        row = row_of[store.names_of([line["file"]])[0]]
        grey = torch.from_numpy(store.read(np.array([row])).shown())
        small = F.interpolate(grey, size=(32, 32), mode="bilinear", antialias=True)
        with torch.no_grad():
            features = encoder(standardise(small))
        logits = (features @ state["head.weight"].T + state["head.bias"])[0].double().numpy()
        tempered = np.exp(logits / facts["temperature"] + np.array(facts["prior"]))
        expected = tempered / tempered.sum()
        assert [float(line["0"]), float(line["1"])] == pytest.approx(expected.tolist(), rel=1e-5)
        assert line["decision"] == ("1" if expected[1] > facts["cutoffs"]["1"] else "0")
    assert counts["decisions"]["decision"].get("1", 0) == sum(line["decision"] == "1" for line in lines)


def test_nobody_is_judged_by_a_model_that_learned_from_them(run, some_labels, tmp_path, monkeypatch):
    learned, judged = {}, []
    fit, score = out_of_fold.finetune, out_of_fold.logits

    def finetune(encoder, store, rows, targets, patients, recipe, **settings):
        found = fit(encoder, store, rows, targets, patients, recipe, **settings)
        learned[id(found.model)] = (found.model, store.column("patient")[rows], store.column("group")[rows])
        return found

    def logits(model, store, rows, **settings):
        _, patients, groups = learned[id(model)]
        assert not set(store.column("patient")[rows]) & set(patients)
        assert not set(store.column("group")[rows]) & set(groups)
        judged.extend(rows.tolist())
        return score(model, store, rows, **settings)

    monkeypatch.setattr(out_of_fold, "finetune", finetune)
    monkeypatch.setattr(out_of_fold, "logits", logits)
    fit_site_model(run, some_labels, label="lesion", output=tmp_path / "model", number_next=0, **QUICK)
    labelled = len(_read(some_labels))
    assert len(judged) == len(set(judged)) == labelled
    assert len(learned) == 6
    last = list(learned.values())[-1]
    assert len(last[1]) == labelled


def test_the_next_studies_are_unlabelled_ones_of_different_patients_and_stay_within_the_site(
    fitted, some_labels, hospitals
):
    lines = _read(fitted / "next-studies.csv")
    labelled = {row["patient"] for row in _read(some_labels)}
    patients = [line["file"].split("/")[1] for line in lines]
    assert all(
        re.match(rf"cluster {line['cluster']}: \d+ stud(y|ies), (none|\d+) labelled", line["why"]) for line in lines
    )
    assert _facts(fitted)["next_studies"] == len(lines)
    unlabelled = {path.name for path in hospitals.glob("*/*") if path.is_dir()} - labelled
    assert [int(line["rank"]) for line in lines] == list(range(1, len(lines) + 1))
    assert set(patients) == unlabelled
    assert len(patients) == len(set(patients)) == min(20, len(unlabelled))
    assert {line["file"] for line in lines} <= _files(hospitals)
    assert all(re.fullmatch(r"[0-9a-f]{16}", line["study"]) for line in lines)


def test_neither_the_page_nor_the_facts_name_a_patient_or_a_file(fitted, hospitals):
    names = {path.name for path in hospitals.rglob("*") if path.parent != hospitals} | {str(hospitals)}
    for text in ((fitted / "model.json").read_text(), (fitted / "calibration.html").read_text()):
        assert not [name for name in names if name in text]


def test_the_page_is_one_file_that_says_research_only_and_warns_of_a_model_that_guesses(fitted):
    page = (fitted / "calibration.html").read_text()
    assert "For research only." in page
    assert "Synthetic images." in page
    assert page.count("<svg") == 2
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "“lesion” is “1” and not “0”" in page
    assert ("cannot be told from guessing" in page) == (not _facts(fitted)["better_than_guessing"])
    assert "prefers-color-scheme: dark" in page


def test_a_model_that_guesses_says_so_when_it_is_used(copy, hospitals, tmp_path, heard):
    facts = _facts(copy)
    for better in (True, False):
        (copy / "model.json").write_text(json.dumps(facts | {"better_than_guessing": better}))
        heard.clear()
        predict_images(copy, str(hospitals), output=tmp_path / "out.csv", overwrite=True)
        alarms = [event.text for event in heard if isinstance(event, progress.Note) and event.alarm]
        assert any("better than guessing" in text for text in alarms) == (not better)


def test_a_hospital_takes_the_encoder_to_its_own_folder(run, hospitals, tmp_path):
    """The unseen site's images elsewhere, one folder a patient; kinds of examination as classes."""
    shutil.copytree(hospitals / "NORTH", tmp_path / "export")
    rows = [
        {"file": row["file"].removeprefix("NORTH/"), "kind": row["modality"]}
        for row in _read(hospitals / "labels.csv")
        if row["file"].startswith("NORTH/")
    ]
    table = _write(tmp_path / "kinds.csv", rows)
    found = fit_site_model(
        run, table, label="kind", output=tmp_path / "model", images=str(tmp_path / "export"), site="NORTH",
        **(QUICK | {"least_steps": 60, "most_steps": 60}),
    )  # fmt: skip
    kinds = sorted({row["kind"] for row in rows})
    assert len(kinds) > 2
    assert found["outputs"] == kinds
    assert found == _facts(tmp_path / "model")
    assert not found["origin"]["had_these_images"]
    assert "balanced accuracy" in (tmp_path / "model" / "calibration.html").read_text().lower()
    out = tmp_path / "out.csv"
    predict_images(tmp_path / "model", str(tmp_path / "export"), site="NORTH", output=out)
    truth = {row["file"]: row["kind"] for row in rows}
    lines = _read(out)
    assert {line["file"] for line in lines} == _files(tmp_path / "export")
    for line in lines:
        assert line["decision"] == max(kinds, key=lambda kind: float(line[kind]))
    assert np.mean([line["decision"] == truth[line["file"]] for line in lines]) > 2 / len(kinds)


def test_of_a_runs_own_root_one_site_can_be_taken(run, some_labels, tmp_path):
    found = fit_site_model(run, some_labels, label="modality", output=tmp_path / "m", site="WEST", **QUICK)
    assert found["outputs"] == ["CR", "MR"]
    assert found["patients"] == len({r["patient"] for r in _read(some_labels) if r["file"].startswith("WEST/")})
    assert all(line["file"].startswith("WEST/") for line in _read(tmp_path / "m" / "next-studies.csv"))
    with pytest.raises(DataError, match="No label belongs to an image of that site"):
        fit_site_model(run, some_labels, label="lesion", output=tmp_path / "n", site="MARS", **QUICK)


def test_findings_that_occur_together_get_a_probability_and_a_decision_each(run, hospitals, tmp_path):
    rows = [
        {"file": row["file"], "lesion": row["lesion"], "ultrasound": "" if n % 7 == 0 else int(row["modality"] == "US")}
        for n, row in enumerate(_read(hospitals / "labels.csv"))
    ]
    table, names = _write(tmp_path / "findings.csv", rows), ["lesion", "ultrasound"]
    found = fit_site_model(run, table, label=names, output=tmp_path / "model", **QUICK)
    assert (found["outputs"], found["exclusive"], set(found["cutoffs"])) == (names, False, set(names))
    assert found["patients_by_output"]["ultrasound"]["share"] == pytest.approx(
        np.mean([row["ultrasound"] for row in rows if row["ultrasound"] != ""])
    )
    predict_images(tmp_path / "model", str(hospitals), output=tmp_path / "out.csv")
    for line in _read(tmp_path / "out.csv"):
        for name in names:
            assert line[f"{name} decision"] == str(int(float(line[name]) > found["cutoffs"][name]))


def test_a_folder_of_pngs_without_patients_is_predicted_and_what_cannot_be_read_is_counted(fitted, tmp_path):
    root = tmp_path / "pngs"
    (root / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("b.png", "a.png", "deep/c.png"):
        Image.fromarray(rng.integers(0, 255, (50, 60), dtype=np.uint8)).save(root / name)
    whole = (root / "a.png").read_bytes()
    (root / "cut.png").write_bytes(whole[: len(whole) // 2])
    counts = predict_images(fitted, str(root), output=tmp_path / "out.csv")
    assert [line["file"] for line in _read(tmp_path / "out.csv")] == ["a.png", "b.png", "deep/c.png"]
    assert (counts["images"], counts["files"], counts["unreadable"]) == (3, 3, 1)
    Image.fromarray(rng.integers(0, 255, (50, 60), dtype=np.uint8)).save(root / "new.png")
    assert predict_images(fitted, str(root), output=tmp_path / "out.csv", overwrite=True)["images"] == 4


def test_the_files_of_a_manifest_are_named_as_it_names_them(fitted, hospitals, tmp_path):
    shutil.copytree(hospitals / "EAST", tmp_path / "images")
    files = sorted(f"images/{name}" for name in _files(tmp_path / "images"))[::3]
    table = _write(tmp_path / "manifest.csv", [{"image": f"./{name}", "patient_id": ""} for name in files])
    predict_images(fitted, str(table), output=tmp_path / "out.csv")
    assert [line["file"] for line in _read(tmp_path / "out.csv")] == files


def test_predictions_replace_no_other_file(fitted, hospitals, tmp_path, some_labels):
    before = some_labels.read_bytes()
    with pytest.raises(ConfigError, match="holds no predictions"):
        predict_images(fitted, str(hospitals), output=some_labels, overwrite=True)
    assert some_labels.read_bytes() == before
    with pytest.raises(ConfigError, match="is a folder"):
        predict_images(fitted, str(hospitals), output=tmp_path)


def test_a_folder_is_replaced_only_if_it_holds_a_model_and_one_says_so(run, some_labels, copy, tmp_path):
    with pytest.raises(ConfigError, match=r"holds a site model\. Replace it with --overwrite"):
        fit_site_model(run, some_labels, label="lesion", output=copy, **QUICK)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="no site model"):
        fit_site_model(run, some_labels, label="lesion", output=tmp_path / "other", overwrite=True, **QUICK)
    assert (tmp_path / "other" / "thesis.txt").read_text() == "years of work"
    before = _facts(copy)
    found = fit_site_model(run, some_labels, label="lesion", output=copy, overwrite=True, **QUICK)
    assert {path.name for path in copy.iterdir()} == FILES
    assert found == before  # and the same labels give the same model to the bit
    assert not list(tmp_path.glob(".*copy*"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning": 1}, "learning is no setting"),
        ({"head_lrr": 1}, r"did you mean head_lr\?\). There are batch_size, checks, "),
        ({"threads": 0}, "threads must be a whole number of at least 1"),
        ({"resamples": "many"}, "resamples must be a whole number"),
        ({"part": "tail"}, "part=tail"),
        ({"number_next": -1}, "number_next must be a whole number of at least 0"),
        ({"data": {"burned-in": "mask"}}, "data.burned-in is unknown .did you mean burned_in"),
        ({"data": {"burned_in": "perhaps"}}, "data.burned_in must be"),
    ],
)
def test_settings_that_make_no_sense_are_refused(run, some_labels, tmp_path, changed, message):
    with pytest.raises(ConfigError, match=message):
        fit_site_model(run, some_labels, label="lesion", output=tmp_path / "m", **(QUICK | changed))
    assert not (tmp_path / "m").exists()


def test_an_encoder_that_never_trained_gets_no_model(run, some_labels, tmp_path):
    folder = RunFolder(shutil.copytree(run, tmp_path / "run"))
    save_checkpoint(folder.last, replace(load_checkpoint(folder.last), round=0))
    with pytest.raises(ConfigError, match="never trained"):
        fit_site_model(folder.path, some_labels, label="lesion", output=tmp_path / "m", **QUICK)


def test_labels_of_a_single_patient_of_a_class_are_too_few(run, hospitals, tmp_path):
    rows = _read(hospitals / "labels.csv")
    first = rows[0]["patient"]
    table = _write(tmp_path / "l.csv", [{"file": r["file"], "x": int(r["patient"] == first)} for r in rows[:80]])
    with pytest.raises(DataError, match="at least 2 patients"):
        fit_site_model(run, table, label="x", output=tmp_path / "m", **QUICK)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "model.json").unlink(), ConfigError, "no model.json"),
        (lambda f: (f / "model.json").write_text("{"), DataError, "model.json is damaged"),
        (lambda f: (f / "model.json").write_text("[]"), ConfigError, "does not describe a site model"),
        (lambda f: _change(f, format=2), ConfigError, "format 2, but this fedssl reads 1"),
        (lambda f: _change(f, temperature="hot"), DataError, "temperature cannot be used"),
        (lambda f: _change(f, prior=[0.0]), DataError, "prior cannot be used"),
        (lambda f: (f / "model.safetensors").unlink(), DataError, "missing, damaged"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), DataError, "missing, damaged"),
        (lambda f: _change(f, encoder={"_target_": "fedssl.storage.cache_folder"}), ConfigError, "no encoder"),
        (lambda f: _change(f, outputs=["a", "b", "c"], prior=[0.0] * 3), DataError, "do not fit"),
    ],
)
def test_a_damaged_or_foreign_model_is_explained(copy, hospitals, tmp_path, damage, error, message):
    damage(copy)
    with pytest.raises(error, match=message):
        predict_images(copy, str(hospitals), output=tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def _change(folder, **facts):
    (folder / "model.json").write_text(json.dumps(_facts(folder) | facts))


def test_a_studys_folder_is_named_as_such_with_the_folders_of_its_encoders(tmp_path, some_labels):
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "protocol.json").write_text("{}")
    arguments = ("finetune", folder, "--labels", some_labels, "--model", tmp_path / "m")
    code, said = _command(*arguments)
    assert code == 2
    assert "one is a study, not the run of one encoder." in said
    arms = [
        {"encoder": "no pretraining", "fingerprint": ""},
        {"encoder": "federated", "fingerprint": "12ab", "folder": "12ab-34cd"},
        {"encoder": "pooled", "fingerprint": "56ef"},
        {"encoder": "natural images", "missing": "no file"},
    ]
    (folder / "study.json").write_text(json.dumps({"arms": arms}))
    assert "(default: runs/encoders): federated (12ab-34cd), pooled (starts with 56ef)." in _command(*arguments)[1]
    (folder / "study.json").write_text("[1")
    assert "one is a study" in _command(*arguments)[1]


def test_sites_below_the_root_of_one_site_are_refused_before_they_become_patients(
    run, hospitals, some_labels, tmp_path
):
    with pytest.raises(
        ConfigError, match=r"folders of sites \(.*WEST\).*Give --images IMAGES/SITE, or leave out --site"
    ):
        fit_site_model(
            run, some_labels, label="lesion", output=tmp_path / "m", images=str(hospitals), site="WEST", **QUICK
        )


def test_a_handful_of_patients_is_said_aloud_with_the_layout_expected(run, hospitals, tmp_path, heard):
    rows = [row for row in _read(hospitals / "labels.csv") if row["file"].startswith("NORTH/")]
    four = sorted({row["patient"] for row in rows})[:4]
    shutil.copytree(hospitals / "NORTH", tmp_path / "export")
    few = [
        {"file": row["file"].removeprefix("NORTH/"), "x": four.index(row["patient"]) % 2}
        for row in rows
        if row["patient"] in four
    ]
    fit_site_model(
        run, _write(tmp_path / "few.csv", few), label="x", output=tmp_path / "m", images=str(tmp_path / "export"),
        site="NORTH", **QUICK,
    )  # fmt: skip
    (text,) = [text for text in _alarms(heard) if text.startswith("Labelled patients: only 4.")]
    assert "expects <patient>/... (because a site was named)" in text


def test_labels_without_an_image_are_counted_in_the_facts_and_half_of_them_are_an_alarm(
    run, fitted, some_labels, tmp_path, heard
):
    rows = _read(some_labels)
    assert _facts(fitted)["labels"] == {"listed": len(rows), "lost": 0}
    strangers = [row | {"file": f"EAST/MEYER/{number}.dcm"} for number, row in enumerate(rows)]
    table = _write(tmp_path / "l.csv", rows + strangers)
    found = fit_site_model(run, table, label="lesion", output=tmp_path / "m", **QUICK)
    assert found["labels"] == {"listed": 2 * len(rows), "lost": len(rows)}
    sentence = f"{len(rows)} of {2 * len(rows)} labels belong to no readable image"
    assert any(sentence in text for text in _alarms(heard))
    page = (tmp_path / "m" / "calibration.html").read_text()
    assert sentence in page
    assert sentence not in (fitted / "calibration.html").read_text()
    assert "MEYER" not in page + (tmp_path / "m" / "model.json").read_text()


def test_an_encoder_that_collapsed_in_its_last_round_is_told_of_aloud_and_on_the_page(
    run, some_labels, tmp_path, heard
):
    folder = RunFolder(shutil.copytree(run, tmp_path / "run"))
    last = load_checkpoint(folder.last).round
    folder.record_round({"round": last, "ssl/collapse": {"EAST": ["features span 1.0 of 16 dimensions (RankMe)"]}})
    found = fit_site_model(folder.path, some_labels, label="lesion", output=tmp_path / "m", **QUICK)
    assert found["origin"]["collapse"] == {"EAST": ["features span 1.0 of 16 dimensions (RankMe)"]}
    assert any("collapse" in text and "EAST: features span 1.0" in text for text in _alarms(heard))
    assert "signs of collapse" in (tmp_path / "m" / "calibration.html").read_text()


def test_threads_are_those_asked_for_else_those_of_the_run(run, fitted, hospitals, tmp_path, some_labels):
    before = torch.get_num_threads()
    assert _facts(fitted)["threads"] == 1
    try:
        predict_images(fitted, str(hospitals), output=tmp_path / "p.csv", threads=2)
        assert torch.get_num_threads() == 2
        predict_images(fitted, str(hospitals), output=tmp_path / "q.csv")
        assert torch.get_num_threads() == 1
        with pytest.raises(ConfigError, match=r"training\.threads must be"):
            predict_images(fitted, str(hospitals), output=tmp_path / "r.csv", threads=0)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("verb", "setting", "sentence"),
    [
        (
            "finetune",
            "finetune.lrr=1",
            "'finetune.lrr' is no setting here (did you mean finetune.lr?). There are data.KEY",
        ),
        ("finetune", "finetune.part=head", "'finetune.part' is no setting here"),
        ("finetune", "finetune.epochs", "'finetune.epochs' is not KEY=VALUE"),
        ("finetune", "data.filters={a", "The value of data.filters cannot be read"),
        ("finetune", "data.root=elsewhere", "Name the images' root itself"),
        ("finetune", "training.threads=none", "threads must be a whole number"),
        ("finetune", "finetune.lr=-5e-4", "finetune.lr=-0.0005 must be a number above 0"),
        ("predict", "finetune.lr=1", "'finetune.lr' is no setting here. There are data.KEY, training.threads."),
        ("predict", "training.threads=0", "training.threads must be a whole number"),
    ],
)
def test_a_setting_that_would_change_nothing_is_refused_with_those_that_there_are(
    run, fitted, some_labels, hospitals, tmp_path, verb, setting, sentence
):
    words = {
        "finetune": (run, "--labels", some_labels, "--label", "lesion", "--model", tmp_path / "m"),
        "predict": (fitted, hospitals, "--output", tmp_path / "p.csv"),
    }
    code, said = _command(verb, *words[verb], setting)
    assert code == 2
    assert sentence in said


def test_the_help_names_every_setting_of_a_recipe_and_what_the_paths_are_relative_to():
    of_recipe = {field.name for field in dataclasses.fields(Recipe)}
    helps = {name: _command(name, "--help")[1] for name in ("finetune", "predict")}
    words = set(re.findall(r"[\w.]+", helps["finetune"]))
    assert of_recipe - {"part"} | {"resamples", "finetune.KEY", "data.KEY", "training.threads"} <= words
    assert "names files by their paths below IMAGES" in helps["predict"]
    assert "training.threads" in helps["predict"]
    assert "head_lr" not in helps["predict"]


def test_the_command_shows_no_interval_where_none_holds_and_says_when_nothing_is_left_to_label(
    run, hospitals, tmp_path
):
    words = ("--labels", hospitals / "labels.csv", "--label", "lesion", "--part", "head", "--model", tmp_path / "m")
    code, said = _command("finetune", run, *words, "finetune.most_steps=8", "finetune.least_steps=8")
    assert code == 0
    assert re.search(r"calibration error +\d\.\d{3} +\d\.\d{3} ", said)
    assert "Calibration error has no interval" in said
    assert "Every study has a label already" in said
    assert (tmp_path / "m" / "next-studies.csv").read_text() == "rank,file,study,cluster,why\n"


def test_predictions_are_replaced_only_if_one_says_so(fitted, hospitals, tmp_path):
    out = tmp_path / "p.csv"
    assert _command("predict", fitted, hospitals, "--output", out)[0] == 0
    before = out.stat().st_mtime_ns
    code, said = _command("predict", fitted, hospitals, "--output", out)
    assert (code, out.stat().st_mtime_ns) == (2, before)
    assert "p.csv exists. Replace it with --overwrite" in said
    assert _command("predict", fitted, hospitals, "--output", out, "--overwrite")[0] == 0
    assert out.stat().st_mtime_ns > before


def test_files_that_somebody_put_beside_a_model_are_not_removed(run, some_labels, copy, tmp_path, heard):
    (copy / "predictions.csv").write_text("file,frame\n")
    with pytest.raises(ConfigError, match="1 other file, which --overwrite would remove"):
        fit_site_model(run, some_labels, label="lesion", output=copy, overwrite=True, **QUICK)
    assert (copy / "predictions.csv").exists()
    _replace(copy)  # put there during the training
    assert {path.name for path in copy.iterdir()} == FILES
    assert [path.name for path in (tmp_path / "copy.kept1").iterdir()] == ["predictions.csv"]
    assert any("kept beside it in copy.kept1" in text for text in _alarms(heard))


def _replace(folder, mark="new"):
    """Write a model anew as the same one with another mark."""
    facts, tensors = model_folder.read_model(folder)
    facts["mark"] = mark
    return model_folder.write_model(folder, tensors, facts, lambda path: path.write_text(""))


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("last", range(1, 40))
def test_a_kill_at_any_call_to_the_system_leaves_an_old_or_a_new_model(copy, monkeypatch, last):
    """The process dies before its Nth change of the folders: nothing after it happens, not even tidying."""
    calls = 0

    def mortal(function):
        def call(*arguments, **settings):
            nonlocal calls
            calls += 1
            if calls >= last:
                raise _Killed
            return function(*arguments, **settings)

        return call

    with monkeypatch.context() as patch:
        for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
            patch.setattr(f"pathlib.Path.{name}", mortal(getattr(model_folder.Path, name)))
        patch.setattr("shutil.rmtree", mortal(shutil.rmtree))
        try:
            _replace(copy)
        except _Killed:
            pass
        else:
            assert last > 10
    assert model_folder.read_model(copy)[0].get("mark", "old") in {"old", "new"}
    with pytest.raises(ConfigError, match="holds a site model"):
        model_folder.refuse_folder(copy, overwrite=False)
    model_folder.refuse_folder(copy, overwrite=True)
    _replace(copy, "newer")
    assert _facts(copy)["mark"] == "newer"
    assert [path.name for path in copy.parent.iterdir() if "copy" in path.name] == ["copy"]


def test_the_page_lists_the_shares_in_a_table_and_remarks_on_cutoffs_at_the_edge(fitted):
    facts = _facts(fitted)
    for cutoff, words in ((0.04, "Very low"), (0.5, ""), (0.96, "Very high")):
        page = calibration_page(facts | {"cutoffs": {"1": cutoff}})
        assert [text for text in ("Very low", "Very high") if text in page] == ([words] if words else [])
    count = facts["patients_by_output"]["1"]
    assert f'<td class="figure">{count["with_or_without"]}</td>' in page
    assert "share of images" in page
