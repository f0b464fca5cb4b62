"""A whole federation in one process: runs, resumes, arms."""

import math

import pytest
import torch

from fedssl import progress
from fedssl.checkpoint import load_checkpoint
from fedssl.config import load
from fedssl.errors import ConfigError, DataError, FederationError
from fedssl.run_folder import RunFolder
from fedssl.storage import read_jsonl
from simulations.arms import plan_arms
from simulations.run import simulate


def _final(folder):
    return load_checkpoint(RunFolder(folder).last)


def _same(first, second):
    return first.state.keys() == second.state.keys() and all(
        torch.equal(first.state[name], second.state[name]) for name in first.state
    )


def _interrupt_in_round(number):
    def interrupt(event):
        if isinstance(event, progress.Step) and event.round == number and event.site == "SOUTH":
            raise KeyboardInterrupt

    return interrupt


def test_a_federation_trains_and_leaves_everything_that_a_run_folder_promises(tiny, tmp_path):
    simulate([*tiny, f"run_dir={tmp_path / 'run'}"])
    folder = RunFolder(tmp_path / "run")
    rounds, sites = read_jsonl(folder.round_metrics), read_jsonl(folder.metrics)
    assert [row["round"] for row in rounds] == [1, 2]
    assert {row["site"] for row in sites} == {"EAST", "HARBOUR", "SOUTH", "WEST"}
    assert all(math.isfinite(row["loss"]) and row["data_wait"] < 1 for row in sites)
    assert rounds[0]["comm/bytes_up"] > 4 * 1000
    assert folder.best.exists()
    assert (folder.path / "config.resolved.yaml").exists()
    assert (folder.path / "environment.json").exists()
    assert list((folder.path / "tensorboard").iterdir())
    assert _final(folder.path).images_seen == sum(row["images"] for row in sites)


def test_two_equal_runs_end_with_equal_bits(tiny, tmp_path):
    for name in "ab":
        simulate([*tiny, f"run_dir={tmp_path / name}"])
    assert _same(_final(tmp_path / "a"), _final(tmp_path / "b"))


def test_an_interrupted_and_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tiny, tmp_path):
    settings = [*tiny, "federation.rounds=3"]
    simulate([*settings, f"run_dir={tmp_path / 'whole'}"])
    stop = progress.listen(_interrupt_in_round(3))
    with pytest.raises(KeyboardInterrupt):
        simulate([*settings, f"run_dir={tmp_path / 'cut'}"])
    stop()
    assert _final(tmp_path / "cut").round == 2
    simulate([*settings, f"run_dir={tmp_path / 'cut'}", "resume=true"])
    assert _same(_final(tmp_path / "whole"), _final(tmp_path / "cut"))
    drop = {"seconds", "images_per_s", "data_wait"}
    whole, cut = (
        [
            {key: value for key, value in row.items() if key not in drop}
            for row in read_jsonl(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("whole", "cut")
    )
    assert whole == cut


def test_a_run_folder_is_never_overwritten_unless_told_to(tiny, tmp_path):
    run = [*tiny, "federation.rounds=1", f"run_dir={tmp_path / 'run'}"]
    simulate(run)
    with pytest.raises(ConfigError, match="resume=true"):
        simulate(run)
    simulate([*run, "overwrite=true"])


def test_a_folder_that_is_no_run_is_not_deleted_even_when_told_to_overwrite(tiny, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="not a run's folder"):
        simulate([*tiny, f"run_dir={tmp_path / 'thesis'}", "overwrite=true"])
    assert (tmp_path / "thesis" / "chapter.txt").exists()


def test_a_resume_with_another_configuration_is_refused(tiny, tmp_path):
    simulate([*tiny, f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match="has the configuration"):
        simulate([*tiny, f"run_dir={tmp_path / 'run'}", "federation.rounds=4", "optim.lr=0.01", "resume=true"])


def test_more_prototypes_than_images_excludes_the_site_by_name_and_says_what_to_do(tiny, tmp_path):
    with pytest.raises(FederationError, match=r"EAST.*Lower heads\.num_prototypes to"):
        simulate([*tiny, f"run_dir={tmp_path / 'run'}", "heads.num_prototypes=500"])


def test_an_unknown_site_is_refused(tiny, tmp_path):
    with pytest.raises(DataError, match="ATLANTIS"):
        simulate([*tiny, f"run_dir={tmp_path / 'run'}", "data.sites=[EAST,ATLANTIS]"])


def test_arms_see_equally_many_images(tiny, tmp_path):
    settings = [
        *tiny,
        f"run_dir={tmp_path / 'run'}",
        "simulation.arms=[federated,single_site,pooled]",
        "training.batch_size=8",
    ]
    _, arms = simulate(settings)
    seen = {arm.name: _final(arm.folder).images_seen for arm in arms}
    assert set(seen) == {"federated", "single_site", "pooled"}
    assert max(seen.values()) - min(seen.values()) <= 0.12 * max(seen.values())


def test_the_single_site_arm_holds_images_of_one_site_only(tiny, hospitals, tmp_path):
    from fedssl.build_images import open_images, simulated_sites

    config = load([*tiny, "simulation.arms=[federated,single_site]"])
    arm = plan_arms(config, open_images(config), tiny)[1]
    alone = load(arm.overrides)
    held = simulated_sites(alone, open_images(alone))
    assert list(held) == ["EAST"]
    assert set(held["EAST"].column("site")) == {"EAST"}


def test_a_collapsed_run_says_so_loudly(tiny, tmp_path, heard):
    settings = ["federation.rounds=4", "method.clustering_temperature=100", "optim.lr=1e-9"]
    simulate([*tiny, *settings, f"run_dir={tmp_path / 'run'}"])
    alarms = [event.text for event in heard if isinstance(event, progress.Note) and event.alarm]
    assert any("COLLAPSE at site EAST, round 4" in text and "ln K" in text for text in alarms)
    assert read_jsonl(tmp_path / "run" / "round_metrics.jsonl")[-1]["ssl/collapse"]["EAST"]


def test_a_federation_with_remedies_logs_them_and_resumes_to_the_same_bits(tiny, tmp_path, heard):
    settings = [*tiny, "federation.rounds=6", "heads.num_prototypes=24", "collapse.reseed=true", "collapse.contrast=2"]
    simulate([*settings, f"run_dir={tmp_path / 'whole'}"])
    rows = read_jsonl(RunFolder(tmp_path / "whole").round_metrics)
    assert [row["ssl/reseeded"] for row in rows][:3] == [0, 0, 0]
    assert sum(row["ssl/reseeded"] for row in rows) > 0
    assert any("start again beside busy ones" in str(note) for note in heard)
    assert _final(tmp_path / "whole").contrast == rows[-1]["ssl/contrast"]
    stop = progress.listen(_interrupt_in_round(5))
    with pytest.raises(KeyboardInterrupt):
        simulate([*settings, f"run_dir={tmp_path / 'broken'}"])
    stop()
    simulate([*settings, f"run_dir={tmp_path / 'broken'}", "resume=true"])
    assert _same(_final(tmp_path / "whole"), _final(tmp_path / "broken"))
