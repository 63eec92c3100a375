"""Predictors against torchvision's own transforms and eager float32 network, on real photographs."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import nn
from torchvision.models import MobileNet_V2_Weights

from photographs import LIMITS, packaged_photographs
from winnow.config import TaskConfig
from winnow.errors import CallError
from winnow.images import View, decode
from winnow.models.loading import load, load_network
from winnow.models.predictors import FUSION_TOLERANCE, Predictor, choose_precision, fuse, has_native_bfloat16
from winnow.models.references import ResolvedModel, resolve
from winnow.uncertainty import is_answered, margin, softmax

NUM_TEST_PHOTOGRAPHS = 60
LOGITS_TOLERANCE = 1e-3
"""Largest difference of logits, which here reach 30; measured: below 1e-4."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other are slow on a machine that does other work too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def decoded(files: list[bytes], view: View, *, scaled: bool = False) -> NDArray[np.uint8]:
    return np.stack([decode(data, limits=LIMITS, views=(view,), scaled=scaled).views[0] for data in files])


@pytest.fixture
def mobilenet(torch_home: Path) -> ResolvedModel:
    return resolve(TaskConfig(model="torchvision/mobilenet_v2@IMAGENET1K_V1"), base_dir=Path())


def answers(predictor: Predictor, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Of the only model."""
    (found,) = predictor.predict(images).values()
    return found  # type: ignore[no-any-return]


def whole(model: ResolvedModel) -> nn.Module:
    """The network as torchvision has it, its parts put together again."""
    network = load_network(model)
    assert network.head is not None
    return nn.Sequential(network.backbone, network.head)


class Tiny(nn.Module):
    """Two logits, from the mean colour; infinite for black images."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        means = images.mean(dim=(1, 2, 3))
        return torch.stack([torch.log(means), -means], dim=1)


def tiny_model(side: int = 8) -> ResolvedModel:
    return ResolvedModel(
        id="tiny.pth#0",
        source="checkpoint",
        architecture="torchvision/tiny",
        weights="tiny.pth",
        location="",
        sha256="",
        classes=("light", "dark"),
        view=View(resize=side, crop=(side, side)),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )


def tiny() -> Predictor:
    return Predictor({"tiny": tiny_model()}, Tiny(), {"tiny": None})


def test_logits_are_divided_by_the_temperature() -> None:
    images = np.stack([np.full((8, 8, 3), value, np.uint8) for value in (20, 90, 200)])
    predictor = Predictor({"tiny": dataclasses.replace(tiny_model(), temperature=2.5)}, Tiny(), {"tiny": None})
    (logits,) = tiny().outputs(images).values()
    np.testing.assert_array_equal(answers(predictor, images), softmax(logits / 2.5))
    np.testing.assert_array_equal(answers(tiny(), images), softmax(logits))


def test_answers_agree_with_torchvision_on_real_photographs(shared_data: Path, mobilenet: ResolvedModel) -> None:
    paths = sorted((shared_data / "classification" / "test").rglob("*.jpg"))
    chosen = paths[:: len(paths) // NUM_TEST_PHOTOGRAPHS]
    files = [*packaged_photographs().values(), *(path.read_bytes() for path in chosen)]
    assert len(files) > NUM_TEST_PHOTOGRAPHS
    network = whole(mobilenet)
    transforms = MobileNet_V2_Weights.IMAGENET1K_V1.transforms()
    with torch.inference_mode():
        pictures = [ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB") for data in files]
        expected = torch.cat([network(transforms(picture).unsqueeze(0)) for picture in pictures]).numpy()
    (got,) = load(mobilenet).outputs(decoded(files, mobilenet.view)).values()

    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=LOGITS_TOLERANCE, rtol=0)
    differs = got.argmax(axis=1) != expected.argmax(axis=1)
    assert differs.mean() <= 0.01
    assert (margin(softmax(expected))[differs] < 0.05).all()
    assert np.abs(softmax(got) - softmax(expected)).max() < 1e-4


def test_scaled_decoding_costs_little(mobilenet: ResolvedModel) -> None:
    files = []
    for data in packaged_photographs().values():
        picture, stream = Image.open(io.BytesIO(data)).convert("RGB"), io.BytesIO()
        picture.resize((picture.width * 3, picture.height * 3), Image.Resampling.BICUBIC).save(
            stream, "JPEG", quality=92
        )
        files.append(stream.getvalue())
    predictor = load(mobilenet)
    full = answers(predictor, decoded(files, mobilenet.view))
    scaled_pixels = decoded(files, mobilenet.view, scaled=True)
    assert (scaled_pixels != decoded(files, mobilenet.view)).any()
    scaled = answers(predictor, scaled_pixels)
    differs = scaled.argmax(axis=1) != full.argmax(axis=1)
    assert (margin(full)[differs] < 0.05).all()
    assert np.abs(scaled - full).max() < 0.1


def test_cat_and_espresso_are_recognised(shared_data: Path, mobilenet: ResolvedModel) -> None:
    files = packaged_photographs()
    lite = TaskConfig(
        model=str(shared_data / "weights" / "tf_efficientnet_lite0.timm.safetensors"),
        architecture="timm/tf_efficientnet_lite0",
        classes=mobilenet.classes,
    )
    for model in (mobilenet, resolve(lite, base_dir=Path())):
        best = answers(load(model), decoded([files["chelsea"], files["coffee"]], model.view)).argmax(axis=1)
        cat, coffee = (model.classes[index] for index in best)
        assert "cat" in cat.lower() or "tabby" in cat
        assert coffee == "espresso"


def test_batches_and_their_order_do_not_matter(mobilenet: ResolvedModel) -> None:
    images = decoded(list(packaged_photographs().values()), mobilenet.view)
    images = np.concatenate([images, images[::-1]])  # 14: whole chunks and a part of one
    predictor = load(mobilenet)
    together = answers(predictor, images)
    np.testing.assert_allclose(together[:7], together[7:][::-1], atol=1e-5)
    np.testing.assert_allclose(answers(predictor, images[3:4]), together[3:4], atol=1e-5)
    np.testing.assert_allclose(together.sum(axis=1), 1.0, rtol=1e-5)


def test_bfloat16_answers_the_same_on_clear_photographs(mobilenet: ResolvedModel) -> None:
    images = decoded([packaged_photographs()["coffee"]], mobilenet.view)
    exact, rough = (answers(load(mobilenet, precision=precision), images) for precision in ("float32", "bfloat16"))
    assert rough.dtype == np.float32
    assert rough.argmax() == exact.argmax()
    assert 0 < np.abs(rough - exact).max() < 0.2


def test_image_without_a_finite_answer_spoils_no_other() -> None:
    predictor = tiny()
    images = np.full((20, 8, 8, 3), 100, dtype=np.uint8)
    images[[2, 11]] = 0
    probabilities = answers(predictor, images)
    assert np.flatnonzero(~is_answered(probabilities)).tolist() == [2, 11]
    assert np.isnan(probabilities[[2, 11]]).all()
    np.testing.assert_array_equal(probabilities[0], probabilities[19])


def test_pixels_of_arrow_need_not_be_writable() -> None:
    images = np.full((2, 8, 8, 3), 100, dtype=np.uint8)
    images.flags.writeable = False
    assert is_answered(answers(tiny(), images)).all()
    flipped = np.full((2, 8, 8, 3), 100, dtype=np.uint8)[:, ::-1, ::-1]
    assert is_answered(answers(tiny(), flipped)).all()


@pytest.mark.parametrize(
    "images",
    [np.zeros((1, 8, 8, 3)), *(np.zeros(shape, np.uint8) for shape in ((8, 8, 3), (1, 3, 8, 8), (1, 9, 8, 3)))],
)
def test_other_shapes_and_types_are_refused(images: NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match=r"takes images as uint8 \(N, 8, 8, 3\)"):
        tiny().predict(images)


def test_folding_keeps_the_logits(mobilenet: ResolvedModel) -> None:
    network = whole(mobilenet)
    fused = fuse(network, 224, 224)
    assert any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    images = torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = network(images)
        assert (fused(images) - expected).abs().max() <= FUSION_TOLERANCE * expected.abs().max()


class Branching(nn.Module):
    """Cannot be traced: what it does depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.normalisation = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.normalisation(self.convolution(images)).mean(dim=(2, 3))
        return features if features.sum() > 0 else -features


def test_network_that_cannot_be_traced_is_kept() -> None:
    network = Branching().eval()
    assert fuse(network, 8, 8) is network


@pytest.mark.parametrize(
    ("precision", "device", "said"),
    [("float16", "cpu", "for GPUs only"), ("auto", "gpu", "is unknown"), ("auto", "cuda:99", "is not there")],
)
def test_unusable_precision_or_device_is_a_wrong_call(precision: str, device: str, said: str) -> None:
    with pytest.raises(CallError, match=said):
        choose_precision(precision, device)  # type: ignore[arg-type]


def test_auto_is_float32_on_a_cpu() -> None:
    assert choose_precision("auto", "cpu") == "float32"
    assert isinstance(has_native_bfloat16(), bool)
