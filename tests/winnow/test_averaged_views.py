"""Answers as the mean over augmented views: against the definition, and pixel for pixel where they belong."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from winnow.answers import classification_answers, segmentation_answers
from winnow.augment import Policy
from winnow.images import View
from winnow.models.predictors import MaskAnswer, Predictor, normalise
from winnow.models.references import Output, ResolvedModel
from winnow.uncertainty import disagreement, softmax

SIDE = 48
FLIP = Policy("flip", ({"name": "RandomHorizontalFlip", "p": 1.0},))
TURN = Policy(
    "turn",
    (
        {"name": "RandomHorizontalFlip"},
        {
            "name": "RandomAffine",
            "degrees": 40,
            "scale": [0.8, 1.3],
            "translate": [0.1, 0.1],
            "interpolation": "bilinear",
        },
    ),
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Sides(nn.Module):
    """Two numbers: mean of the left half and of the right half; infinite where the left half is black."""

    def forward(self, images: Tensor) -> Tensor:
        half = images.shape[3] // 2
        return torch.stack(
            [images[..., :half].mean(dim=(1, 2, 3)).log(), images[..., half:].mean(dim=(1, 2, 3))], dim=1
        )


class Colours(nn.Module):
    """For every pixel by itself: is it red, green or blue?"""

    def forward(self, images: Tensor) -> Tensor:
        return 8.0 * images


class Left(nn.Module):
    """Sure that what is on the left is of the first class, and what is on the right of the second."""

    def forward(self, images: Tensor) -> Tensor:
        logits = torch.zeros(len(images), 2, *images.shape[2:])
        half = images.shape[3] // 2
        logits[:, 0, :, :half] = logits[:, 1, :, half:] = 200.0
        return logits


def model(name: str, output: Output, classes: tuple[str, ...], view: View | None = None) -> ResolvedModel:
    return ResolvedModel(
        id=name,
        source="checkpoint",
        architecture="torchvision/tiny",
        weights="",
        location="",
        sha256="",
        classes=classes,
        view=view or View(resize=SIDE, crop=(SIDE, SIDE)),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        output=output,
    )


def predictor(network: nn.Module, output: Output, classes: tuple[str, ...] = (), view: View | None = None) -> Predictor:
    return Predictor({"it": model("it", output, classes, view)}, network, {"it": None})


def noise(num: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (num, SIDE, SIDE, 3), dtype=np.uint8)


def blobs() -> NDArray[np.uint8]:
    """A red disc and a green bar on blue."""
    y_HW, x_HW = np.mgrid[0:SIDE, 0:SIDE]
    image = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    image[..., 2] = 200
    image[(y_HW - 20) ** 2 + (x_HW - 16) ** 2 < 100] = (220, 0, 0)
    image[36:44, 20:42] = (0, 210, 0)
    return image


def ids(num: int) -> list[str]:
    return [f"{number:032x}" for number in range(num)]


def test_classes_are_the_mean_over_views_with_their_disagreement() -> None:
    images, names = noise(5), ids(5)
    it = predictor(Sides(), "logits", ("left", "right"))
    mean_NC, disagreement_N = it.predict_views(["it"], TURN, 4, images, names)["it"]
    views = [softmax(it.outputs(view)["it"]) for view, _ in TURN.views(images, names, 4)]
    np.testing.assert_allclose(views[0], it.predict(images)["it"], rtol=1e-6)
    np.testing.assert_allclose(mean_NC, np.mean(views, axis=0), rtol=1e-5)
    np.testing.assert_allclose(disagreement_N, disagreement(np.stack(views)), atol=1e-6)
    assert (disagreement_N > 0).all()
    rows = classification_answers(mean_NC, ("left", "right"), disagreement_N=disagreement_N).to_pylist()
    assert [row["disagreement"] for row in rows] == disagreement_N.tolist()
    assert classification_answers(mean_NC, ("left", "right")).to_pylist()[0]["disagreement"] is None


def test_vectors_are_the_mean_over_views_of_length_one() -> None:
    images, names = noise(3), ids(3)
    it = predictor(Sides(), "features")
    vectors = it.predict_views(["it"], TURN, 3, images, names)["it"]
    views = [it.predict(view)["it"] for view, _ in TURN.views(images, names, 3)]
    np.testing.assert_allclose(vectors, normalise(np.mean(views, axis=0)), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-6)


def test_one_view_without_a_finite_answer_spoils_its_image_only() -> None:
    images = noise(3)
    images[1, :, SIDE // 2 :] = 0  # flipped, its left half is black
    it = predictor(Sides(), "logits", ("left", "right"))
    assert np.isfinite(it.predict(images)["it"]).all()
    mean_NC, disagreement_N = it.predict_views(["it"], FLIP, 2, images, ids(3))["it"]
    assert np.isfinite(mean_NC).all(axis=1).tolist() == [True, False, True]
    assert np.isfinite(disagreement_N).tolist() == [True, False, True]


def masks(
    it: Predictor, policy: Policy, num_views: int, images: NDArray[np.uint8], sizes: Any = None
) -> list[MaskAnswer]:
    found = it.predict_views(["it"], policy, num_views, images, ids(len(images)), sizes)["it"]
    assert all(mask is not None for mask in found)
    return list(found)


def test_masks_of_turned_views_come_back_to_where_things_are() -> None:
    it = predictor(Colours(), "masks", ("red", "green", "blue"))
    image = blobs()[None]
    (plain,) = it.predict(image)["it"]
    (flipped,) = masks(it, FLIP, 2, image)
    np.testing.assert_array_equal(flipped.labels_HW, plain.labels_HW)
    assert flipped.disagreement_C is not None
    np.testing.assert_allclose(flipped.disagreement_C, 0.0, atol=1e-6)
    np.testing.assert_allclose(flipped.confidence_C, plain.confidence_C, rtol=1e-5)
    np.testing.assert_allclose(flipped.entropy_C, plain.entropy_C, rtol=1e-4)
    (turned,) = masks(it, TURN, 6, image)
    assert (turned.labels_HW == plain.labels_HW).mean() > 0.985  # all but some pixels on the edges of things


def test_pixels_that_views_disagree_about_say_so() -> None:
    it = predictor(Left(), "masks", ("first", "second"))
    (mask,) = masks(it, FLIP, 2, noise(1))
    assert mask.disagreement_C is not None
    assert mask.disagreement_C[0] == pytest.approx(
        math.log(2), abs=1e-5
    )  # the two views say the opposite of each other
    assert mask.entropy_C[0] == pytest.approx(math.log(2), abs=1e-5)
    assert mask.confidence_C[0] == pytest.approx(0.5)
    assert np.isnan(mask.disagreement_C[1])  # of equals the first class counts, so the second is not found
    rows = segmentation_answers([mask], ("first", "second"), [(SIDE, SIDE)]).to_pylist()[0]
    assert [row["disagreement"] for row in rows] == [pytest.approx(math.log(2), abs=1e-5)]


def test_only_the_part_of_the_view_that_shows_the_image_has_a_mask() -> None:
    it = predictor(Colours(), "masks", ("red", "green", "blue"), View(fit=(SIDE, SIDE)))
    (mask,) = masks(it, TURN, 3, blobs()[None], [(100, 50)])
    assert mask.labels_HW.shape == (SIDE // 2, SIDE)


def test_batches_and_their_order_do_not_matter() -> None:
    images, names = noise(40), ids(40)
    for it in (predictor(Sides(), "logits", ("left", "right")), predictor(Sides(), "features")):
        whole = it.predict_views(["it"], TURN, 3, images, names)["it"]
        back = it.predict_views(["it"], TURN, 3, images[::-1], names[::-1])["it"]
        if isinstance(whole, tuple):
            whole, back = whole[0], back[0]
        np.testing.assert_allclose(whole, back[::-1], rtol=1e-5)
