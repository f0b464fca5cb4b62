"""DICOM files made by hand, one property each, against numbers written down here and the textbook chain."""

import numpy as np
import pytest
from made_dicom import RAMP, agrees, compressed, made, pictures_of
from pydicom import Dataset
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

SYNTAXES = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian)
COLOUR = np.stack([RAMP, RAMP + 64, 255 - RAMP], -1).astype(np.uint8)


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int16, np.int32])
def test_stored_values_come_out_in_every_byte_order_and_width(syntax, kind):
    values = ((RAMP.astype(int) - 32) * 3 if np.issubdtype(kind, np.signedinteger) else RAMP * 3).astype(kind)
    (picture,) = agrees(made(values, syntax, Modality="MR"))
    np.testing.assert_array_equal(picture.values, values)


def test_signed_values_with_padding_become_hounsfield_units_with_air_outside():
    stored = (RAMP.astype(np.int16) - 32) * 10
    stored[0] = -2000
    dataset = made(stored, Modality="CT", RescaleSlope="2", RescaleIntercept="-100", PixelPaddingValue=-2000)
    (picture,) = agrees(dataset)
    assert picture.values[3, 4] == stored[3, 4] * 2 - 100
    assert (picture.values[0] == -1024).all()


@pytest.mark.parametrize(("value", "limit"), [(0, 5), (5, 0)])
def test_a_range_of_padding_is_outside_whichever_end_comes_first(value, limit):
    dataset = made(RAMP, Modality="MR", PixelPaddingValue=value, PixelPaddingRangeLimit=limit)
    (picture,) = agrees(dataset)
    np.testing.assert_array_equal(picture.padding, RAMP <= 5)


def test_padding_of_signed_values_is_known_although_the_file_calls_it_unsigned():
    dataset = made((RAMP.astype(np.int16) - 32) * 100, Modality="MR")
    dataset.add_new("PixelPaddingValue", "US", 65536 - 3200)
    assert pictures_of(dataset)[0].padding is not None


@pytest.mark.parametrize("signed", [0, 1])
def test_overlays_in_the_unused_bits_do_not_show(signed):
    hidden = (RAMP + 1) | np.where(RAMP % 3 == 0, 0xA000, 0).astype(np.uint16)
    dataset = made(hidden, BitsStored=12, HighBit=11, PixelRepresentation=signed, Modality="MR")
    (picture,) = agrees(dataset)
    np.testing.assert_array_equal(picture.values, RAMP + 1)


@pytest.mark.parametrize("planar", [0, 1])
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_colours_are_the_same_pixel_by_pixel_and_plane_by_plane(planar, syntax):
    stored = COLOUR.transpose(2, 0, 1) if planar else COLOUR
    dataset = made(COLOUR, syntax, PlanarConfiguration=planar, PixelData=np.ascontiguousarray(stored).tobytes())
    (picture,) = agrees(dataset)
    np.testing.assert_array_equal(picture.values, COLOUR)


def test_ybr_full_becomes_the_rgb_of_the_printed_matrix():
    (picture,) = agrees(made(COLOUR, PhotometricInterpretation="YBR_FULL"))
    y, cb, cr = COLOUR[2, 5].astype(float)
    red = np.clip(y + 1.402 * (cr - 128), 0, 255)
    green = np.clip(y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), 0, 255)
    np.testing.assert_allclose(picture.values[2, 5, :2], [red, green], atol=1)


def test_bits_packed_eight_to_a_byte_are_read_from_the_lowest():
    pattern = (RAMP % 5 == 0).astype(np.uint8)
    packed = np.packbits(pattern.ravel(), bitorder="little").tobytes()
    dataset = made(pattern, BitsAllocated=1, BitsStored=1, HighBit=0, PixelData=packed)
    np.testing.assert_array_equal(agrees(dataset)[0].values, pattern)


