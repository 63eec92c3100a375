"""Policies: what they accept, that they repeat themselves, that masks follow, and that answers find their way back."""

from __future__ import annotations

import pickle
import random
import threading
import tomllib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchvision import tv_tensors
from torchvision.transforms import v2

from winnow.augment import TRANSFORMS, Policy, carry_back
from winnow.config import AugmentationConfig
from winnow.errors import AugmentError, CallError

GEOMETRIC = """
[[transforms]]
name = "RandomHorizontalFlip"
[[transforms]]
name = "RandomAffine"
degrees = [-30, 30]
translate = [0.1, 0.1]
scale = [0.7, 1.3]
fill = [200, 10, 10]
[[transforms]]
name = "RandomChoice"
transforms = [{ name = "ColorJitter", brightness = [0.5, 1.5] }, { name = "RandomVerticalFlip", p = 1.0 }]
p = [0.3, 0.7]
"""

UNLABELLED = 255

NEEDED: dict[str, dict[str, Any]] = {
    "CenterCrop": {"size": 32},
    "Compose": {"transforms": [{"name": "RandomInvert"}]},
    "GaussianBlur": {"kernel_size": [3, 5]},
    "Pad": {"padding": [1, 2, 3, 4]},
    "RandomAdjustSharpness": {"sharpness_factor": 2},
    "RandomAffine": {"degrees": 20},
    "RandomApply": {"transforms": [{"name": "RandomSolarize", "threshold": 100}]},
    "RandomChoice": {"transforms": [{"name": "RandomVerticalFlip"}, {"name": "RandomInvert"}]},
    "RandomCrop": {"size": [40, 40]},
    "RandomErasing": {"value": [1, 2, 3], "p": 1.0},
    "RandomOrder": {"transforms": [{"name": "RandomVerticalFlip"}, {"name": "RandomInvert"}]},
    "RandomPosterize": {"bits": 3},
    "RandomResize": {"min_size": 30, "max_size": 60},
    "RandomResizedCrop": {"size": [32, 32]},
    "RandomRotation": {"degrees": [-20, 20], "expand": True, "interpolation": "bilinear"},
    "RandomShortestSize": {"min_size": [30, 40]},
    "RandomSolarize": {"threshold": 100},
    "Resize": {"size": [48, 56]},
    "ScaleJitter": {"target_size": [64, 64]},
}


def policy_of(*transforms: dict[str, Any], seed: int = 0) -> Policy:
    return Policy.from_config("mild", AugmentationConfig(transforms=transforms, seed=seed))


def geometric() -> Policy:
    return Policy.from_config("geometric", AugmentationConfig.model_validate(tomllib.loads(GEOMETRIC)))


