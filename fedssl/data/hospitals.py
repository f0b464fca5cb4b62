"""Five synthetic hospitals as DICOM files: the data of ``fedssl demo``. Nothing in them comes from a patient.

Four hospitals take part: a large ultrasound clinic and three with two kinds of examination. NORTH never takes part, has
all four kinds and another scanner. Scanners differ by noise, gain, sharpness, MONOCHROME1, bit depth and size.
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid
from scipy.ndimage import gaussian_filter

from fedssl import __version__, progress
from fedssl.data import phantom
from fedssl.storage import atomic_file, exclusive, write_json

UNSEEN_SITE = "NORTH"
LABEL = "lesion"
_STORAGE_CLASS = {  # PS3.4, table B.5-1
    "CR": "1.2.840.10008.5.1.4.1.1.1",
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "MR": "1.2.840.10008.5.1.4.1.1.4",
    "US": "1.2.840.10008.5.1.4.1.1.6.1",
}


@dataclass(frozen=True)
class Scanner:
    """How a site's machines render an image.

    Attributes:
        maker: Manufacturer (0008,0070).
        edge: pixels on a side.
        bits: BitsStored (0028,0101).
        noise: standard deviation of added noise, in grey values from 0 to 1.
        gain: contrast factor about 0.3.
        blur: Gaussian sigma as a share of the edge.
        inverted: radiographs are MONOCHROME1.
    """

    maker: str
    edge: int
    bits: int
    noise: float
    gain: float
    blur: float
    inverted: bool


@dataclass(frozen=True)
class Hospital:
    """One site: its kinds of examination and its scanner."""

    name: str
    modalities: tuple[str, ...]
    patients: int
    scanner: Scanner


HOSPITALS = (
    Hospital("EAST", ("US",), 48, Scanner("Synthetic Alpha", 128, 12, 0.02, 1.0, 0.004, inverted=False)),
    Hospital("HARBOUR", ("CT", "MR"), 40, Scanner("Synthetic Beta", 112, 12, 0.03, 1.1, 0.006, inverted=False)),
    Hospital("SOUTH", ("CR", "CT"), 40, Scanner("Synthetic Gamma", 120, 10, 0.03, 0.9, 0.005, inverted=True)),
    Hospital("WEST", ("CR", "MR"), 40, Scanner("Synthetic Delta", 128, 12, 0.04, 1.0, 0.007, inverted=False)),
    Hospital(
        UNSEEN_SITE, ("CR", "CT", "MR", "US"), 48, Scanner("Synthetic Omega", 144, 11, 0.05, 0.85, 0.009, inverted=True)
    ),
)
IMAGES_PER_PATIENT = 8


def write_hospitals(folder: Path, *, seed: int = 0, scale: float = 1.0) -> Path:
    """Write the hospitals below ``folder`` if they are not there yet; returns the root to give to ``data.root``.

    Args:
        folder: where; a folder per seed, scale and version is made in it.
        seed: equal seeds give equal files.
        scale: factor of the number of patients, for quick tests.
    """
    root = folder / f"synthetic-{__version__}-seed{seed}-scale{scale:g}"
    with exclusive(folder / ".lock"):
        done = root / "synthetic.json"
        if not done.exists():
            rows = list(_write_all(root, seed, scale))
            text = io.StringIO()
            writer = csv.DictWriter(text, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            with atomic_file(root / "labels.csv", "the labels") as stream:
                stream.write(text.getvalue().encode())
            facts = {"synthetic": True, "seed": seed, "hospitals": [asdict(hospital) for hospital in HOSPITALS]}
            write_json(done, json.loads(json.dumps(facts)), "the synthetic hospitals")
    return root


def _write_all(root: Path, seed: int, scale: float) -> Iterator[dict[str, str | int]]:
    for number, hospital in enumerate(HOSPITALS):
        patients = max(4, round(hospital.patients * scale))
        for patient in range(patients):
            yield from _write_patient(root, hospital, patient, np.random.default_rng([seed, number, patient]))
            progress.publish(progress.Done(f"writing synthetic hospital {hospital.name}", patient + 1, patients))


def _write_patient(
    root: Path, hospital: Hospital, patient: int, rng: np.random.Generator
) -> Iterator[dict[str, str | int]]:
    """One examination of one kind: neighbouring images; in a stretch of them sick patients show the lesion."""
    modality = hospital.modalities[patient % len(hospital.modalities)]
    name = f"{hospital.name}-{patient:04d}"
    anatomy = phantom.random_anatomy(rng)
    first, last = sorted(rng.choice(IMAGES_PER_PATIENT + 1, 2, replace=False))
    sick = rng.uniform() < 0.85
    uids = [generate_uid(entropy_srcs=[name, kind]) for kind in ("study", "series", "frame of reference")]
    for number in range(IMAGES_PER_PATIENT):
        lesion = bool(sick and first <= number < last)
        finding = phantom.random_finding(rng, modality, lesion=lesion) if lesion or rng.uniform() < 0.9 else None
        place = -0.8 + 1.6 * number / (IMAGES_PER_PATIENT - 1)
        grey = _scan(phantom.draw(modality, anatomy, place, finding, hospital.scanner.edge), hospital.scanner, rng)
        file = f"{hospital.name}/{name}/{number:03d}.dcm"
        dataset = make_dataset(grey, hospital, modality, name, number, uids)
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        dataset.save_as(
            root / file, enforce_file_format=True
        )  # whole or not is decided by synthetic.json, written last
        yield {
            "file": file,
            "site": hospital.name,
            "patient": name,
            "modality": modality,
            "position": number,
            LABEL: int(lesion),
        }


def _scan(
    image: Float[np.ndarray, "edge edge"], scanner: Scanner, rng: np.random.Generator
) -> Float[np.ndarray, "edge edge"]:
    """Apply the scanner's gain, sharpness and noise."""
    seen = gaussian_filter(0.3 + scanner.gain * (image - 0.3), scanner.blur * scanner.edge)
    return np.clip(seen + scanner.noise * rng.standard_normal(image.shape), 0.0, 1.0)


