"""What is said of labels that are missing or do not fit, in words for every verb, and never with a patient's name."""

import numpy as np
import pyarrow as pa
import pytest

from fedssl.build_images import open_images
from fedssl.config import load
from fedssl.data.indexing.scan import read_manifest, read_table
from fedssl.data.labels import half_lost, join_labels, label_table, lost_labels
from fedssl.errors import DataError


@pytest.fixture
def store(hospitals):
    return open_images(load([f"data.root={hospitals}", "data.edge=40"]))


@pytest.fixture
def indexed(store, monkeypatch):
    """Let the index hold other labels."""

    def hold(*labels):
        monkeypatch.setattr(type(store), "column", lambda self, name: np.array(labels))
        return store

    return hold


def test_a_file_that_is_not_there_is_said_to_be_missing_by_its_last_name_only(tmp_path):
    for read in (read_table, read_manifest):
        for name in ("nowhere.csv", "nowhere.parquet"):
            with pytest.raises(DataError, match=f"{name} cannot be read: There is no such file") as told:
                read(tmp_path / "MEYER" / name)
            assert "MEYER" not in str(told.value)
            assert "UTF-8" not in str(told.value)


def test_without_a_table_and_without_labels_in_the_index_no_labels_were_given(indexed):
    with pytest.raises(DataError, match=r"No labels were given.*evaluation\.labels=FILE \(or --labels FILE\)"):
        label_table(indexed("", ""), None, ["lesion"])


def test_without_a_table_another_label_than_that_of_the_index_asks_for_a_table(indexed):
    with pytest.raises(DataError, match=r"only the column label, not lesion\. Give a table"):
        label_table(indexed("a", ""), None, ["lesion"])


def test_a_wrong_column_is_named_with_those_known_and_the_others_are_counted_but_not_shown(store, hospitals):
    table = read_table(hospitals / "labels.csv")
    odd = table.append_column("MEYER ANNA", pa.array([""] * len(table)))
    with pytest.raises(DataError) as told:
        join_labels(store, odd, ["diagnosis"], ["position"])
    said = str(told.value)
    assert "lacks the column diagnosis; it has" in said
    others = odd.num_columns - 2
    assert f"known ones: file, position; {others} other columns are not shown here" in said
    assert "--label, evaluation.label" in said
    assert "MEYER" not in said


def test_labels_that_name_no_image_say_how_files_are_named_in_both_layouts(store, hospitals):
    with pytest.raises(DataError, match=r"root, such as SITE/PATIENT/IMAGE\.dcm, or PATIENT/IMAGE\.dcm"):
        join_labels(store, pa.table({"file": ["x.dcm"], "lesion": [1]}), ["lesion"])


def test_lost_labels_are_counted_by_file_however_its_path_is_written(store, hospitals):
    files = read_table(hospitals / "labels.csv")["file"].to_pylist()[:3]
    table = pa.table({"file": [f"./{files[0]}", *files[1:], "EAST/nobody.dcm"]})
    assert lost_labels(store, table) == {"listed": 4, "lost": 1}


@pytest.mark.parametrize(("lost", "listed", "alarm"), [(0, 0, False), (0, 4, False), (1, 4, False), (2, 4, True)])
def test_from_half_of_the_labels_on_it_is_an_alarm(lost, listed, alarm):
    assert half_lost(lost, listed) is alarm
