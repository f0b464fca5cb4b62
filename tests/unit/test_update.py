"""The server's check of what a site sends, and the signs of collapse."""

import math

import pytest
import torch

from fedssl.collapse import diagnose, rank_me
from fedssl.errors import UpdateRefused
from fedssl.update import Limits, Update, change_of, check_update, cosine_to


def _update(**changed):
    state = {"w": torch.zeros(2), "prototypes": torch.eye(3)}
    plain = {
        "site": "A",
        "state": state,
        "examples": 5,
        "steps": 2,
        "mass": torch.ones(3),
        "usage": torch.ones(3),
        "metrics": {"loss": 1.0, "images": 4.0},
    }
    return Update(**(plain | changed))


_REFERENCE = {"w": torch.zeros(2), "prototypes": torch.eye(3)}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"state": {"w": torch.zeros(2)}}, "prototypes is missing"),
        ({"state": _REFERENCE | {"queue": torch.zeros(1)}}, "queue is not part"),
        ({"state": _REFERENCE | {"w": torch.zeros(3)}}, r"float32\[3\] where float32\[2\]"),
        ({"state": _REFERENCE | {"w": torch.zeros(2).double()}}, "float64"),
        ({"state": _REFERENCE | {"w": torch.tensor([0.0, float("nan")])}}, "w is not finite"),
        ({"mass": None}, "mass is missing"),
        ({"usage": -torch.ones(3)}, "negative"),
        ({"examples": 0}, "0 images"),
        ({"metrics": {"loss": float("inf"), "images": 1.0}}, "not finite"),
        ({"metrics": {"images": 1.0}}, "lack loss"),
        ({"steps": 0}, "0 steps"),
        ({"steps": 5}, "4 images in 5 steps"),
        ({"metrics": {"loss": 1.0, "images": 1e-320}}, "images in 2 steps"),
        ({"state": _REFERENCE | {"bad\nALARM[red]": torch.zeros(1)}}, r"tensor bad\?ALARM\?red\? is not part"),
        ({"examples": 21}, "21 images"),
        ({"mass": torch.full((3,), 2.0)}, "counts 6 images where it trained on 4"),
        ({"usage": torch.full((3,), 1e30)}, "counts 3e.30 images"),
        ({"state": {"w": torch.zeros(2), "prototypes": 1000.0 * torch.eye(3)}}, "999 times their norm"),
        ({"state": {"w": torch.full((2,), 1e30), "prototypes": torch.eye(3)}}, "times their norm"),
    ],
)
def test_an_update_that_cannot_be_averaged_is_refused_and_the_site_named(changed, reason):
    with pytest.raises(UpdateRefused, match=reason) as refused:
        check_update(_update(**changed), _REFERENCE, Limits(frozenset({"contrastive"}), examples=20))
    assert refused.value.site == "A"


def test_a_good_update_passes():
    assert check_update(_update(), _REFERENCE, Limits()) == 0.0


def test_the_change_of_the_weights_is_told_in_norms_of_the_weights():
    before, after = (
        {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])},
        {"a": torch.tensor([3.0, 5.0]), "b": torch.zeros(1)},
    )
    assert change_of(after, before) == pytest.approx(41**0.5 / 5)
    assert cosine_to(after, before) == pytest.approx(9 / (5 * 34**0.5))
    nothing = {"a": torch.zeros(2)}
    assert change_of(nothing, nothing) == 0.0
    assert change_of({"a": torch.ones(2)}, nothing) == math.inf


def test_rank_me_is_the_number_of_equal_directions():
    basis = torch.cat([torch.eye(6, 20), -torch.eye(6, 20)]).repeat(30, 1)
    assert rank_me(basis) == pytest.approx(6, rel=1e-2)
    line = torch.linspace(-1, 1, 50)[:, None] @ torch.ones(1, 20)
    assert rank_me(line + 100.0) == pytest.approx(1, rel=1e-2)


def test_each_sign_of_collapse_is_named_and_a_healthy_run_has_none():
    healthy = {"clustering": 2.0, "effective_prototypes": 40.0, "rankme": 30.0}
    facts = {"num_prototypes": 64, "width": 96, "samples": 512}
    assert diagnose(healthy, **facts) == []
    assert "ln K" in diagnose(healthy | {"clustering": math.log(64)}, **facts)[0]
    assert "prototypes are in use" in diagnose(healthy | {"effective_prototypes": 1.2}, **facts)[0]
    assert "RankMe" in diagnose(healthy | {"rankme": 1.0}, **facts)[0]
