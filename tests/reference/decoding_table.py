"""Print docs/decoding.md: what fedssl makes of pydicom's test files, by transfer syntax, and which decoders agree.

Run from the root of the repository: ``python tests/reference/decoding_table.py > docs/decoding.md``.
"""

import subprocess
import sys
from collections import Counter, defaultdict
from importlib.metadata import PackageNotFoundError, version

from oracle_codecs import read
from oracle_dicom import every_file, judge, simpleitk_difference, tolerance

PACKAGES = (
    "pydicom", "pydicom-data", "python-gdcm", "pylibjpeg", "pylibjpeg-libjpeg", "pylibjpeg-openjpeg", "pylibjpeg-rle",
    "pyjpegls", "pillow", "numpy", "SimpleITK",
)  # fmt: skip
WHY = {
    "holds no image": "directories (DICOMDIR), palettes, waveforms, character set samples, files stripped of their "
    "pixels, and one compressed file that is cut off: there is nothing to train on",
    "holds a segmentation": "labels, not what a scanner saw",
    "holds a dose map": "computed by a planning system, not what a scanner saw",
    "holds a treatment plan": "no pixels of a patient",
    "holds contours": "no pixels of a patient",
    "holds a report": "text",
    "is no DICOM file": "named .dcm, but without the DICM mark, and what follows is no image or cannot be read as one "
    "(no_meta.dcm starts with a stray byte)",
    "holds fewer pixels": "cut off: the lower rows would be made up",
    "holds a compressed frame": "damaged on purpose: the size within the JPEG 2000 codestream is overwritten",
    "cannot be decoded (RuntimeError)": "a 12-bit JPEG whose scan header breaks ITU-T T.81, B.2.3; GDCM, Pillow and "
    "libjpeg refuse it, dcmtk alone reads it with a warning",
}
INTRODUCTION = """# What fedssl decodes, and who agrees

Every file that comes with pydicom, and every file of the package `pydicom-data`, was given to
`fedssl.data.decoding.image.open_file`. What decoded was compared, pixel by pixel, with decoders that fedssl did not use
for that file, followed by the chain of DICOM PS3.3, C.11 (modality LUT or rescale, VOI LUT or window, polarity), of
C.7.6.3.1 (colour, palettes) and of C.7.5.1.1.2 (padding) written out once more in plain numpy
(`tests/reference/oracle_dicom.py`). All frames were decoded; of files with more than ten, the first, the middle and the
last were compared.

- `numpy`: uncompressed values read from the bytes.
- `gdcm`, `pylibjpeg`, `pyjpegls`, `pillow`: the decoders of those packages, one at a time. The one that fedssl itself
  used (the first that can) is left out.
- `dcmtk`: the programs dcmdjpeg, dcmdjpls and dcmdrle.
- `SimpleITK`: the values after the rescale, of CT, MR and other images in scanner units without padding.

Some of these share code: SimpleITK holds GDCM; GDCM, Pillow and pylibjpeg all decode JPEG 2000 with OpenJPEG. So thirty
files are also compared with copies of the same image that the sets hold uncompressed or in another syntax.

A difference is in Hounsfield or scanner units, in levels of 255 for colour and for radiographs. Lossless files have to
agree within the rounding of 32-bit floats (and one level where YBR becomes RGB), lossy ones within 6 levels: JPEG
decoders differ in their cosine transforms and in how they fill in halved colour. A file counts as confirmed by a
reference if it lies within that.

To run it again: `python tests/reference/decoding_table.py > docs/decoding.md`. The tests
`tests/reference/test_decoders_agree.py` hold every file to it. Properties that no file of these sets has (padding
ranges, overlay bits, planes of colour, tables in every byte order, frames with their own rescale, the axes of NIfTI
volumes) are tested with files made by hand, in the other tests of that folder.
"""


def survey():
    """Judge every file; SimpleITK joins the references where it reads grey scanner values."""
    verdicts = {}
    for name, path in every_file().items():
        verdict = verdicts[name] = judge(path.read_bytes(), path.name)
        if verdict.pictures and verdict.pictures[0].meaning in {"hounsfield", "raw"}:
            _ask_simpleitk(path, verdict)
        verdict.pictures = len(verdict.pictures)  # the pixels would fill the memory
    return verdicts


