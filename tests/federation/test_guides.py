"""The guides of the three roles, executed as they stand: every bash block, in the order of a real start."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.federation.consortium import HOUSE, free_ports

SITES = ("DU", "HT")
BLOCK = re.compile(r"^## (\d+)\.|^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(guide):
    """The bash blocks of a guide, by the number of their section."""
    found, section = {}, 0
    for match in BLOCK.finditer((HOUSE / "docs" / f"{guide}_guide.md").read_text()):
        if match[1]:
            section = int(match[1])
        else:
            found.setdefault(section, []).append(match[2])
    return found


class Reader:
    """Somebody who types what a guide says; remembers which blocks were run."""

    def __init__(self, environment):
        self.environment, self.run = environment, set()

    def follow(self, guide, section, *parts, **own):
        """Run the blocks of a section, or those with these numbers; what they printed."""
        chosen = blocks(guide)[section]
        printed = ""
        for number, text in enumerate(chosen):
            if parts and number not in parts:
                continue
            self.run.add((guide, section, number))
            done = subprocess.run(["bash", "-euo", "pipefail", "-c", text], env=self.environment | own, text=True,
                                  capture_output=True, timeout=500, check=False, stdin=subprocess.DEVNULL)  # fmt: skip
            assert done.returncode == 0, f"{guide} {section}.{number}\n{text}\n{done.stdout}\n{done.stderr}"
            printed += done.stdout + done.stderr
        return printed


@pytest.fixture
def reader(brain_mr, tmp_path):
    port, inner, *_ = free_ports(4)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("FEDSSL_", "FLWR_"))}
    own = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "WORK": str(tmp_path), "PORT": str(port),
        "OMP_NUM_THREADS": "1", "COLUMNS": "200", "IMAGES": str(brain_mr), "LABELS": str(brain_mr / "labels.csv"),
        "FEDSSL_CACHE": str(tmp_path / "cache"), "FEDSSL_STATE": str(tmp_path / "durable"), "RUN": "kits/server/run",
    }  # fmt: skip
    del inner
    yield Reader(kept | own)
    for pid in [tmp_path / "kits" / "server.pid", *tmp_path.glob("kits/sites/*/site.pid")]:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
            os.kill(int(pid.read_text()), signal.SIGTERM)


@pytest.mark.federation
def test_the_guides_of_operator_hospital_and_scientist_can_be_followed_word_for_word(reader, brain_mr, tmp_path):
    hospital = {
        site: {
            "SITE": site, "KIT": str(tmp_path / "kits" / "sites" / site), "IMAGES": str(brain_mr / site),
            "NODE_PORT": str(node), "CERTIFICATE": str(tmp_path / "kits" / f"{site}.crt"),
        }
        for site, node in zip(SITES, free_ports(2), strict=True)
    }  # fmt: skip
    for section in (1, 2, 3):
        reader.follow("operator", section)
    for own in hospital.values():
        reader.follow("site", 1, **own)
        told = reader.follow("site", 2, 0, **own)
        fingerprint = re.search(r"Compare by telephone, for \w+: (\S.*)", told)[1]
        assert fingerprint in reader.follow("operator", 4, **own)
        reader.follow("site", 2, 1, **own)
        told = reader.follow("site", 3, **own)
        assert "Nothing left" in told
        assert "not ready" not in told, told
        reader.follow("site", 4, **own)
    assert "DU" in reader.follow("operator", 5)
    assert "done" in reader.follow("operator", 6).lower()
    for own in hospital.values():
        assert "chain verified" in reader.follow("site", 5, **own)
    assert "revoked" in reader.follow("operator", 7, **hospital["DU"])
    for own in hospital.values():
        reader.follow("site", 6, **own)
    for section in (1, 2, 3):
        reader.follow("scientist", section)
    every = {(guide, section, number) for guide in ("operator", "site", "scientist")
             for section, texts in blocks(guide).items() for number in range(len(texts))}  # fmt: skip
    assert reader.run == every, "A block of a guide was not run"
