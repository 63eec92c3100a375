"""Features, maps and masks against torchvision's and timm's own eager networks, on real photographs."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision.models
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional

from photographs import LIMITS, packaged_photographs
from winnow.config import TaskConfig
from winnow.errors import CallError
from winnow.images import decode
from winnow.models.assembly import assemble
from winnow.models.checkpoints import read_state_dict
from winnow.models.loading import load, load_all, load_network
from winnow.models.networks import Network, PyramidHead, RmsLinear, maps_of, pyramid_channels, state_of
from winnow.models.references import ResolvedModel, resolve, resolve_backbone

TOLERANCE = 1e-4
"""Largest difference of outputs, relative to the largest one; measured: below 1e-5."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def save(folder: Path, network: nn.Module, **task: Any) -> ResolvedModel:
    """The network as a checkpoint, resolved as a task would name it."""
    path = folder / f"{len(list(folder.iterdir()))}.safetensors"
    safetensors.torch.save_file({key: tensor.contiguous() for key, tensor in network.state_dict().items()}, path)
    return resolve(TaskConfig(model=path.name, **task), base_dir=folder)


def pixels(model: ResolvedModel) -> tuple[NDArray[np.uint8], list[tuple[int, int]], torch.Tensor]:
    """Photographs as the model sees them: uint8 NHWC, the sizes of their sources, and normalised NCHW."""
    images = [decode(data, limits=LIMITS, views=(model.view,)) for data in packaged_photographs().values()]
    images_NHWC = np.stack([image.views[0] for image in images])
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (model.mean, model.std))
    images_NCHW = (torch.from_numpy(images_NHWC).permute(0, 3, 1, 2) / 255 - mean) / std
    return images_NHWC, [(image.width, image.height) for image in images], images_NCHW


def assert_close(got: NDArray[np.float32], expected: torch.Tensor) -> None:
    limit = TOLERANCE * max(1.0, float(expected.abs().max()))
    np.testing.assert_allclose(got, expected.numpy(), atol=limit, rtol=0)


# ---------------------------------------------------------------------------------------------------------- embeddings


def test_embeddings_are_the_features_before_the_classifier(torch_home: Path) -> None:
    model = resolve(TaskConfig(kind="embedding", model="torchvision/mobilenet_v2@IMAGENET1K_V1"), base_dir=Path())
    images, _, normalised = pixels(model)
    network = torchvision.models.mobilenet_v2(weights="IMAGENET1K_V1").eval()
    with torch.inference_mode():
        expected = network.features(normalised).mean(dim=(2, 3))
    predictor = load(model)
    assert_close(predictor.outputs(images)[model.id], expected)
    vectors = predictor.predict(images)[model.id]
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-6)
    cosines = (vectors * nn.functional.normalize(expected).numpy()).sum(axis=1)
    assert cosines.min() >= 0.99999


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_convnext"])
def test_embeddings_of_timm_are_its_own_features(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=7).eval()
    model = save(tmp_path, network, kind="embedding", architecture=f"timm/{name}")
    images, _, normalised = pixels(model)
    with torch.inference_mode():
        expected = network.forward_head(network.forward_features(normalised), pre_logits=True)
    assert model.classes == ()
    assert_close(load(model).outputs(images)[model.id], expected)


