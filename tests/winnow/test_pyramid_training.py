from __future__ import annotations

import numpy as np
import pytest

from winnow.models import pyramid_training
from winnow.models.pyramid_training import fit_pyramid_head, logits_of, num_steps, target_of

SIZE = (32, 48)
CHANNELS = (3, 4, 5, 6)


def scenes(num: int, seed: int = 0) -> tuple[list[np.ndarray], np.ndarray]:
    """Maps in which a bright rectangle shows, and its label map: 1 inside, 0 around, a strip not labelled."""
    random = np.random.default_rng(seed)
    targets = np.zeros((num, *SIZE), dtype=np.uint8)
    for target in targets:
        top, left = random.integers(0, SIZE[0] // 2), random.integers(0, SIZE[1] // 2)
        target[top : top + SIZE[0] // 2, left : left + SIZE[1] // 2] = 1
    maps = []
    for channels, stride in zip(CHANNELS, (4, 8, 16, 32), strict=True):
        height, width = SIZE[0] // stride, max(1, SIZE[1] // stride)
        shown = targets[:, : height * stride : stride, : width * stride : stride].astype(np.float32)
        noise = random.normal(size=(num, channels, height, width)) * 0.3
        maps.append((noise + shown[:, None]).astype(np.float16))
    targets[:, :, -2:] = 255
    return maps, targets


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyramid_training, "IMAGES_SEEN", 480)


def test_the_decoder_learns_where_the_rectangle_is_and_nothing_of_what_is_not_labelled() -> None:
    maps, targets = scenes(24)
    told: list[tuple[int, int]] = []
    head = fit_pyramid_head(maps, targets, 2, seed=0, on_step=lambda done, total: told.append((done, total)))
    assert told[-1] == (num_steps(24), num_steps(24))
    assert not head.training
    unseen, truth = scenes(8, seed=1)
    answers = logits_of(head, unseen, SIZE).argmax(axis=1)
    assert answers.shape == (8, *SIZE)
    known = truth != 255
    assert (answers == truth)[known].mean() > 0.9


def test_the_same_seed_gives_the_same_weights_and_leaves_the_generator_alone() -> None:
    import torch

    maps, targets = scenes(9)
    state = torch.random.get_rng_state()
    first, second, other = (fit_pyramid_head(maps, targets, 2, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_one_image_and_no_labelled_pixel_are_no_faults() -> None:
    maps, targets = scenes(1)
    targets[:] = 255
    assert logits_of(fit_pyramid_head(maps, targets, 2, seed=0), maps, SIZE).shape == (1, 2, *SIZE)


def test_every_image_is_seen_at_least_twice_and_few_images_no_more_than_forty_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    assert num_steps(8) == 40
    assert num_steps(400) == 500
    assert num_steps(80_000) == 20_000


def test_targets_lie_where_the_view_shows_the_image() -> None:
    labels = np.array([[0, 1], [1, 0]], dtype=np.uint8)
    target = target_of(labels, (4, 2), (4, 6), 2)
    assert target.tolist() == [
        [0, 0, 1, 1, 255, 255],
        [1, 1, 0, 0, 255, 255],
        [255] * 6,
        [255] * 6,
    ]
    assert target_of(labels.astype(np.uint16), (2, 2), (2, 2), 300).dtype == np.uint16
