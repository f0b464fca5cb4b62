"""Text in the pixels and copies of images, from files to the store."""

import pytest
from PIL import Image
from pydicom import dcmread
from stores import store_of

from fedssl.errors import DataError


def test_ultrasound_without_a_statement_is_refused_masked_or_allowed_and_counted(copied, tmp_path):
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    region = Dataset()
    region.RegionLocationMinX0, region.RegionLocationMinY0, region.RegionLocationMaxX1, region.RegionLocationMaxY1 = (
        0,
        64,
        127,
        127,
    )
    for number, path in enumerate(sorted(copied.rglob("*.dcm"))):
        dataset = dcmread(path)
        del dataset.BurnedInAnnotation
        dataset.PixelData = b"\x64" * len(dataset.PixelData)
        if number % 2:
            dataset.SequenceOfUltrasoundRegions = Sequence([region])
        dataset.save_as(path)
    with pytest.raises(DataError, match="may show text"):
        store_of(copied, tmp_path / "store").open()
    masked = store_of(copied, tmp_path / "store", burned_in="mask")
    images = masked.open()
    assert len(images) == 8
    assert sum(masked.summary()["unreadable"].values()) == 8
    allowed = store_of(copied, tmp_path / "store", burned_in="allow")
    assert len(allowed.open()) == 16
    assert allowed.summary()["text_risk_let_through"] == {"ultrasound without a statement": 16}


@pytest.mark.parametrize("kind", ["SCREENSAVE", ["DERIVED", "SECONDARY", "SCREEN SAVE"]])
def test_a_screenshot_is_refused_whatever_it_states_and_however_many_words_its_type_has(copied, tmp_path, kind):
    for path in copied.rglob("*.dcm"):
        dataset = dcmread(path)
        dataset.ImageType = kind
        dataset.save_as(path)
    with pytest.raises(DataError, match="screenshot"):
        store_of(copied, tmp_path / "store").open()


def test_near_copies_of_two_patients_in_one_folder_of_pictures_are_found(hospitals, tmp_path):
    folder = tmp_path / "root" / "album"
    folder.mkdir(parents=True)
    for number, path in enumerate(sorted(hospitals.glob("EAST/*/003.dcm"))[:4]):
        image = Image.fromarray(dcmread(path).pixel_array)
        image.save(folder / f"{number}.png")
        image.save(folder / f"{number}.jpg", quality=95)
    images = store_of(tmp_path / "root", tmp_path / "store", site="a", patient_from="file", edge=96).open()
    assert len(set(images.column("group"))) == 4