def noise(height: int = 70, width: int = 90, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def quarters(height: int = 70, width: int = 90) -> NDArray[np.uint8]:
    """A mask of four classes and one unlabelled pixel."""
    mask_HW = np.zeros((height, width), dtype=np.uint8)
    mask_HW[height // 2 :] += 1
    mask_HW[:, width // 2 :] += 2
    mask_HW[0, 0] = UNLABELLED
    return mask_HW


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
def test_every_transform_gives_rgb_the_same_each_time(name: str) -> None:
    policy = policy_of({"name": name, **NEEDED.get(name, {})})
    first, mask_HW = policy.apply(noise(), image_id="a", view=1, mask_HW=quarters() if policy.moves_masks else None)
    again, _ = policy.apply(noise(), image_id="a", view=1)
    assert first.dtype == np.uint8
    assert first.shape[2] == 3
    np.testing.assert_array_equal(first, again)
    if mask_HW is not None:
        assert mask_HW.shape == first.shape[:2]
        assert set(np.unique(mask_HW)) <= {0, 1, 2, 3, UNLABELLED}


def test_every_class_of_torchvision_is_accepted_or_refused_with_its_reason() -> None:
    classes = [
        name for name in dir(v2) if isinstance(getattr(v2, name), type) and issubclass(getattr(v2, name), v2.Transform)
    ]
    assert set(TRANSFORMS) < set(classes)
    for name in sorted(set(classes) - set(TRANSFORMS)):
        with pytest.raises(CallError, match=f"{name} cannot be part of a policy: ") as caught:
            policy_of({"name": name})
        assert len(caught.value.message) > 60


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        ({"name": "RandomHorizontlFlip"}, "did you mean RandomHorizontalFlip"),
        ({"name": "Fold"}, "choose of .*RandomVerticalFlip"),
        (
            {"name": "ColorJitter", "brightnes": 1},
            r"transform 1 \(ColorJitter\) has no parameter 'brightnes'; did you mean bri",
        ),
        ({"name": "RandomErasing", "inplace": True}, "no parameter 'inplace'; valid: p, scale"),
        ({"name": "RandomAffine"}, "needs degrees"),
        ({"name": "ColorJitter", "hue": 2}, "hue values"),
        ({"name": "GaussianBlur", "kernel_size": 4}, "odd"),
        ({"name": "Resize", "size": "large"}, r"\(Resize\)"),
        ({"name": "Resize", "size": 9, "interpolation": "cubic"}, "'cubic' is unknown; choose nearest"),
        ({"name": "AutoAugment", "policy": "best"}, "'best' is unknown; choose imagenet"),
        ({"name": "RandomRotation", "degrees": 9, "fill": "red"}, "fill"),
        ({"name": "RandomHorizontalFlip", "p": 3}, r"\[0.0, 1.0\]"),
        ({"name": "RandomResizedCrop", "size": 9, "scale": [2, 1]}, "min, max"),
        ({"name": "Grayscale", "num_output_channels": 1}, "must be 3"),
        ({"name": "RandomErasing", "value": "random"}, "give a number"),
        ({"name": "RandomApply"}, "needs transforms"),
        (
            {"name": "RandomApply", "transforms": [{"name": "Resiz", "size": 9}]},
            r"\(RandomApply\), transform 1: 'Resiz'",
        ),
        ({"name": "RandomApply", "transforms": ["RandomInvert"]}, "needs a name"),
        ({"name": "RandomChoice", "transforms": [{"name": "RandomInvert"}], "p": [0.5, 0.5]}, "2 numbers for 1"),
    ],
)
def test_faults_are_named_with_what_is_valid(transform: dict[str, Any], message: str) -> None:
    with pytest.raises(CallError, match=message):
        policy_of(transform)


def test_pixels_depend_on_policy_seed_image_and_view_and_on_nothing_else() -> None:
    policy = geometric()
    images = {str(number): noise(seed=number) for number in range(6)}
    work = [(image_id, view) for image_id in images for view in (1, 2, 3)]

    def one(item: tuple[str, int]) -> bytes:
        return policy.apply(images[item[0]], image_id=item[0], view=item[1])[0].tobytes()

    expected = {item: one(item) for item in work}
    assert len(set(expected.values())) == len(work)
    random.Random(0).shuffle(work)
    with ThreadPoolExecutor(8) as pool:
        assert dict(zip(work, pool.map(one, work), strict=True)) == expected
    other = pickle.loads(pickle.dumps(policy))
    assert other == policy
    assert other.digest == policy.digest
    assert other.apply(images["0"], image_id="0", view=1)[0].tobytes() == expected["0", 1]
    reseeded = Policy(policy.name, policy.transforms, seed=1)
    assert reseeded.digest != policy.digest
    assert reseeded.apply(images["0"], image_id="0", view=1)[0].tobytes() != expected["0", 1]
    assert Policy.from_dict(policy.to_dict()) == policy


def test_the_random_state_of_the_caller_is_left_as_it_was() -> None:
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    before = (torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate())  # type: ignore[index]
    policy = geometric()
    policy.apply(noise(), image_id="a", view=1)
    with pytest.raises(AugmentError):
        policy_of({"name": "RandomCrop", "size": 4000}).apply(noise(), image_id="a", view=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tobytes() == before[1]  # type: ignore[index]
    assert random.getstate() == before[2]


def test_a_policy_is_torchvisions_own_transforms_under_its_seed() -> None:
    policy = policy_of({"name": "RandomAffine", "degrees": 30}, {"name": "ColorJitter", "hue": 0.2})
    found, _ = policy.apply(noise(), image_id="a", view=1)
    plain = v2.Compose([v2.RandomAffine(30), v2.ColorJitter(hue=0.2)])
    state = torch.get_rng_state()
    try:
        from winnow.augment import _seed

        torch.manual_seed(_seed(0, "a", 1))
        expected = plain(tv_tensors.Image(torch.from_numpy(noise()).permute(2, 0, 1).contiguous()))
    finally:
        torch.set_rng_state(state)
    np.testing.assert_array_equal(found, expected.permute(1, 2, 0).numpy())


def test_masks_move_with_their_images() -> None:
    # Every pixel of the image says in its colour what the mask says: afterwards both must still agree.
    mask_HW = quarters(200, 260)
    image_HWC = np.repeat((mask_HW * 60)[:, :, None], 3, axis=2).astype(np.uint8)
    policy = policy_of(
        {"name": "RandomRotation", "degrees": 40, "fill": [7, 7, 7], "expand": True},
        {"name": "RandomPerspective", "p": 1.0, "distortion_scale": 0.3, "fill": 7, "interpolation": "nearest"},
        {"name": "RandomHorizontalFlip"},
    )
    for view in range(1, 6):
        moved_HWC, moved_HW = policy.apply(image_HWC, image_id="a", view=view, mask_HW=mask_HW)
        assert moved_HW is not None
        outside = moved_HWC[:, :, 0] == 7
        assert 0.05 < outside.mean() < 0.8
        assert (moved_HW[outside] == UNLABELLED).all()
        agree = moved_HWC[:, :, 0] == (moved_HW * 60).astype(np.uint8)
        assert agree[~outside].all()


def test_label_maps_of_16_bits_keep_their_type_and_their_ids() -> None:
    mask_HW = np.full((70, 90), 300, dtype=np.uint16)
    policy = policy_of({"name": "RandomRotation", "degrees": [45, 45]})
    _, moved_HW = policy.apply(noise(), image_id="a", view=1, mask_HW=mask_HW)
    assert moved_HW is not None
    assert moved_HW.dtype == np.uint16
    assert set(np.unique(moved_HW)) == {300, 65535}


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(AugmentError, match="mask of 90 x 71 pixels does not fit the image of 90 x 70") as caught:
        geometric().apply(noise(), image_id="a", view=1, mask_HW=quarters(71))
    assert caught.value.kind == "bad_mask"


def test_what_moves_no_masks_is_refused_for_them() -> None:
    policy = policy_of({"name": "RandomApply", "transforms": [{"name": "RandAugment"}]})
    assert not policy.moves_masks
    with pytest.raises(CallError, match="uses RandAugment, which torchvision does not apply to masks"):
        policy.check_masks()
    geometric().check_masks()


def test_a_crop_larger_than_the_image_is_a_failure_of_that_image() -> None:
    policy = policy_of({"name": "RandomCrop", "size": 80})  # larger than what parameters are tried out on
    policy.apply(noise(80, 80), image_id="a", view=1)
    with pytest.raises(AugmentError, match="90 x 70 pixels: Required crop size") as caught:
        policy.apply(noise(), image_id="a", view=1)
    assert (caught.value.kind, caught.value.stage) == ("not_augmented", "augment")
    policy.check_size(80, 80)
    with pytest.raises(CallError, match=r"mend \[augmentations.mild\]"):
        policy.check_size(70, 90)


def test_training_uses_the_same_views_on_tensors_of_either_type() -> None:
    policy = policy_of({"name": "RandomRotation", "degrees": 30}, {"name": "RandomHorizontalFlip"})
    image_HWC = noise()
    expected, _ = policy.apply(image_HWC, image_id="a", view=2)
    image_CHW = torch.from_numpy(image_HWC).permute(2, 0, 1).contiguous()
    as_bytes, _ = policy.apply_tensors(image_CHW, image_id="a", view=2)
    as_floats, _ = policy.apply_tensors(image_CHW / 255, image_id="a", view=2)
    assert type(as_bytes) is torch.Tensor
    np.testing.assert_array_equal(as_bytes.permute(1, 2, 0).numpy(), expected)
    np.testing.assert_allclose(as_floats.permute(1, 2, 0).numpy() * 255, expected, atol=1e-3)


def test_view_zero_is_the_image_and_all_views_have_its_size() -> None:
    images_NHWC = np.stack([noise(seed=1), noise(seed=2)])
    policy = policy_of({"name": "RandomResizedCrop", "size": [32, 48]}, seed=5)
    found = list(policy.views(images_NHWC, ["a", "b"], 4))
    assert len(found) == 4
    np.testing.assert_array_equal(found[0][0], images_NHWC)
    for views_NHWC, maps_NHW in found:
        assert views_NHWC.shape == images_NHWC.shape
        assert maps_NHW is None
    assert len({view.tobytes() for view, _ in found}) == 4
    swapped = list(policy.views(images_NHWC[::-1], ["b", "a"], 4))
    for (one, _), (other, _) in zip(found, swapped, strict=True):
        np.testing.assert_array_equal(one, other[::-1])


@pytest.mark.parametrize(
    "transform",
    [
        {"name": "RandomHorizontalFlip", "p": 1.0},
        {"name": "RandomAffine", "degrees": 25, "translate": [0.1, 0.1], "scale": [1.0, 1.4]},
        {"name": "RandomResizedCrop", "size": [40, 60], "scale": [0.5, 0.9]},
        {"name": "RandomPerspective", "p": 1.0},
        {"name": "Pad", "padding": 8},
    ],
    ids=lambda transform: str(transform["name"]),
)
def test_answers_of_a_view_are_carried_back_to_the_pixels_they_are_about(transform: dict[str, Any]) -> None:
    # A picture whose every pixel says where it is: carried back, it must lie where it was.
    height, width = 64, 96
    y_HW, x_HW = np.mgrid[0:height, 0:width]
    image_HWC = np.stack([2 * y_HW, 2 * x_HW, 0 * x_HW], axis=2).astype(np.uint8)
    (_, _), (view_NHWC, map_NHW) = policy_of(transform).views(image_HWC[None], ["a"], 2, maps=True)
    assert map_NHW is not None
    sums_CHW, counts_HW = carry_back(
        torch.from_numpy(view_NHWC[0]).permute(2, 0, 1).float(), torch.from_numpy(map_NHW[0])
    )
    seen = (counts_HW > 0).numpy()
    assert seen.mean() > 0.3
    mean_HWC = (sums_CHW / counts_HW.clamp(min=1)).permute(1, 2, 0).numpy()
    inner = seen.copy()
    inner[[0, 1, -1, -2]] = inner[:, [0, 1, -1, -2]] = False  # at the border, interpolation mixes in the outside
    error = np.abs(mean_HWC - image_HWC)[inner][:, :2]
    assert np.quantile(error, 0.95) <= 4.0  # two pixels


def test_carrying_back_view_zero_changes_nothing() -> None:
    images_NHWC = noise()[None]
    ((_, map_NHW),) = geometric().views(images_NHWC, ["a"], 1, maps=True)
    assert map_NHW is not None
    values_CHW = torch.rand(3, 70, 90)
    sums_CHW, counts_HW = carry_back(values_CHW, torch.from_numpy(map_NHW[0].copy()))
    assert torch.equal(sums_CHW, values_CHW)
    assert (counts_HW == 1).all()


def test_concurrent_first_uses_do_not_wait_for_each_other_forever() -> None:
    policy = Policy.from_dict(geometric().to_dict())
    done: list[Any] = []
    threads = [
        threading.Thread(target=lambda: done.append(policy.apply(noise(), image_id="a", view=1)), daemon=True)
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(done) == 4
