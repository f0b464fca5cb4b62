"""How fast images become a cache, and batches come out of it: ``python -m simulations.ingest_benchmark [FOLDER ...]``.

Without folders, synthetic CT of 512 x 512 and radiographs of 2,048 x 2,048 pixels are written in four transfer
syntaxes. For each set, in one run on the same files:

1. Ingest: ``fedssl index`` on all cores (scan, decoding, duplicates, index, all on disk) beside a plain loop on one
   core (pydicom's pixel_array and modality LUT, Pillow's resize, kept in memory). Goal: .9 x cores x the loop.
2. Second epoch: reading shuffled batches from the cache beside MONAI's LoadImaged + Resized in a PersistentDataset, one
   worker a core. Goal: 3 x MONAI.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydicom import dcmread
from pydicom.pixels import apply_modality_lut
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless, generate_uid

from fedssl.data import hospitals, phantom
from fedssl.data.batches import Batches
from fedssl.data.cache import Subset
from fedssl.data.indexing.ingest import Decoding
from fedssl.data.store import Source, Store

_EDGE, _BATCH = 96, 64
_SYNTAXES = (ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless)
_PATIENTS, _CT_SLICES = 24, 40
_SCANNER = hospitals.Scanner("Synthetic bench", 512, 12, 0.02, 1.0, 0.004, inverted=False)


def main() -> None:
    """Print both comparisons for each set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="<site>/<patient>/... of DICOM files")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        for root in arguments.folders or [_write_synthetic(temporary / "synthetic")]:
            files = sorted(path for path in root.rglob("*.dcm"))
            _compare(root, files, temporary, arguments.repeats)


def _compare(root: Path, files: list[Path], temporary: Path, repeats: int) -> None:
    cores = len(os.sched_getaffinity(0))
    _say(f"{len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.0f} MB, {cores} cores")
    loop, loops, ingest, ratios = [], [], [], []
    for number in range(repeats):
        loop.append(len(files) / _seconds(lambda: _plain_loop(files)))
        loops.append(_loops_at_once(files, cores))
        ingest.append(len(files) / _seconds(lambda: _store(root, temporary / f"{root.name}-{number}").open()))  # noqa: B023
        ratios.append(ingest[-1] / loop[-1] / cores)
    _say(f"  plain loop, 1 core:  {_figures(loop)} files/s")
    _say(f"  a loop on each core:  {_figures(loops)} files/s together")
    _say(f"  fedssl index:        {_figures(ingest)} files/s")
    _say(f"  ingest / (cores x loop): {_figures(ratios, 3)} (goal .9)")
    together = [mine / theirs for mine, theirs in zip(ingest, loops, strict=True)]
    _say(f"  ingest / a loop on each core at once: {_figures(together, 3)}")
    store = _store(root, temporary / f"{root.name}-0").open()
    images = Subset(store, np.arange(len(store)))
    ours = [len(files) / _seconds(lambda: _epoch(images)) for _ in range(repeats)]
    theirs = _monai(files, temporary / "monai" / root.name, repeats)
    _say(f"  fedssl, 2nd epoch on: {_figures(ours)} images/s")
    _say(f"  MONAI, 2nd epoch on:  {_figures(theirs)} images/s")
    _say(f"  fedssl / MONAI: {statistics.median(ours) / statistics.median(theirs):.1f} (goal 3)")


def _store(root: Path, folder: Path) -> Store:
    return Store(folder, Source(root), Decoding(_EDGE))


def _plain_loop(files: list[Path]) -> np.ndarray:
    kept = []
    for path in files:
        dataset = dcmread(path)
        values = apply_modality_lut(dataset.pixel_array, dataset).astype(np.float32)
        kept.append(np.asarray(Image.fromarray(values).resize((_EDGE, _EDGE), Image.Resampling.BILINEAR)))
    return np.stack(kept)


def _loops_at_once(files: list[Path], cores: int) -> float:
    """Files a second of as many loops as cores, each on all files: what the machine gives to programs that share it."""
    loop = (
        "import sys, time; from pathlib import Path; from simulations.ingest_benchmark import _plain_loop\n"
        "files = [Path(line) for line in sys.stdin.read().splitlines()]; begin = time.perf_counter()\n"
        "_plain_loop(files); print(len(files) / (time.perf_counter() - begin))"
    )
    command = [sys.executable, "-W", "ignore", "-c", loop]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603
        for _ in range(cores)
    ]
    for process in processes:
        assert process.stdin
        process.stdin.write("\n".join(map(str, files)))
        process.stdin.close()
    return sum(float(process.stdout.read()) for process in processes if process.stdout)


def _epoch(images: Subset) -> None:
    for batch in Batches(images, _BATCH, 1.0, seed=0):
        batch.shown()


def _monai(files: list[Path], folder: Path, repeats: int) -> list[float]:
    """Images a second of each epoch after the first."""
    from monai.data import DataLoader, PersistentDataset
    from monai.transforms import Compose, LoadImaged, Resized, ScaleIntensityd

    folder.mkdir(parents=True)
    keys = ["image"]
    load = LoadImaged(keys, ensure_channel_first=True, reader="PydicomReader")
    transform = Compose([load, _Flat(), ScaleIntensityd(keys), Resized(keys, (_EDGE, _EDGE))])
    data = PersistentDataset([{"image": str(path)} for path in files], transform, cache_dir=folder)
    loader = DataLoader(data, batch_size=_BATCH, shuffle=True, num_workers=len(os.sched_getaffinity(0)))
    rates = [len(files) / _seconds(lambda: [batch["image"] for batch in loader]) for _ in range(repeats + 1)]
    return rates[1:]


class _Flat:
    """MONAI reads a slice as a volume of one slice."""

    def __call__(self, item: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**item, "image": item["image"].reshape(1, *item["image"].shape[1:3])}


def _write_synthetic(root: Path) -> Path:
    """CT series and radiographs, an equal share in each transfer syntax."""
    rng = np.random.default_rng(0)
    for patient in range(_PATIENTS):
        folder = root / "bench" / f"p{patient}"
        folder.mkdir(parents=True)
        uids = [generate_uid(entropy_srcs=[str(patient), kind]) for kind in ("study", "series", "frame")]
        anatomy = phantom.random_anatomy(rng)
        for number in range(_CT_SLICES + 2):
            modality, edge = ("CT", 512) if number < _CT_SLICES else ("CR", 2048)
            grey = phantom.draw(modality, anatomy, -0.8 + 1.6 * number / _CT_SLICES, None, edge)
            noisy = np.clip(grey + 0.02 * rng.standard_normal(grey.shape), 0.0, 1.0)
            dataset = hospitals.make_dataset(noisy, _HOSPITAL, modality, f"p{patient}", number, uids)
            syntax = _SYNTAXES[patient % len(_SYNTAXES)]
            if syntax != ExplicitVRLittleEndian:
                dataset.compress(syntax, generate_instance_uid=False)
            dataset.save_as(folder / f"{number:03d}.dcm", enforce_file_format=True)
    return root


_HOSPITAL = hospitals.Hospital("bench", ("CT", "CR"), _PATIENTS, _SCANNER)


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _figures(values: list[float], digits: int = 0) -> str:
    return f"{statistics.median(values):.{digits}f} ({', '.join(f'{value:.{digits}f}' for value in values)})"


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