def test_monochrome1_is_shown_with_large_values_dark_and_stays_apart_from_units():
    plain = agrees(made(RAMP, WindowCenter="32", WindowWidth="64"))[0].values
    turned = agrees(made(RAMP, WindowCenter="32", WindowWidth="64", PhotometricInterpretation="MONOCHROME1"))[0].values
    np.testing.assert_allclose(plain + turned, 1, atol=1e-6)
    mr = pictures_of(made(RAMP, Modality="MR", PhotometricInterpretation="MONOCHROME1"))[0]
    assert mr.inverted
    np.testing.assert_array_equal(mr.values, RAMP)


def test_floats_keep_their_values():
    values = np.linspace(-3, 7, 64, dtype=np.float32).reshape(8, 8)
    dataset = made(values, Modality="MR")
    for keyword in ("PixelData", "BitsStored", "HighBit", "PixelRepresentation"):
        delattr(dataset, keyword)
    dataset.FloatPixelData = values.tobytes()
    (picture,) = agrees(dataset)
    np.testing.assert_array_equal(picture.values, values)


def _marker(rows, columns):
    image = np.zeros((rows, columns), np.uint16)
    image[1, :3], image[:, -1], image[-1, 0] = 900, np.arange(rows) * 3, 4095
    return image


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless])
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (37, 65), (71, 33)])
def test_a_marker_survives_lossless_compression_at_any_size(syntax, rows, columns):
    image = _marker(rows, columns)
    dataset = made(image, BitsStored=12, HighBit=11, Modality="MR")
    compressed(dataset, syntax)
    (picture,) = agrees(dataset)
    np.testing.assert_array_equal(picture.values, image)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless])
def test_colour_frames_survive_lossless_compression_in_their_order(syntax):
    large = np.kron(COLOUR, np.ones((5, 4, 1), np.uint8))  # 40 x 32: OpenJPEG asks for 32 pixels on a side
    frames = np.stack([large, large[::-1], large[:, ::-1]])
    dataset = made(frames, frames=3)
    compressed(dataset, syntax)
    for picture, frame in zip(agrees(dataset), frames, strict=True):
        np.testing.assert_array_equal(picture.values, frame)


def _groups(**macros):
    groups = Dataset()
    for name, facts in macros.items():
        item = Dataset()
        for keyword, value in facts.items():
            setattr(item, keyword, value)
        setattr(groups, name, [item])
    return groups


def test_each_frame_of_an_enhanced_ct_has_its_own_rescale():
    frames = np.stack([RAMP, RAMP, RAMP])
    dataset = made(frames, frames=3, Modality="CT")
    shared = {"RescaleSlope": "1", "RescaleIntercept": "-1000", "RescaleType": "HU"}
    dataset.SharedFunctionalGroupsSequence = [_groups(PixelValueTransformationSequence=shared)]
    rescales = [{"RescaleSlope": str(slope), "RescaleIntercept": "-1024", "RescaleType": "HU"} for slope in (1, 2)]
    own = [_groups(PixelValueTransformationSequence=rescale) for rescale in rescales]
    dataset.PerFrameFunctionalGroupsSequence = [*own, Dataset()]
    first, second, third = (picture.values for picture in agrees(dataset))
    np.testing.assert_array_equal(first, RAMP - 1024.0)
    np.testing.assert_array_equal(second, RAMP * 2 - 1024.0)
    np.testing.assert_array_equal(third, RAMP - 1000.0)


def test_each_frame_of_an_enhanced_mr_lies_where_its_groups_say():
    dataset = made(np.stack([RAMP] * 3), frames=3, Modality="MR")
    orientation = {"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}
    dataset.SharedFunctionalGroupsSequence = [_groups(PlaneOrientationSequence=orientation)]
    dataset.PerFrameFunctionalGroupsSequence = [
        _groups(PlanePositionSequence={"ImagePositionPatient": [x, 100, 50]}) for x in (-12.5, -10, 30)
    ]
    pictures = agrees(dataset)
    assert [picture.position for picture in pictures] == [12.5, 10, -30]  # the normal points to the right
    assert {picture.plane for picture in pictures} == {"sagittal"}
