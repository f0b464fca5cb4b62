"""Not-a-number, byte order and statements about burned-in text: what a record and a policy make of them."""

import gzip
import io

import nibabel as nib
import numpy as np
import pytest
from made_dicom import RAMP, file_of, made, pictures_of
from oracle_dicom import decoded
from PIL import Image
from pydicom.uid import ExplicitVRBigEndian

from fedssl.data.decoding.burned_in import Policy
from fedssl.data.decoding.image import open_file
from fedssl.data.decoding.picture import Meaning, Picture
from fedssl.data.decoding.record import record

FLOATS = np.linspace(1, 60, 60, dtype=np.float32).reshape(5, 4, 3)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def _range_of(pictures):
    records = [record(picture, 8) for picture in pictures]
    return [(found.low, found.high) for found in records]


@pytest.mark.parametrize("hole", [np.nan, np.inf])
def test_a_volume_with_holes_keeps_a_finite_range(hole):
    holed = FLOATS.copy()
    holed[0] = hole
    pictures, reason, _ = decoded(gzip.compress(nib.Nifti1Image(holed, np.eye(4)).to_bytes()), "volume.nii.gz")
    assert not reason
    assert np.isfinite(_range_of(pictures)).all()


def test_float_pixel_data_with_a_hole_keeps_a_finite_range():
    holed = FLOATS[:, :, 0].copy()
    holed[0, 0] = np.nan
    dataset = made(holed, Modality="MR")
    for keyword in ("PixelData", "BitsStored", "HighBit", "PixelRepresentation"):
        delattr(dataset, keyword)
    dataset.FloatPixelData = holed.tobytes()
    assert np.isfinite(_range_of(pictures_of(dataset))).all()


def test_a_tiff_with_a_hole_keeps_its_other_values():
    holed, stream = FLOATS[:, :, 0].copy(), io.BytesIO()
    holed[0, 0] = np.nan
    Image.fromarray(holed).save(stream, "TIFF")
    (picture,) = decoded(stream.getvalue(), "picture.tiff")[0]
    assert np.isfinite(picture.values[1:]).all()


def test_one_hot_pixel_does_not_change_the_range_of_a_float_image():
    values = np.random.default_rng(0).random((64, 64)).astype(np.float32)
    values[3, 3] = 1e7
    found = record(Picture(values, Meaning.RAW, 32), 16)
    np.testing.assert_allclose([found.low, found.high], np.quantile(values, [0.005, 0.995]), atol=0.01)


def test_the_digest_of_an_image_does_not_depend_on_its_byte_order():
    little, big = (pictures_of(made(RAMP, Modality="MR", **how))[0] for how in ({}, {"syntax": ExplicitVRBigEndian}))
    np.testing.assert_array_equal(little.values, big.values)
    assert record(little, 8).digest == record(big, 8).digest


def test_an_ultrasound_with_an_overlay_is_not_let_through_the_mask_policy_without_a_mask():
    dataset = made(RAMP.astype(np.uint8), Modality="US")
    dataset.add_new(0x60003000, "OW", bytes(8))
    with pytest.raises(ValueError, match="does not say where the scan is"):
        open_file(file_of(dataset), "made.dcm", policy=Policy.MASK)


@pytest.mark.parametrize("kind", ["77.1.5.1", "77.1.4", "77.1.6"])  # ophthalmic, photographic, whole slide
def test_photographs_of_patients_are_no_secondary_captures(kind):
    dataset = made(RAMP.astype(np.uint8), Modality="OP", SOPClassUID=f"1.2.840.10008.5.1.4.1.1.{kind}")
    header, _ = open_file(file_of(dataset), "made.dcm", policy=Policy.REFUSE)
    assert header.risk == ""


def test_a_photograph_is_turned_as_its_camera_notes():
    stream, notes = io.BytesIO(), Image.Exif()
    notes[0x0112] = 6  # turned by a quarter (EXIF 2.3, 4.6.4 A, Orientation)
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(stream, "JPEG", exif=notes)
    assert decoded(stream.getvalue(), "photo.jpg")[0][0].values.shape == (30, 20)
