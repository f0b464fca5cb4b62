"""The command on a PACS: pull, index, train."""

import json

from typer.testing import CliRunner

from fedssl.cli import app

runner = CliRunner()


def test_a_pacs_is_indexed_by_one_command_and_the_second_time_nothing_is_pulled(url, headers, tmp_path):
    command = ["index", url, f"data.store={tmp_path}", "data.filters={Modality: MR}", "data.burned_in=allow"]
    first = runner.invoke(app, [*command, "--format", "json"])
    assert first.exit_code == 0, first.output
    found = json.loads(first.stdout)
    stored = [header for header in headers if header.get("Modality") == "MR"]
    assert found["sites"][0]["site"] == "pacs"
    assert found["sites"][0]["files"] == len(stored)
    assert found["sites"][0]["images"] == sum(int(header.get("NumberOfFrames") or 1) for header in stored)
    again = runner.invoke(app, command)
    assert again.exit_code == 0
    assert "0 new" in again.stderr
    assert not any(str(header.PatientID) in again.output for header in stored if header.get("PatientID"))


def test_a_pacs_that_is_not_there_is_one_sentence_and_exit_code_3(tmp_path):
    said = runner.invoke(app, ["index", "dicomweb+http://127.0.0.1:1/dicom-web", f"data.store={tmp_path}"])
    assert said.exit_code == 3
    assert "Traceback" not in said.output
    assert len(said.stderr.strip().splitlines()) <= 2
