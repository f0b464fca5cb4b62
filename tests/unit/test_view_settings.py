"""Settings of views that cannot be used are refused before anything trains, all at once."""

import pytest

from fedssl.build import build_views
from fedssl.config import load
from fedssl.errors import ConfigError


def _views(*overrides):
    return build_views(load(["data.root=.", *overrides]))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("augment.crops.local.area=[0.3]", r"crops\.local needs a whole count"),
        ("augment.crops.local.area=[0.3,0.1]", r"0 < low <= high <= 1"),
        ("augment.crops.local.area=[0,0]", r"0 < low <= high <= 1"),
        ("augment.crops.local.edge=0", "a whole edge"),
        ("augment.crops.local.count=1.5", "a whole count"),
        ("augment.crops.local.count=-1", "a whole count"),
        ("augment.crops.local=null", r"must be \{count"),
        ("augment.crops=null", "must hold the scale global"),
        ("augment.crops.global.count=two", r"crops\.global needs"),
        ("augment.crops.global.count=1", "at least 2: views are compared"),
        ("augment.rotation=fast", r"augment\.rotation must be a number"),
        ("augment.energy=-1", r"augment\.energy must be a number from 0 to 180"),
        ("augment.ct_windows=5", "from 0 to 1"),
        ("+augment.modalities.ct.rotation=fast", r"modalities\.ct\.rotation must be a number"),
        ("+augment.modalities.ct.blurr=1", r"modalities\.ct\.blurr does not exist"),
    ],
)
def test_an_unusable_setting_is_refused_with_what_it_must_be(override, sentence):
    with pytest.raises(ConfigError, match=sentence):
        _views(override)


def test_all_problems_are_reported_at_once():
    with pytest.raises(ConfigError, match=r"rotation.*gamma|gamma.*rotation"):
        _views("augment.rotation=-1", "augment.gamma=-1")


def test_tiny_views_need_full_precision():
    small = "+augment.crops.tiny={count: 1, edge: 16, area: [0.1, 0.2]}"
    assert len(_views(small).scales) == 3
    with pytest.raises(ConfigError, match="never written"):
        _views(small, "training.precision=bf16")
