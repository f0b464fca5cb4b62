"""Clusters and modalities in a federation of synthetic hospitals with radiographs, CT, MR and ultrasound."""

import pytest

from fedssl.run_folder import RunFolder
from fedssl.storage import read_jsonl
from simulations.run import simulate


def _information(run):
    """Mutual information of cluster and modality at the sites that have several, in the last round."""
    rows = read_jsonl(RunFolder(run).metrics)
    last = max(row["round"] for row in rows)
    return {row["site"]: row["modality_nmi"] for row in rows if row["round"] == last and "modality_nmi" in row}


def test_partitioned_clusters_tell_the_modality_and_equipartition_inside_each_tells_less(tiny, tmp_path):
    found = {}
    for form in ("pooled", "per-modality", "partitioned"):
        run = tmp_path / form
        settings = [
            "method.epsilon=0.02",
            "method.blocks=[radiography,ct,mr,ultrasound]",
            "method.contrastive_weight=0.2",
            "federation.rounds=6",
            "data.sites=[SOUTH,WEST]",
        ]
        simulate([*tiny, *settings, "federation.prototype_patients=1", f"method.modalities={form}", f"run_dir={run}"])
        found[form] = _information(run)
    assert found["pooled"].keys() == found["partitioned"].keys() != set()
    for site, told in found["partitioned"].items():
        assert told == pytest.approx(1.0, abs=1e-9)
        assert found["per-modality"][site] < found["pooled"][site]


def test_each_image_has_the_views_of_its_own_modality(tiny, tmp_path):
    simulate([*tiny, "augment=by_modality", f"run_dir={tmp_path / 'run'}"])
    assert len(read_jsonl(RunFolder(tmp_path / "run").metrics)) == 8
