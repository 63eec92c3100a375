from __future__ import annotations

import numpy as np

from winnow.palette import NUM_COLOURS, UNLABELLED, _lab, class_colours

NAMES = [str(number) for number in range(NUM_COLOURS)]


def test_the_first_colours_are_those_that_everyone_can_tell_apart() -> None:
    assert class_colours(["cat", "dog"]).tolist() == [[230, 159, 0], [86, 180, 233]]


def test_a_background_is_black_and_uses_up_no_colour() -> None:
    assert class_colours(["__background__", "cat"]).tolist() == [[0, 0, 0], [230, 159, 0]]
    assert class_colours(["cat", "background", "dog"]).tolist() == [[230, 159, 0], [0, 0, 0], [86, 180, 233]]


def test_every_colour_is_told_from_all_others_and_from_black_and_not_labelled() -> None:
    lab = _lab(np.concatenate([class_colours(NAMES), [UNLABELLED, (0, 0, 0)]]).astype(np.uint8))
    distance = np.linalg.norm(lab[:, None] - lab[None, :], axis=2)
    np.fill_diagonal(distance, np.inf)
    # Two colours closer than about 2.3 look the same (Mahy et al. 1994).
    assert distance[:20, :20].min() > 20
    assert distance[:60, :60].min() > 15
    assert distance.min() > 5


def test_the_colours_of_the_first_classes_do_not_depend_on_how_many_follow() -> None:
    assert np.array_equal(class_colours(NAMES[:30]), class_colours(NAMES)[:30])
    many = class_colours(NAMES * 2)
    assert np.array_equal(many[:NUM_COLOURS], many[NUM_COLOURS:])


def test_lab_of_known_colours() -> None:
    lab = _lab(np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0]], dtype=np.uint8))
    assert np.allclose(lab, [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20]], atol=0.05)