def make_dataset(
    grey: Float[np.ndarray, "edge edge"],
    hospital: Hospital,
    modality: str,
    patient: str,
    number: int,
    uids: Sequence[str],
) -> FileDataset:
    """Make one synthetic DICOM image of a hospital; ``uids`` are of study, series and frame of reference."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = UID(_STORAGE_CLASS[modality])
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[patient, str(number)])
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = uids
    dataset.PatientID, dataset.PatientName = patient, f"SYNTHETIC^{patient}"
    dataset.PatientBirthDate = dataset.PatientSex = dataset.StudyDate = dataset.StudyTime = ""
    dataset.AccessionNumber = dataset.StudyID = dataset.ReferringPhysicianName = ""
    dataset.Modality, dataset.SeriesNumber, dataset.InstanceNumber = modality, 1, number + 1
    dataset.Manufacturer, dataset.ManufacturerModelName = hospital.scanner.maker, f"Phantom {modality}"
    dataset.InstitutionName = f"Synthetic hospital {hospital.name}"
    dataset.ImageComments = "Synthetic image made by fedssl; no patient"
    dataset.BurnedInAnnotation = "NO"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", *{"CT": ["AXIAL"], "MR": ["OTHER"]}.get(modality, [])]
    if modality == "CR":
        dataset.BodyPartExamined, dataset.ViewPosition = "CHEST", "PA"
    else:
        dataset.Laterality = ""
    _add_geometry(dataset, modality, number)
    _add_pixels(dataset, grey, hospital.scanner, modality)
    return dataset


def _add_geometry(dataset: FileDataset, modality: str, number: int) -> None:
    dataset.PatientOrientation = "" if modality in {"CT", "MR"} else ["L", "F"]
    if modality not in {"CT", "MR"}:
        del dataset.FrameOfReferenceUID
        return
    dataset.PatientPosition = "HFS"
    dataset.PositionReferenceIndicator = ""
    dataset.ImagePositionPatient = [-150.0, -150.0, 5.0 * number]
    dataset.ImageOrientationPatient = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    dataset.PixelSpacing, dataset.SliceThickness = [2.5, 2.5], 5.0
    dataset.AcquisitionNumber = 1
    if modality == "CT":
        dataset.KVP = "120"
    else:
        dataset.ScanningSequence, dataset.SequenceVariant, dataset.ScanOptions = "SE", "NONE", ""
        dataset.MRAcquisitionType, dataset.EchoTime, dataset.RepetitionTime, dataset.EchoTrainLength = (
            "2D",
            "90",
            "4000",
            "1",
        )


def _add_pixels(dataset: FileDataset, grey: Float[np.ndarray, "edge edge"], scanner: Scanner, modality: str) -> None:
    """Store CT as Hounsfield units with a window, radiographs inverted where the site does so, the rest as it is."""
    bits = 8 if modality == "US" else scanner.bits
    top = 2**bits - 1
    values = grey * top
    if modality == "CT":
        bits, top = 12, 4095
        dataset.RescaleIntercept, dataset.RescaleSlope, dataset.RescaleType = -1024, 1, "HU"
        dataset.WindowCenter, dataset.WindowWidth = 40, 400
        values = grey * 400.0 - 160.0 + 1024.0
    inverted = scanner.inverted and modality == "CR"
    if inverted:
        values = top - values
    dataset.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    dataset.SamplesPerPixel, dataset.PixelRepresentation = 1, 0
    dataset.Rows, dataset.Columns = grey.shape
    dataset.BitsStored, dataset.HighBit = bits, bits - 1
    dataset.BitsAllocated = 8 if bits == 8 else 16
    stored = np.rint(values).clip(0, top)
    dataset.PixelData = stored.astype(np.uint8 if bits == 8 else "<u2").tobytes()