def test_every_kind_of_torchvision_classifier_has_features(tmp_path: Path) -> None:
    for number, name in enumerate(("resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "regnet_y_400mf")):
        torch.manual_seed(number)
        network = torchvision.models.get_model(name, num_classes=5).eval()
        model = save(tmp_path, network, kind="embedding", architecture=f"torchvision/{name}")
        assert load_network(model).head is None
    with pytest.raises(CallError, match="does not end in one linear layer"):
        save(tmp_path, torchvision.models.squeezenet1_1(), kind="embedding", architecture="torchvision/squeezenet1_1")


def test_a_backbone_without_classes_embeds(tmp_path: Path) -> None:
    """Such as the published image towers of CLIP and DINO in timm."""
    model = ResolvedModel.from_json(
        resolve(
            TaskConfig(
                kind="embedding",
                model=str(_save_state(tmp_path / "tower.safetensors", timm.create_model("test_vit", num_classes=0))),
                architecture="timm/test_vit",
            ),
            base_dir=tmp_path,
        ).to_json()
    )
    images, _, _ = pixels(model)
    assert load(model).predict(images)[model.id].shape == (len(images), 64)


def _save_state(path: Path, network: nn.Module) -> Path:
    safetensors.torch.save_file({key: tensor.contiguous() for key, tensor in network.state_dict().items()}, path)
    return path


# ----------------------------------------------------------------------------------------------------- shared backbones


class Counted(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.num_images = inner, 0

    def forward(self, images: torch.Tensor) -> Any:
        self.num_images += len(images)
        return self.inner(images)


def test_tasks_with_one_backbone_run_it_once_and_answer_as_alone(torch_home: Path, tmp_path: Path) -> None:
    reference = "torchvision/mobilenet_v2@IMAGENET1K_V1"
    objects = resolve(TaskConfig(model=reference), base_dir=Path())
    embedding = resolve(TaskConfig(kind="embedding", model=reference), base_dir=Path())
    torch.manual_seed(0)
    own = Network(load_network(embedding).backbone, nn.Linear(1280, 3))
    path = tmp_path / "garments.safetensors"
    safetensors.torch.save_file(state_of(own), path)
    garments = resolve(
        TaskConfig(model=path.name, architecture="torchvision/mobilenet_v2", classes=("a", "b", "c")), base_dir=tmp_path
    )
    assert garments.head == "linear"
    # The architecture's default weights are of another generation, with another view than the head was trained with.
    garments = ResolvedModel.from_json(garments.to_json().replace('"resize": 232', '"resize": 256'))
    models = {"objects": objects, "alike": embedding, "garments": garments}
    (together,) = load_all(models)
    together._backbone = counted = Counted(together._backbone)
    images, _, _ = pixels(objects)
    answers = together.predict(images)
    assert counted.num_images == len(images)
    for name, model in models.items():
        np.testing.assert_allclose(answers[name], load(model).predict(images)[model.id], atol=1e-6)


def test_a_head_on_scaled_features_is_told_by_its_keys(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = timm.create_model("test_resnet", num_classes=0)
    own = Network(backbone, RmsLinear(backbone.num_features, 3)).eval()
    path = tmp_path / "scaled.safetensors"
    safetensors.torch.save_file(state_of(own), path)
    model = resolve(
        TaskConfig(model=path.name, architecture="timm/test_resnet", classes=("a", "b", "c")), base_dir=tmp_path
    )
    assert model.head == "rms_linear"
    images, _, normalised = pixels(model)
    with torch.inference_mode():
        expected = torch.softmax(own.head(own.backbone(normalised)), dim=1).numpy()
    np.testing.assert_allclose(load(model).predict(images)[model.id], expected, atol=1e-5)
    # As a start for other classes the head is gone, and with it what kind it was.
    other = TaskConfig(model=path.name, architecture="timm/test_resnet", classes=("x", "y"))
    start = resolve_backbone(other, base_dir=tmp_path)
    assert (start.head, start.output) == ("", "features")
    assert load_network(start).head is None
    # The other kind of head does not fit.
    wrong = {key: tensor for key, tensor in state_of(own).items() if key != "head.linear.bias"}
    safetensors.torch.save_file(wrong, path)
    with pytest.raises(CallError, match=r"the head in scaled\.safetensors does not fit"):
        resolve(
            TaskConfig(model=path.name, architecture="timm/test_resnet", classes=("a", "b", "c")), base_dir=tmp_path
        )


def test_tasks_with_other_weights_or_pixels_share_nothing(tmp_path: Path) -> None:
    networks = [timm.create_model("test_resnet", num_classes=5) for _ in range(2)]
    models = [save(tmp_path, network, kind="embedding", architecture="timm/test_resnet") for network in networks]
    assert len(load_all({"one": models[0], "two": models[1], "three": models[0]})) == 2


# ---------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "fcn_resnet50", "deeplabv3_mobilenet_v3_large"])
def test_masks_are_those_of_torchvision(name: str, tmp_path: Path) -> None:
    classes = ("background", "one", "two", "three")
    torch.manual_seed(0)
    network = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=4).eval()
    model = save(tmp_path, network, kind="segmentation", architecture=f"torchvision/{name}", classes=classes, size=96)
    assert model.view.fit == (96, 96)
    images, sizes, normalised = pixels(model)
    images, sizes, normalised = images[:3], sizes[:3], normalised[:3]
    with torch.inference_mode():
        expected = network(normalised)["out"]
    predictor = load(model)
    assert_close(predictor.outputs(images)[model.id], expected)
    probabilities = expected.softmax(dim=1)
    for number, mask in enumerate(predictor.predict(images, sizes)[model.id]):
        width, height = model.view.target(*sizes[number])
        shown = probabilities[number, :, :height, :width]
        agrees = mask.labels_HW == shown.argmax(dim=0).numpy()
        assert agrees.mean() >= 0.995
        for value in np.unique(mask.labels_HW):
            where = torch.from_numpy(mask.labels_HW == value)
            assert mask.confidence_C[value] == pytest.approx(float(shown.max(dim=0).values[where].mean()), abs=1e-4)
            entropy = -(shown * shown.log()).sum(dim=0)
            assert mask.entropy_C[value] == pytest.approx(float(entropy[where].mean()), abs=1e-4)
        assert np.isnan(mask.confidence_C[sorted(set(range(4)) - set(np.unique(mask.labels_HW).tolist()))]).all()


def test_images_are_fitted_as_torchvision_resizes_and_pads(tmp_path: Path) -> None:
    network = torchvision.models.get_model(
        "lraspp_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=2
    )
    model = save(
        tmp_path,
        network,
        kind="segmentation",
        architecture="torchvision/lraspp_mobilenet_v3_large",
        classes=("a", "b"),
        size=128,
    )
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (67, 301, 3), dtype=np.uint8))
    assert model.view.target(301, 67) == (128, 28)  # 67 · 128 / 301 = 28.49…
    resized = functional.resize(picture, [28, 128], antialias=True)
    expected = functional.pad(resized, [0, 0, 0, 100], fill=list(model.view.fill))
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    got = decode(stream.getvalue(), limits=LIMITS, views=(model.view,)).views[0]
    np.testing.assert_array_equal(got, np.asarray(expected))


def test_an_image_that_is_not_finite_spoils_no_other_mask(tmp_path: Path) -> None:
    network = torchvision.models.get_model(
        "lraspp_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=2
    )
    model = save(
        tmp_path,
        network,
        kind="segmentation",
        architecture="torchvision/lraspp_mobilenet_v3_large",
        classes=("a", "b"),
        size=64,
    )
    predictor = load(model)

    class Broken(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits = images[:, :2].clone()
            logits[images.mean(dim=(1, 2, 3)) < -1] = torch.nan
            return logits

    predictor._backbone = Broken()
    images = np.full((3, 64, 64, 3), 200, dtype=np.uint8)
    images[1] = 0
    assert [mask is None for mask in predictor.predict(images)[model.id]] == [False, True, False]


@pytest.mark.parametrize(
    "architecture", ["timm/test_resnet", "timm/test_vit", "torchvision/mobilenet_v2", "torchvision/resnet18"]
)
def test_a_light_decoder_on_feature_maps_survives_its_file(architecture: str, tmp_path: Path) -> None:
    library, _, name = architecture.partition("/")
    torch.manual_seed(0)
    network = timm.create_model(name) if library == "timm" else torchvision.models.get_model(name)
    backbone = maps_of(network.eval(), 1000, architecture)
    size = 160
    channels = pyramid_channels(backbone, (size, size))
    made = Network(backbone, PyramidHead(channels, 3)).eval()
    with torch.inference_mode():
        maps = backbone(torch.zeros(1, 3, size, size))
        assert [map_.shape[-1] for map_ in maps] == sorted((map_.shape[-1] for map_ in maps), reverse=True)
        path = tmp_path / "version.safetensors"
        safetensors.torch.save_file(state_of(made), path)
        task = TaskConfig(
            kind="segmentation", model=path.name, architecture=architecture, classes=("a", "b", "c"), size=size
        )
        model = resolve(task, base_dir=tmp_path)
        assert (model.head, model.view.fit) == ("pyramid", (size, size))
        images, sizes, normalised = pixels(model)
        logits = made.head(made.backbone(normalised[:2]))  # type: ignore[misc]
        expected = nn.functional.interpolate(logits, size=(size, size), mode="bilinear", align_corners=False)
    assert_close(load(model).outputs(images[:2])[model.id], expected)
    assert all(mask is not None for mask in load(model).predict(images[:2], sizes[:2])[model.id])


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kind": "segmentation", "model": "torchvision/mobilenet_v2"}, "has no decoder for masks yet; train one"),
        (
            {"kind": "segmentation", "model": "torchvision/lraspp_mobilenet_v3_large@X"},
            "choose COCO_WITH_VOC_LABELS_V1",
        ),
        ({"kind": "segmentation", "model": "torchvision/no_such"}, "no classifier named"),
        ({"kind": "embedding", "model": "torchvision/resnet18", "classes": ("a", "b")}, "an embedding has no classes"),
        ({"kind": "embedding", "model": "torchvision/fcn_resnet50"}, "answers with masks"),
        ({"model": "torchvision/resnet18", "size": 64}, "size = 64 is for segmentation only"),
        ({"model": "torchvision/resnet18", "classes": ("a", "b")}, "train a head for your classes"),
        ({"kind": "embedding", "model": "x.pth"}, "lacks architecture; give architecture"),
    ],
)
def test_a_model_that_does_not_fit_its_kind_is_a_wrong_call(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(CallError, match=said):
        resolve(TaskConfig(**fields), base_dir=tmp_path)


def test_a_whole_classifier_makes_no_masks(tmp_path: Path) -> None:
    with pytest.raises(CallError, match="holds a whole classifier; masks need"):
        save(
            tmp_path,
            timm.create_model("test_resnet", num_classes=2),
            kind="segmentation",
            architecture="timm/test_resnet",
            classes=("a", "b"),
        )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("head.bias"), r"the head in v\.safetensors does not fit.*1 keys are missing: bias"),
        (lambda state: state.pop("backbone.features.0.0.weight"), "the backbone in .*1 keys are missing"),
        (lambda state: state.update({"head.more": torch.zeros(1)}), "1 keys are unexpected: more"),
        (
            lambda state: state.update({"head.weight": torch.zeros(4, 1280)}),
            "is \\(4, 1280\\), not \\(3, 1280\\)|has 4 outputs",
        ),
    ],
)
def test_parts_that_do_not_fit_are_named(change: Any, said: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = TaskConfig(
        kind="embedding",
        model=str(_save_state(tmp_path / "b.safetensors", torchvision.models.mobilenet_v2())),
        architecture="torchvision/mobilenet_v2",
    )
    backbone = load_network(resolve(base, base_dir=tmp_path)).backbone
    state = state_of(Network(backbone, nn.Linear(1280, 3)))
    change(state)
    safetensors.torch.save_file(state, tmp_path / "v.safetensors")
    task = TaskConfig(model="v.safetensors", architecture="torchvision/mobilenet_v2", classes=("a", "b", "c"))
    with pytest.raises(CallError, match=said):
        resolve(task, base_dir=tmp_path)


def test_training_starts_from_features_or_maps(torch_home: Path) -> None:
    reference = "torchvision/mobilenet_v2@IMAGENET1K_V1"
    own = ("shirt", "shoes")
    features = resolve_backbone(TaskConfig(model=reference, classes=own), base_dir=Path())
    assert (features.output, features.classes, features.view.crop) == ("features", (), (224, 224))
    maps = resolve_backbone(TaskConfig(kind="segmentation", model=reference, classes=own, size=256), base_dir=Path())
    assert (maps.output, maps.view.fit, maps.view.fill) == ("maps", (256, 256), (124, 116, 104))
    found = load_network(maps).backbone(torch.zeros(1, 3, 256, 256))
    assert [map_.shape[-1] for map_ in found] == [64, 32, 16, 8]
    with pytest.raises(CallError, match="is a whole segmentation network"):
        resolve_backbone(TaskConfig(kind="segmentation", model="torchvision/fcn_resnet50"), base_dir=Path())


def test_state_of_a_version_reads_back(tmp_path: Path) -> None:
    network = timm.create_model("test_resnet", num_classes=4).eval()
    model = save(tmp_path, network, architecture="timm/test_resnet", classes=("a", "b", "c", "d"))
    parts = load_network(model)
    path = tmp_path / "parts.safetensors"
    safetensors.torch.save_file(state_of(parts), path)
    again = assemble(model, read_state_dict(path, path.name))
    images = torch.randn(2, 3, 160, 160)
    with torch.inference_mode():
        assert torch.equal(again.head(again.backbone(images)), parts.head(parts.backbone(images)))  # type: ignore[misc]
