from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from sklearn.metrics import cohen_kappa_score

from winnow.agreement import cohen_kappa, fleiss_kappa, majority, majority_map, mask_agreement, percent_agreement

# Fourteen people, ten subjects, five answers: the textbook example of Fleiss' kappa.
FOURTEEN = np.array(
    [
        [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
    ]
)  # fmt: skip


@pytest.mark.parametrize(
    ("votes", "together"),
    [([], None), (["cat"], "cat"), (["cat", "dog"], None), (["cat", "dog", "cat"], "cat"),
     (["a", "a", "b", "b", "c"], None)],
)  # fmt: skip
def test_majority(votes: list[str], together: str | None) -> None:
    assert majority(votes) == together


def test_fleiss_kappa_of_the_textbook() -> None:
    assert fleiss_kappa(FOURTEEN) == pytest.approx(0.210, abs=5e-4)
    assert percent_agreement(FOURTEEN) == pytest.approx(0.378, abs=5e-4)


def test_images_of_one_person_do_not_count() -> None:
    alone = np.array([[1, 0, 0, 0, 0]] * 7)
    assert fleiss_kappa(np.vstack([FOURTEEN, alone])) == fleiss_kappa(FOURTEEN)
    assert fleiss_kappa(alone) is None
    assert percent_agreement(alone) is None


def test_cohen_kappa_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    first = rng.choice(["cat", "dog", "bird"], 200)
    second = np.where(rng.random(200) < 0.7, first, rng.choice(["cat", "dog", "fish"], 200))
    assert cohen_kappa(first.tolist(), second.tolist()) == pytest.approx(cohen_kappa_score(first, second), abs=1e-12)


def test_what_chance_alone_would_make_has_no_kappa() -> None:
    assert cohen_kappa(["cat"] * 5, ["cat"] * 5) is None
    assert cohen_kappa([], []) is None
    assert fleiss_kappa(np.array([[2, 0], [3, 0]])) is None
    with pytest.raises(ValueError, match="same images"):
        cohen_kappa(["cat"], [])


def test_masks_agree_by_mean_iou_of_pairs() -> None:
    one = np.array([[0, 0, 1, 1]], np.uint8)
    other = np.array([[0, 1, 1, 1]], np.uint8)
    assert mask_agreement([one, one]) == 1.0
    assert mask_agreement([one, other]) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert mask_agreement([one, other, one]) == pytest.approx((1.0 + 2 * (1 / 2 + 2 / 3) / 2) / 3)
    assert mask_agreement([one]) is None
    assert mask_agreement([one, np.full((1, 4), 255, np.uint8)]) is None


def test_majority_of_pixels() -> None:
    maps = [np.array(row, np.uint8) for row in ([[0, 0, 1, 255, 2]], [[0, 1, 1, 255, 1]], [[0, 2, 2, 3, 255]])]
    assert_array_equal(majority_map(maps), [[0, 255, 1, 3, 255]])
