"""A small site that a test may damage, and a PACS that misbehaves."""

import shutil
import threading

import pytest
from misbehaving_pacs import Pacs


@pytest.fixture
def copied(hospitals, tmp_path):
    """A root of two patients at one site that a test may damage."""
    for patient in sorted((hospitals / "EAST").iterdir())[:2]:
        shutil.copytree(patient, tmp_path / "root" / "EAST" / patient.name)
    return tmp_path / "root"


@pytest.fixture
def pacs():
    with Pacs() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def _no_credentials(monkeypatch):
    for name in ("USER", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"FEDSSL_DICOMWEB_{name}", raising=False)
