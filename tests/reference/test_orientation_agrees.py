"""One volume with a mark at the patient's right, front and top: the same slices from DICOM, from NIfTI, from MONAI."""

import gzip
import itertools

import nibabel as nib
import numpy as np
import pytest
from made_dicom import file_of, made
from oracle_dicom import decoded
from pydicom.uid import generate_uid

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # MONAI misses a plugin that is not needed
SPACING = {"R": 1.5, "A": 2.0, "S": 4.0}  # millimetres along each axis of the patient
SIZE = {"R": 7, "A": 6, "S": 5}
OPPOSITE = {"L": "R", "P": "A", "I": "S"}
CODES = ["RAS", "LPS", "LAS", "RPI", "PIR", "SRA", "ASL", "IPL"]
ALL_CODES = [
    "".join(code)
    for axes in itertools.permutations(("RL", "AP", "SI"))
    for code in itertools.product(*axes)
]  # fmt: skip


def _value(right, front, up):
    """Return what is at a place of the patient, each counted from the other end: no two places are alike."""
    mark = (right, front, up) == (SIZE["R"] - 1, SIZE["A"] - 1, SIZE["S"] - 1)
    return 255 if mark else right + 7 * front + 42 * up


def _expected(up):
    """Return the axial slice as a screen shows it: the patient's right on the left, the front on top."""
    rows = [[_value(SIZE["R"] - 1 - column, SIZE["A"] - 1 - row, up) for column in range(SIZE["R"])]
            for row in range(SIZE["A"])]  # fmt: skip
    return np.array(rows, np.int16)


def _nifti(code, kind=np.int16):
    """Write the volume with axes that run towards ``code``, the affine made by hand."""
    axes = [OPPOSITE.get(letter, letter) for letter in code]
    data, affine = np.zeros([SIZE[axis] for axis in axes], kind), np.zeros((4, 4))
    affine[3, 3] = 1
    for number, (letter, axis) in enumerate(zip(code, axes, strict=True)):
        step = SPACING[axis] if letter == axis else -SPACING[axis]
        affine["RAS".index(axis), number] = step
        affine["RAS".index(axis), 3] = 0 if letter == axis else SPACING[axis] * (SIZE[axis] - 1)
    for index in np.ndindex(data.shape):
        world = affine @ [*index, 1]
        data[index] = _value(*(round(world[number] / SPACING[axis]) for number, axis in enumerate("RAS")))
    return nib.Nifti1Image(data, affine)


def _dicom(up, orientation=(1, 0, 0, 0, 1, 0)):
    """Write one axial slice: x runs to the patient's left, y to the back (PS3.3, C.7.6.2.1.1)."""
    pixels = _expected(up)
    corner = [-(SIZE["R"] - 1) * SPACING["R"], -(SIZE["A"] - 1) * SPACING["A"], up * SPACING["S"]]
    return file_of(
        made(
            pixels, Modality="MR", ImageOrientationPatient=list(orientation), ImagePositionPatient=corner,
            PixelSpacing=[SPACING["A"], SPACING["R"]], SliceThickness=SPACING["S"], InstanceNumber=99 - up,
            SOPInstanceUID=generate_uid(entropy_srcs=[str(up)]), SeriesInstanceUID="1.2.3", StudyInstanceUID="1.2",
        )
    )  # fmt: skip


def _in_order(pictures):
    assert {picture.plane for picture in pictures} == {"axial"}
    return sorted(pictures, key=lambda picture: picture.position)


def _assert_the_expected_slices(pictures):
    pictures = _in_order(pictures)
    assert len(pictures) == SIZE["S"]
    for up, picture in enumerate(pictures):
        np.testing.assert_array_equal(picture.values, _expected(up))
    assert pictures[-1].values[0, 0] == 255
    np.testing.assert_allclose(np.diff([picture.position for picture in pictures]), SPACING["S"])


def test_a_dicom_series_comes_feet_first_with_the_right_on_the_left_and_the_front_on_top():
    _assert_the_expected_slices([decoded(_dicom(up), "slice.dcm")[0][0] for up in (3, 0, 4, 1, 2)])


@pytest.mark.parametrize("code", ALL_CODES)
def test_a_nifti_volume_of_any_axes_gives_the_slices_of_the_dicom_series(code):
    pictures, reason, _ = decoded(_nifti(code).to_bytes(), "volume.nii")
    assert not reason
    _assert_the_expected_slices(pictures)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_a_nifti_volume_keeps_its_values_in_every_type(kind):
    volume = _nifti("LPS", kind)
    pictures, _, _ = decoded(gzip.compress(volume.to_bytes()), "volume.nii.gz")
    np.testing.assert_array_equal(_in_order(pictures)[2].values, _expected(2).astype(kind))


def test_a_nifti_volume_with_slope_and_intercept_is_scaled():
    volume = _nifti("RAS")
    volume.header.set_slope_inter(2, -100)
    data = bytearray(volume.to_bytes())
    scaled = nib.Nifti1Image.from_bytes(bytes(data)).get_fdata()
    pictures = _in_order(decoded(bytes(data), "volume.nii")[0])
    np.testing.assert_allclose(pictures[3].values, scaled[::-1, ::-1, 3].T)


def test_an_oblique_volume_is_turned_to_the_nearest_axes_without_resampling():
    volume, angle = _nifti("RAS"), np.deg2rad(20)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    oblique = nib.Nifti1Image(np.asarray(volume.dataobj), turn @ volume.affine)
    _assert_the_expected_slices(decoded(oblique.to_bytes(), "volume.nii")[0])


@pytest.mark.parametrize("code", CODES)
def test_monai_turns_a_nifti_volume_the_same_way(code, tmp_path):
    transforms = pytest.importorskip("monai.transforms")
    nib.save(_nifti(code), tmp_path / "volume.nii.gz")
    load = transforms.LoadImage(image_only=True, ensure_channel_first=True, reader="NibabelReader")
    volume = np.asarray(_turned(transforms)(load(tmp_path / "volume.nii.gz"))[0])
    pictures = _in_order(decoded((tmp_path / "volume.nii.gz").read_bytes(), "volume.nii.gz")[0])
    for up, picture in enumerate(pictures):
        np.testing.assert_array_equal(picture.values, volume[::-1, ::-1, up].T)


def test_monai_reads_the_dicom_series_the_same_way(tmp_path):
    transforms = pytest.importorskip("monai.transforms")
    for up in range(SIZE["S"]):
        (tmp_path / f"{(up * 3) % 5}.dcm").write_bytes(_dicom(up))
    load = transforms.LoadImage(image_only=True, ensure_channel_first=True, reader="PydicomReader")
    volume = np.asarray(_turned(transforms)(load(tmp_path))[0])
    for up in range(SIZE["S"]):
        np.testing.assert_array_equal(decoded(_dicom(up), "a.dcm")[0][0].values, volume[::-1, ::-1, up].T)


def _turned(transforms):
    return transforms.Orientation(axcodes="RAS", labels=(("L", "R"), ("P", "A"), ("I", "S")))
