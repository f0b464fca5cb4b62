"""Modality and VOI LUTs, windows and palettes made by hand, against the textbook chain."""

import numpy as np
import pytest
from made_dicom import RAMP, agrees, made, pictures_of, table, values_of, with_palette
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

SYNTAXES = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian)


@pytest.mark.parametrize(("syntax", "packed"), [(ExplicitVRLittleEndian, ""), *zip(SYNTAXES, "<<>", strict=True)])
def test_a_modality_lut_is_looked_up(syntax, packed):
    entries = np.arange(64)[::-1] ** 2
    dataset = made(RAMP, syntax, ModalityLUTSequence=[table(0, 16, entries, packed=packed)], Modality="MR")
    np.testing.assert_array_equal(agrees(dataset)[0].values, entries[RAMP])


def test_a_16_bit_modality_lut_on_8_bits_is_not_clipped_to_8_bits():
    dataset = made(RAMP.astype(np.uint8), ModalityLUTSequence=[table(0, 16, np.arange(64) * 1000)])
    assert len(np.unique(values_of(dataset))) > 50


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("depth", [8, 12, 16])
def test_a_voi_lut_is_looked_up(syntax, depth):
    entries = (np.linspace(0, 1, 64) ** 2 * (2**depth - 1)).astype(int)
    packed = ">" if syntax == ExplicitVRBigEndian else "<"
    dataset = made(RAMP, syntax, VOILUTSequence=[table(0, depth, entries, packed=packed)])
    np.testing.assert_allclose(agrees(dataset)[0].values, entries[RAMP] / (2**depth - 1), atol=1e-6)


def test_a_voi_lut_of_many_8_bit_entries_does_not_wrap_around():
    agrees(made(RAMP * 16, VOILUTSequence=[table(0, 8, np.arange(1024) // 4)]))


def test_a_voi_lut_is_looked_up_in_rescaled_values():
    lut = table(-1024, 16, np.arange(1024)[::-1] * 64)
    agrees(made(RAMP * 16, RescaleSlope="1", RescaleIntercept="-1024", VOILUTSequence=[lut]))


@pytest.mark.parametrize("function", ["", "LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("centre", "width"), [(32, 16), (30.5, 40), (-5, 100), (10, 2)])
def test_a_window_is_applied_by_the_formula_of_its_function(function, centre, width):
    facts = {"VOILUTFunction": function} if function else {}
    agrees(made(RAMP, WindowCenter=str(centre), WindowWidth=str(width), **facts))


@pytest.mark.parametrize(("function", "width"), [("LINEAR", 1), ("LINEAR_EXACT", 0.5)])
def test_the_narrowest_windows_are_thresholds(function, width):
    agrees(made(RAMP, WindowCenter="32.25", WindowWidth=str(width), VOILUTFunction=function))


def test_a_sharp_sigmoid_gives_no_warning(recwarn):
    from fedssl.data.decoding.dicom_frames import windowed

    windowed(RAMP.astype(np.float32) * 100, 6000.0, 6008.0, "SIGMOID")
    assert not recwarn.list


def test_of_several_windows_the_first_is_taken():
    several = agrees(made(RAMP, WindowCenter=["20", "40"], WindowWidth=["10", "60"]))[0]
    one = agrees(made(RAMP, WindowCenter="20", WindowWidth="10"))[0]
    np.testing.assert_array_equal(several.values, one.values)
    ct = made(
        RAMP, Modality="CT", RescaleSlope="1", RescaleIntercept="0", WindowCenter=["40", "9"], WindowWidth=["400"] * 2
    )
    assert pictures_of(ct)[0].window == (-160.0, 239.0)


def test_signed_8_bit_values_without_a_window_keep_their_lower_half():
    assert len(np.unique(values_of(made((RAMP.astype(np.int8) - 32) * 4)))) == 64


@pytest.mark.parametrize("offset", [0, -32])
@pytest.mark.parametrize(("depth", "packed", "factor"), [(8, "u1", 4), (16, "<u2", 4 * 257)])
def test_a_palette_is_looked_up(offset, depth, packed, factor):
    stored = (RAMP.astype(np.int16) + offset) if offset else RAMP.astype(np.uint8)
    agrees(with_palette(made(stored), np.arange(64) * factor, first=offset, depth=depth, packed=packed))


def test_values_beyond_a_palette_take_its_nearest_end():
    agrees(with_palette(made(RAMP), np.arange(16) * 15, first=20))


@pytest.mark.parametrize(
    ("syntax", "count", "depth", "packed"),
    [
        pytest.param(ExplicitVRBigEndian, 64, 16, ">u2"),
        pytest.param(ExplicitVRLittleEndian, 64, 8, "<u2"),
        pytest.param(ExplicitVRLittleEndian, 63, 8, "u1"),
        pytest.param(ExplicitVRLittleEndian, 1024, 8, "u1"),
    ],
)
def test_a_palette_is_looked_up_however_it_is_packed(syntax, count, depth, packed):
    entries = np.arange(count) * (2**depth - 1) // count
    agrees(with_palette(made(RAMP * 16 if count > 64 else RAMP, syntax), entries, depth=depth, packed=packed))
