"""The folder of one run: what was asked, what happened, what came out. It is never overwritten unless told to."""

import json
import os
import platform
import shutil
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from fedssl import __version__
from fedssl.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fedssl.errors import ConfigError
from fedssl.storage import append_jsonl, atomic_file, read_jsonl, rewrite_jsonl, write_json

_PACKAGES = ("torch", "timm", "flwr", "numpy", "pydicom", "scikit-learn", "hydra-core", "safetensors")


class RunFolder:
    """``checkpoints/{last,best}.safetensors metrics.jsonl round_metrics.jsonl config.resolved.yaml environment.json``.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.round_metrics = path / "round_metrics.jsonl"
        self._config = path / "config.resolved.yaml"

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.path / "checkpoints" / "last.safetensors"

    @property
    def best(self) -> Path:
        """The checkpoint after the round with the lowest mean loss."""
        return self.path / "checkpoints" / "best.safetensors"

    def start(self, *, overwrite: bool) -> None:
        """Make an empty folder.

        Raises:
            ConfigError: it is not empty and ``overwrite`` is false, or it is no run's folder.
        """
        self._sweep(self.path.glob(".environment.json.*.tmp"))
        if self.path.exists() and any(self.path.iterdir()):
            if not overwrite:
                raise ConfigError(
                    f"The run folder {self.path} is not empty. Continue it with resume=true, replace it with "
                    "overwrite=true, or choose another with run_dir=FOLDER."
                )
            if not (self.path / "environment.json").exists():
                raise ConfigError(f"{self.path} is not a run's folder, so it is not deleted. Choose another run_dir.")
            self._empty()
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "environment.json", environment(), "the run folder")

    def resume(self, fingerprint: str) -> Checkpoint | None:
        """Load the last checkpoint and drop what was measured after it; None if no round was finished.

        Raises:
            ConfigError: the folder belongs to a run with another configuration, or to none.
        """
        if not (self.path / "environment.json").exists():
            raise ConfigError(f"There is no run in {self.path} to resume. Leave out resume=true, or check run_dir.")
        self._sweep([*self.path.glob(".*.tmp"), *self.last.parent.glob(".*.tmp")])
        if not self.last.exists():
            self._sweep((self.metrics, self.round_metrics))
            return None
        checkpoint = load_checkpoint(self.last)
        if checkpoint.fingerprint != fingerprint:
            raise ConfigError(
                f"The run in {self.path} has the configuration {checkpoint.fingerprint}, this command {fingerprint}. "
                "Resume with the same overrides, or start another run with run_dir=FOLDER."
            )
        for path in (self.metrics, self.round_metrics):
            rewrite_jsonl(path, [row for row in read_jsonl(path) if row["round"] <= checkpoint.round])
        return checkpoint

    def _empty(self) -> None:
        """Remove everything; what says that this is a run's folder last, so that it can be said again after a kill."""
        for entry in self.path.iterdir():
            if entry.name != "environment.json":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        (self.path / "environment.json").unlink()

    def _sweep(self, left: Iterable[Path]) -> None:
        """Remove what a killed process was writing or had written too early."""
        for path in left:
            path.unlink(missing_ok=True)

    def bind_images(self, digest: str) -> None:
        """Remember which images trained this run, or check that they are still the same.

        Raises:
            ConfigError: files were added, removed or changed sides since: test patients may have been trained on.
        """
        path = self.path / "images.json"
        if not path.exists():
            write_json(path, {"training_images_sha256": digest}, "the run folder")
        elif json.loads(path.read_text())["training_images_sha256"] != digest:
            raise ConfigError(
                f"The images of {self.path} are not those that it was trained on: files were added or "
                "removed, and the split by patient has moved. Restore the files, or start another run."
            )

    def save_config(self, config: Mapping[str, Any]) -> None:
        """Keep the resolved configuration."""
        with atomic_file(self._config, "the configuration") as stream:
            stream.write(yaml.safe_dump(dict(config), sort_keys=False).encode())

    def record_site(self, round_number: int, site: str, metrics: Mapping[str, float]) -> None:
        """Append one site's figures of a round."""
        append_jsonl(self.metrics, {"round": round_number, "site": site, **metrics})

    def record_round(self, row: Mapping[str, Any]) -> None:
        """Append the federation's figures of a round."""
        append_jsonl(self.round_metrics, dict(row))

    def save(self, checkpoint: Checkpoint, *, best: bool) -> None:
        """Write the checkpoint as the last one and, if so, as the best one."""
        if best:
            save_checkpoint(self.best, checkpoint)
        save_checkpoint(self.last, checkpoint)

    def config(self) -> dict[str, Any]:
        """Read the configuration that the run was made with.

        Raises:
            ConfigError: the folder holds no run.
        """
        if not self._config.exists():
            raise ConfigError(f"{self.path} holds no run (config.resolved.yaml is missing). Give a run folder.")
        loaded: dict[str, Any] = yaml.safe_load(self._config.read_text(encoding="utf-8"))
        return loaded


def environment() -> dict[str, Any]:
    """Describe what the figures of a run depend on; nothing that names a machine, a user or a patient."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "missing"
    return {
        "fedssl": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "packages": versions,
    }
