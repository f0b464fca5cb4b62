"""Every file of pydicom's test sets against other decoders and the textbook chain: same pixels, or a reason."""

import re
import shutil

import numpy as np
import pytest
from oracle_codecs import frames_of, read
from oracle_dicom import decoded, every_file, judge, simpleitk_difference, tolerance

FILES = every_file()
ONLY_DCMTK = {"test_files/JPGExtended.dcm"}
NO_IMAGES = {"SEG", "RTDOSE", "RTSTRUCT", "RTPLAN", "PR", "KO", "SR", "REG"}
DAMAGED = {  # images that are refused, and why that is right
    "test_files/MR_truncated.dcm": "holds fewer pixels than its header says: it is cut off, or its header is wrong",
    "test_files/JPEG-lossy.dcm": "cannot be decoded (RuntimeError)",  # its scan header is against ITU-T T.81, B.2.3
    # four bytes of the codestream's size are overwritten
    "test_files/JPEG2000-embedded-sequence-delimiter.dcm": "holds a compressed frame that is larger than its header "
    "says",
}
TWINS = [  # the same image stored in two ways
    ("test_files/MR_small_RLE.dcm", "test_files/MR_small.dcm", 0),
    ("test_files/MR_small_bigendian.dcm", "test_files/MR_small.dcm", 0),
    ("test_files/MR_small_implicit.dcm", "test_files/MR_small.dcm", 0),
    ("test_files/MR_small_jp2klossless.dcm", "test_files/MR_small.dcm", 0),
    ("test_files/MR_small_jpeg_ls_lossless.dcm", "test_files/MR_small.dcm", 0),
    ("test_files/MR_small_padded.dcm", "test_files/MR_small.dcm", 0),
    ("emri_small_RLE.dcm", "emri_small.dcm", 0),
    ("emri_small_big_endian.dcm", "emri_small.dcm", 0),
    ("emri_small_jpeg_2k_lossless.dcm", "emri_small.dcm", 0),
    ("emri_small_jpeg_ls_lossless.dcm", "emri_small.dcm", 0),
    ("MR2_J2KR.dcm", "MR2_UNCR.dcm", 0),
    ("RG3_J2KR.dcm", "RG3_UNCR.dcm", 0),
    ("US1_J2KR.dcm", "US1_UNCR.dcm", 0),
    ("693_J2KR.dcm", "693_UNCR.dcm", 0),
    ("MR2_J2KI.dcm", "MR2_UNCI.dcm", 0),  # lossy, and its decompressed copy from NEMA's working group 4
    ("RG3_J2KI.dcm", "RG3_UNCI.dcm", 0),
    ("US1_J2KI.dcm", "US1_UNCI.dcm", 0),
    ("test_files/693_J2KI.dcm", "693_UNCI.dcm", 0),
    ("test_files/JPEG2000.dcm", "JPEG2000_UNC.dcm", 0),
    ("OBXXXX1A_rle.dcm", "OBXXXX1A.dcm", 0),
    ("gdcm-US-ALOKA-16_big.dcm", "gdcm-US-ALOKA-16.dcm", 0),
    ("SC_rgb_expb_16bit_2frame.dcm", "SC_rgb_16bit_2frame.dcm", 0),
    ("test_files/SC_rgb_rle_32bit.dcm", "SC_rgb_32bit.dcm", 0),
    ("test_files/SC_rgb_jpeg_gdcm.dcm", "SC_rgb.dcm", 0),
    ("test_files/SC_rgb_dcmtk_+eb+cr.dcm", "SC_rgb_dcmtk_ebcr_dcmd.dcm", 1),
    ("test_files/SC_rgb_dcmtk_+eb+cy+n1.dcm", "SC_rgb_dcmtk_ebcyn1_dcmd.dcm", 2),
    ("test_files/SC_rgb_dcmtk_+eb+cy+np.dcm", "SC_rgb_dcmtk_ebcynp_dcmd.dcm", 2),
    ("test_files/SC_rgb_dcmtk_+eb+cy+s4.dcm", "SC_rgb_dcmtk_ebcys4_dcmd.dcm", 2),
    ("test_files/SC_rgb_jpeg.dcm", "test_files/SC_rgb_jpeg_dcmd.dcm", 1),
    ("OBXXXX1A_expb.dcm", "OBXXXX1A.dcm", 0),
]


def _pictures(name):
    return decoded(FILES[name].read_bytes(), FILES[name].name)[0]


@pytest.mark.parametrize("name", FILES)
def test_a_file_decodes_as_other_decoders_say_or_is_refused_with_a_reason(name):
    verdict = judge(FILES[name].read_bytes(), FILES[name].name)
    if not verdict.pictures:
        assert verdict.foreign != bool(verdict.reason)
        _assert_rightly_refused(name, verdict)
        return
    dataset = read(FILES[name].read_bytes())
    assert len(verdict.pictures) == frames_of(dataset)
    assert {picture.values.shape[:2] for picture in verdict.pictures} == {(dataset.Rows, dataset.Columns)}
    assert all(np.isfinite(picture.values).all() for picture in verdict.pictures)
    if name in ONLY_DCMTK and shutil.which("dcmdjpeg") is None:
        pytest.skip("no other decoder but dcmtk's reads this file (Debian: dcmtk)")
    assert verdict.differences, "no other decoder reads it"
    assert max(verdict.differences.values()) <= tolerance(verdict), verdict.differences


def _assert_rightly_refused(name, verdict):
    if verdict.foreign:
        assert FILES[name].read_bytes()[128:132] != b"DICM"
        return
    dataset = read(FILES[name].read_bytes())
    pixels = "Rows" in dataset and "Columns" in dataset and "PixelData" in dataset
    if pixels and dataset.get("Modality") not in NO_IMAGES:
        assert verdict.reason == DAMAGED.get(name)
    words = [str(dataset.get(tag) or "") for tag in ("PatientName", "PatientID", "StudyInstanceUID", "SOPInstanceUID")]
    assert verdict.reason.startswith(("is ", "holds ", "cannot be decoded ("))
    assert not any(word and word in verdict.reason for word in [*words, FILES[name].name, str(FILES[name].parent)])
    assert not re.search(r"\d+(\.\d+){3}", verdict.reason)


def test_both_sets_of_files_are_there():
    assert len(FILES) >= 270
    assert {"CT_small.dcm", "SC_rgb.dcm"} <= {path.name for path in FILES.values()}


@pytest.mark.parametrize(("one", "other", "most"), TWINS)
def test_an_image_stored_in_two_ways_gives_the_same_picture(one, other, most):
    ours, theirs = _pictures(one), _pictures(other)
    assert len(ours) == len(theirs)
    for first, second in zip(ours, theirs, strict=True):
        assert first.meaning == second.meaning
        np.testing.assert_allclose(first.values.astype(float), second.values.astype(float), rtol=0, atol=most)


def test_simpleitk_reads_the_same_scanner_values():
    pytest.importorskip("SimpleITK")
    compared = 0
    for name, path in FILES.items():
        pictures = [] if path.stat().st_size > 3_000_000 else _pictures(name)
        if not pictures or pictures[0].meaning not in {"hounsfield", "raw"}:
            continue
        if "PixelPaddingValue" in read(path.read_bytes()):  # SimpleITK leaves it in the image
            continue
        found = simpleitk_difference(path.read_bytes(), pictures)
        compared += found is not None
        assert found is None or found <= (1.0 if name == "test_files/JPGExtended.dcm" else 1e-3), name  # a lossy one
    assert compared > 30
