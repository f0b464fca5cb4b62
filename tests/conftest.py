"""Shared fixtures: a tiny synthetic federation, and shapes checked by beartype in every test."""

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Must come before anything imports fedssl: every jaxtyping annotation is checked at every call.
install_import_hook("fedssl", "typechecker.checked")

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

REAL_DATA = Path(os.environ.get("FEDSSL_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Keep every test out of the user's cache and ledgers; the hospitals are written once a session."""
    monkeypatch.setenv("FEDSSL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("FEDSSL_STATE", str(tmp_path_factory.mktemp("state")))


@pytest.fixture(scope="session")
def hospitals(tmp_path_factory):
    """Five small synthetic hospitals; the root to give to data.root."""
    from fedssl.data.hospitals import write_hospitals

    return write_hospitals(tmp_path_factory.mktemp("hospitals"), seed=3, scale=0.2)


@pytest.fixture
def tiny(hospitals):
    """Overrides of a federation that trains in a second."""
    return [
        f"data.root={hospitals}",
        "+experiment=demo",
        "data.edge=40",
        "augment.crops.global.edge=32",
        "augment.crops.local.edge=16",
        "augment.crops.local.count=1",
        "heads.num_prototypes=8",
        "heads.hidden=32",
        "heads.width=16",
        "training.batch_size=16",
        "training.threads=1",
        "federation.rounds=2",
        "simulation.arms=[federated]",
        "evaluation.seeds=2",
        "evaluation.bootstrap=50",
    ]


@pytest.fixture
def heard():
    """What was said during the test."""
    from fedssl import progress

    events = []
    stop = progress.listen(events.append)
    yield events
    stop()


@pytest.fixture(scope="session")
def brain_mr():
    """The real brain MR set, or a skip that says what is missing."""
    root = REAL_DATA / "brain-mr"
    if not root.exists():
        pytest.skip("the brain MR set is not at ../shared/data/brain-mr (or FEDSSL_REAL_DATA)")
    return root


@pytest.fixture(scope="session")
def mednist():
    """The real MedNIST subset, or a skip that says what is missing."""
    root = REAL_DATA / "mednist"
    if not root.exists():
        pytest.skip("the MedNIST subset is not at ../shared/data/mednist (or FEDSSL_REAL_DATA)")
    return root