def _ask_simpleitk(path, verdict):
    if "PixelPaddingValue" in read(path.read_bytes()):
        return
    try:
        found = simpleitk_difference(path.read_bytes(), verdict.pictures)
    except (ImportError, RuntimeError):
        return
    if found is not None:
        verdict.differences["SimpleITK"] = found


def table(verdicts):
    """One line for each transfer syntax and photometric interpretation."""
    groups = defaultdict(list)
    for verdict in verdicts.values():
        if not verdict.foreign:
            groups[verdict.syntax, verdict.photometric].append(verdict)
    yield "| transfer syntax | photometric | files | decoded | frames | refused | confirmed by (files) | differ most |"
    yield "|---|---|--:|--:|--:|--:|---|--:|"
    for (syntax, photometric), group in sorted(groups.items()):
        decoded = [verdict for verdict in group if verdict.pictures]
        confirmed, most = Counter(), 0.0
        for verdict in decoded:
            for codec, difference in verdict.differences.items():
                confirmed[codec] += difference <= tolerance(verdict)
                most = max(most, difference)
        who = ", ".join(f"{codec} {count}" for codec, count in sorted(confirmed.items()) if count)
        frames, refused = sum(verdict.frames for verdict in decoded), len(group) - len(decoded)
        largest = f"{most:.2g}" if most < 10 else f"{most:.0f}"
        yield (
            f"| {syntax} | {photometric} | {len(group)} | {len(decoded)} | {frames or ''} | {refused or ''} "
            f"| {who} | {largest if decoded else ''} |"
        )


def refusals(verdicts):
    """Reasons, how often, and why."""
    named = defaultdict(list)
    for name, verdict in verdicts.items():
        if verdict.reason:
            named[verdict.reason].append(name.split("/", 1)[-1])
    yield "| reason | files | why |"
    yield "|---|---|---|"
    for reason, names in sorted(named.items(), key=lambda item: -len(item[1])):
        why = next((text for start, text in WHY.items() if reason.startswith(start)), "")
        which = f"{len(names)}, such as {names[0]}" if len(names) > 8 else ", ".join(names)
        yield f"| {reason} | {which} | {why} |"


def versions():
    """Name what was run."""
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} (not installed)")
    try:
        said = subprocess.run(["dcmdjpeg", "--version"], capture_output=True, text=True, check=False).stdout.split()
        found.append(f"dcmtk {said[2].removeprefix('v')}")
    except (OSError, IndexError):
        found.append("dcmtk (not installed)")
    return f"Run with Python {sys.version.split()[0]}, {', '.join(found)}."


def document(verdicts):
    """The whole page."""
    decoded = [verdict for verdict in verdicts.values() if verdict.pictures]
    wrong = {
        name.rsplit("/", 1)[-1]: verdict
        for name, verdict in verdicts.items()
        if verdict.differences and max(verdict.differences.values()) > tolerance(verdict)
    }
    yield INTRODUCTION
    yield versions() + "\n"
    foreign, refused = (sum(bool(getattr(one, kind)) for one in verdicts.values()) for kind in ("foreign", "reason"))
    alone = sum(not verdict.differences for verdict in decoded)
    yield (
        f"{len(verdicts)} files: {len(decoded)} decoded ({sum(verdict.frames for verdict in decoded)} frames), "
        f"{refused} refused with a reason, {foreign} no images at all (text, JSON and the like, passed over). Of the "
        f"decoded ones {alone} had no other decoder to compare with, and {len(wrong)} differ from one.\n"
    )
    yield "## By transfer syntax\n"
    yield from table(verdicts)
    if wrong:
        yield "\n## What differs\n"
        for name, verdict in wrong.items():
            by = ", ".join(f"{codec} {most:.4g}" for codec, most in verdict.differences.items())
            yield f"- {name} ({verdict.syntax}, {verdict.photometric}): {by}"
    yield "\n## What is refused, and why\n"
    yield from refusals(verdicts)


if __name__ == "__main__":
    for line in document(survey()):
        sys.stdout.write(line + "\n")
