"""References: what resolves to which weights, and what is refused and how."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm.data
import torch
import torchvision.models
from torch import nn

from winnow.config import TaskConfig
from winnow.errors import CallError, FetchError, JobError
from winnow.images import View
from winnow.models import references
from winnow.models.architectures import find_preset
from winnow.models.references import ResolvedModel, resolve, resolve_cached

ARCHITECTURE = "torchvision/mobilenet_v3_small"
CLASSES = ("cat", "dog", "other")


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return torchvision.models.mobilenet_v3_small(num_classes=len(CLASSES)).state_dict()


def task(model: str, **fields: Any) -> TaskConfig:
    return TaskConfig(model=model, **fields)


def checkpoint(name: str, **fields: Any) -> TaskConfig:
    return TaskConfig(**{"model": name, "architecture": ARCHITECTURE, "classes": CLASSES, **fields})


# ---------------------------------------------------------------------------------------------------------- torchvision


@pytest.mark.parametrize("kind", ["classification", "embedding"])
def test_crop_says_how_much_of_an_image_is_seen_and_is_another_answerer(kind: str) -> None:
    reference = "torchvision/mobilenet_v2@IMAGENET1K_V1"
    model = resolve(task(reference, kind=kind, crop=1.0), base_dir=Path())
    assert (model.id, model.view) == (f"{reference}~crop1", View(resize=224, crop=(224, 224)))
    assert resolve(task(reference, kind=kind, crop=0.875), base_dir=Path()).view.resize == 256
    backbone = references.resolve_backbone(task(reference, classes=CLASSES, crop=1.0), base_dir=Path())
    assert (backbone.id, backbone.view.resize) == (f"{reference}~crop1", 224)


def test_crop_where_it_means_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="crop = 1 is not for segmentation"):
        task("torchvision/lraspp_mobilenet_v3_large", kind="segmentation", crop=1.0)
    with pytest.raises(ValueError, match="crop"):
        task("torchvision/mobilenet_v2", crop=1.2)


def test_torchvision_reference_names_exact_weights() -> None:
    model = resolve(task("torchvision/mobilenet_v2@IMAGENET1K_V1"), base_dir=Path())
    weights = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1
    assert model.id == "torchvision/mobilenet_v2@IMAGENET1K_V1"
    assert (model.architecture, model.weights) == ("torchvision/mobilenet_v2", "IMAGENET1K_V1")
    assert (model.location, model.sha256) == (weights.url, "b0353104")
    assert model.classes == tuple(weights.meta["categories"])
    assert model.view == View(resize=256, crop=(224, 224), interpolation="bilinear")
    assert (model.mean, model.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_published_hash_is_that_of_the_file(shared_data: Path) -> None:
    model = resolve(task("torchvision/mobilenet_v2@IMAGENET1K_V1"), base_dir=Path())
    content = (shared_data / "weights" / model.location.rsplit("/", 1)[-1]).read_bytes()
    assert hashlib.sha256(content).hexdigest().startswith(model.sha256)


@pytest.mark.parametrize("reference", ["torchvision/mobilenet_v2", "torchvision/mobilenet_v2@DEFAULT"])
def test_default_weights_get_their_real_name(reference: str) -> None:
    model = resolve(task(reference), base_dir=Path())
    assert model.id == "torchvision/mobilenet_v2@IMAGENET1K_V2"
    assert model.view.resize == 232


def test_all_torchvision_classifiers_resolve() -> None:
    names = torchvision.models.list_models(module=torchvision.models)
    assert len(names) > 60
    without_classes = []
    for name in names:
        for weights in torchvision.models.get_model_weights(name):
            preset = find_preset(f"torchvision/{name}@{weights.name}")
            if preset.num_classes == 0:
                without_classes.append(preset.reference)
                continue
            assert len(set(preset.classes)) == preset.num_classes == 1000
            assert len(preset.sha256) >= 8
            assert preset.view.crop is not None
    assert without_classes == ["torchvision/vgg16@IMAGENET1K_FEATURES"]


def test_classes_rename_the_outputs() -> None:
    names = tuple(f"class {number}" for number in range(1000))
    model = resolve(task("torchvision/mobilenet_v2", classes=names), base_dir=Path())
    assert model.classes == names


# ----------------------------------------------------------------------------------------------------------------- timm


@pytest.mark.parametrize(
    "name", ["tf_efficientnet_lite0", "legacy_xception", "resnet50", "convnext_tiny", "eva02_base_patch14_448"]
)
def test_timm_geometry_is_that_of_its_transform(name: str) -> None:
    preset = find_preset(f"timm/{name}")
    config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    resize, crop, _, normalise = timm.data.create_transform(**config).transforms
    wanted = preset.view.resize
    assert (
        resize.size == (wanted if isinstance(wanted, int) else list(wanted or ()) or None)
        or tuple(resize.size) == wanted
    )
    assert tuple(crop.size) == preset.view.crop
    assert resize.interpolation.value == preset.view.interpolation
    assert normalise.mean.tolist() == pytest.approx(preset.mean)
    assert normalise.std.tolist() == pytest.approx(preset.std)


def test_timm_classes_are_distinct() -> None:
    preset = find_preset("timm/tf_efficientnet_lite0.in1k")
    assert preset.reference == "timm/tf_efficientnet_lite0.in1k"
    assert len(set(preset.classes)) == 1000
    assert [name for name in preset.classes if name.startswith("crane")] == ["crane (n02012849)", "crane (n03126707)"]


def test_timm_model_outside_the_hub_resolves_without_a_network() -> None:
    model = resolve(task("timm/legacy_xception"), base_dir=Path())
    assert model.id == "timm/legacy_xception.tf_in1k"
    assert model.sha256 == "43020ad28"
    assert model.view == View(resize=333, crop=(299, 299), interpolation="bicubic")


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model": "torchvision/mobilnet_v2"}, "did you mean mobilenet_v2"),
        ({"model": "torchvision/mobilenet_v2@V9"}, "choose IMAGENET1K_V1, IMAGENET1K_V2"),
        ({"model": "torchvision/"}, "torchvision/NAME"),
        ({"model": "torchvision/fcn_resnet50"}, "answers with masks"),
        ({"model": "torchvision/fasterrcnn_resnet50_fpn"}, "not an image classifier"),
        ({"model": "torchvision/r3d_18"}, "not an image classifier"),
        ({"model": "torchvision/vgg16@IMAGENET1K_FEATURES"}, "not a classifier"),
        ({"model": "torchvision/mobilenet_v2", "classes": CLASSES}, "3 classes are given, but .* has 1000 outputs"),
        ({"model": "torchvision/mobilenet_v2", "architecture": ARCHITECTURE}, "for checkpoints only"),
        ({"model": "timm/resnet5O"}, "did you mean resnet50"),
        ({"model": "timm/resnet50.imagenet"}, "tags of resnet50: a1_in1k"),
        ({"model": "timm/vit_base_patch16_224.mae"}, "not a classifier"),
        ({"model": "keras/resnet50"}, "write torchvision/NAME"),
        ({"model": "model.onnx"}, r"\.safetensors, \.pth\.tar, \.pth, \.pt"),
        ({"model": "model.pth"}, "lacks architecture and classes"),
        ({"model": "model.pth", "architecture": ARCHITECTURE}, "lacks classes;"),
        ({"model": "model.pth", "architecture": ARCHITECTURE, "classes": CLASSES}, "does not exist"),
        ({"model": "model.pth", "architecture": "resnet50", "classes": CLASSES}, "write torchvision/NAME or timm/NAME"),
        ({"model": "model.pth", "architecture": "torchvision/inception_v3", "classes": CLASSES}, "second time"),
        ({"model": "https://me:secret@host/model.pth"}, "holds credentials"),
        ({"model": "https://host/model.pth?X-Amz-Signature=abc"}, "holds credentials"),
        (
            {"model": "https://host/model.pth", "architecture": ARCHITECTURE, "classes": CLASSES},
            "nothing here reads URLs",
        ),
    ],
)
def test_wrong_reference_is_a_wrong_call(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(CallError, match=said) as caught:
        resolve(TaskConfig(**fields), base_dir=tmp_path)
    assert "secret" not in str(caught.value)
    assert "abc" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def test_checkpoint_takes_geometry_from_its_architecture(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    safetensors.torch.save_file(state, tmp_path / "pets.safetensors")
    model = resolve(checkpoint("pets.safetensors"), base_dir=tmp_path)
    sha256 = hashlib.sha256((tmp_path / "pets.safetensors").read_bytes()).hexdigest()
    assert model.id == f"pets.safetensors#{sha256[:12]}"
    assert (model.sha256, model.classes) == (sha256, CLASSES)
    assert model.location == str(tmp_path.resolve() / "pets.safetensors")
    assert model.view == View(resize=256, crop=(224, 224), interpolation="bilinear")
    named = checkpoint("pets.safetensors", architecture="torchvision/mobilenet_v3_small@IMAGENET1K_V1")
    assert resolve(named, base_dir=tmp_path) == model


def test_resolved_model_survives_json(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    safetensors.torch.save_file(state, tmp_path / "pets.safetensors")
    for model in (
        resolve(checkpoint("pets.safetensors"), base_dir=tmp_path),
        resolve(task("timm/legacy_xception"), base_dir=tmp_path),
    ):
        assert ResolvedModel.from_json(model.to_json()) == model
        assert "\n" not in model.to_json()
    for text in ("{}", '{"view": 3}', "[]", "no"):
        with pytest.raises(ValueError):  # noqa: PT011
            ResolvedModel.from_json(text)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_training_scripts_wrappings_are_understood(
    wrapper: str | None, prefix: str, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    content: dict[str, Any] = {prefix + key: value for key, value in state.items() if "num_batches_tracked" not in key}
    if wrapper is not None:
        content = {wrapper: content, "epoch": 90, "best_acc1": torch.tensor(71.2), "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "best.pth.tar")
    assert resolve(checkpoint("best.pth.tar"), base_dir=tmp_path).classes == CLASSES


def test_misfit_names_the_keys(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    changed = dict(state)
    changed["extra.weight"] = torch.zeros(1)
    del changed["features.0.0.weight"]
    changed["classifier.0.bias"] = torch.zeros(7)
    torch.save(changed, tmp_path / "odd.pth")
    with pytest.raises(CallError) as caught:
        resolve(checkpoint("odd.pth"), base_dir=tmp_path)
    for said in ("missing: features.0.0.weight", "unexpected: extra.weight", "classifier.0.bias is (7,), not (1024,)"):
        assert said in str(caught.value)


def test_wrong_number_of_classes_says_how_many(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    safetensors.torch.save_file(state, tmp_path / "pets.safetensors")
    with pytest.raises(CallError, match="has 3 outputs, but 2 classes are given"):
        resolve(checkpoint("pets.safetensors", classes=("cat", "dog")), base_dir=tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\xff\xd8 no" * 99]
)
def test_damaged_file_is_refused(
    name: str, damage: Callable[[bytes], bytes], state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    stream = io.BytesIO()
    torch.save(state, stream)
    whole = safetensors.torch.save(state) if name.endswith("safetensors") else stream.getvalue()
    (tmp_path / name).write_bytes(damage(whole))
    with pytest.raises(CallError, match=name):
        resolve(checkpoint(name), base_dir=tmp_path)
    with pytest.raises(CallError, match=name):
        resolve(checkpoint(f"https://host/{name}"), base_dir=tmp_path, fetch=lambda _: damage(whole))


@pytest.mark.parametrize("content", [[1, 2], {}, {"state_dict": {}}, {"weights": {"a": 1}}, torch.zeros(3)])
def test_file_without_a_state_dict_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CallError, match="holds no state dict but"):
        resolve(checkpoint("model.pt"), base_dir=tmp_path)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("EVIL_PICKLE",)


@pytest.mark.parametrize("zipped", [True, False, None])
def test_code_in_a_checkpoint_never_runs(
    zipped: bool | None, state: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    if zipped is None:
        Path("model.pth").write_bytes(pickle.dumps(Evil()))
    else:
        torch.save({**state, "evil": Evil()}, "model.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CallError, match=r"is refused: it holds more than tensors.*(posix\.mkdir|operand)"):
        resolve(checkpoint("model.pth"), base_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_hostile_checkpoints_never_run(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = sorted((shared_data / "hostile" / "files" / "made").glob("evil_*"))
    assert paths
    for path in paths:
        copy = tmp_path / f"{path.stem}.pt"
        copy.write_bytes(path.read_bytes())
        with pytest.raises(CallError, match="is refused: it holds more than tensors"):
            resolve(checkpoint(copy.name), base_dir=tmp_path)
    assert not list(tmp_path.glob("EVIL*"))


def test_torchscript_archive_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather not make one
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(tmp_path / "model.pt"))
    with pytest.raises(CallError, match=r"model\.pt"):
        resolve(checkpoint("model.pt"), base_dir=tmp_path)


def test_fault_of_storage_is_told(tmp_path: Path) -> None:
    def refuse(url: str) -> bytes:
        raise FetchError("forbidden", f"{url}: storage refused access (403)")

    with pytest.raises(CallError, match=r"cannot be read: .*403"):
        resolve(checkpoint("s3://bucket/model.pth"), base_dir=tmp_path, fetch=refuse)


# ------------------------------------------------------------------------------------------------------------ the cache


def test_second_resolution_does_not_import_torch(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    safetensors.torch.save_file(state, tmp_path / "pets.safetensors")
    script = """
import sys
from pathlib import Path
from winnow.config import TaskConfig
from winnow.models.references import resolve_cached
folder = Path(sys.argv[1])
for task in (
    TaskConfig(model="torchvision/mobilenet_v2"),
    TaskConfig(model="timm/legacy_xception"),
    TaskConfig(model="pets.safetensors", architecture="torchvision/mobilenet_v3_small", classes=["cat", "dog", "fox"]),
):
    print(resolve_cached(task, cache_dir=folder / "cache", base_dir=folder).to_json())
print("torch" in sys.modules)
"""
    runs = [
        subprocess.run(
            [sys.executable, "-W", "error", "-c", script, str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout.splitlines()
        for _ in range(2)
    ]
    assert runs[0][-1] == "True"
    assert runs[1][-1] == "False"
    assert runs[0][:-1] == runs[1][:-1]


def test_changed_checkpoint_is_resolved_again(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "pets.safetensors"
    ids = []
    for number in range(2):
        state = {**state, "classifier.3.bias": torch.full((3,), float(number))}
        safetensors.torch.save_file(state, path)
        os.utime(path, ns=(number, number))
        ids.append(resolve_cached(checkpoint(path.name), cache_dir=tmp_path / "cache", base_dir=tmp_path).id)
    assert len(set(ids)) == 2
    path.unlink()
    with pytest.raises(CallError, match="does not exist"):
        resolve_cached(checkpoint(path.name), cache_dir=tmp_path / "cache", base_dir=tmp_path)


def test_url_is_read_again_only_when_its_version_changes(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    fetched = []

    def fetch(url: str) -> bytes:
        fetched.append(url)
        return safetensors.torch.save(state)

    url = "s3://bucket/models/pets.safetensors"
    for version in ("etag-1", "etag-1", "etag-2"):
        model = resolve_cached(
            checkpoint(url),
            cache_dir=tmp_path,
            base_dir=tmp_path,
            fetch=fetch,
            version=lambda _, etag=version: str(etag),
        )
    assert fetched == [url, url]
    assert (model.location, model.weights) == (url, "pets.safetensors")
    for _ in range(2):
        resolve_cached(checkpoint(url), cache_dir=tmp_path, base_dir=tmp_path, fetch=fetch)
    assert len(fetched) == 4


def test_damaged_cache_is_ignored_and_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(references.logger, "warning", lambda text, *values: said.append(text % values))
    first = resolve_cached(task("torchvision/mobilenet_v2"), cache_dir=tmp_path, base_dir=tmp_path)
    (kept,) = tmp_path.iterdir()
    kept.write_text(json.dumps({"id": 1}))
    assert resolve_cached(task("torchvision/mobilenet_v2"), cache_dir=tmp_path, base_dir=tmp_path) == first
    assert any(text.startswith(f"ignoring {kept}") for text in said)
    assert list(tmp_path.iterdir()) == [kept]
    assert ResolvedModel.from_json(kept.read_text()) == first


def test_hub_model_resolves_from_its_cache_and_says_what_is_missing(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--timm--mobilenetv3_small_050.lamb_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    torch.manual_seed(0)
    network = timm.create_model("mobilenetv3_small_050").eval()
    safetensors.torch.save_file(network.state_dict(), snapshot / "model.safetensors")
    script = """
import sys
from pathlib import Path
import numpy as np
from winnow.config import TaskConfig
from winnow.models.loading import load
from winnow.models.references import resolve
model = resolve(TaskConfig(model="timm/mobilenetv3_small_050"), base_dir=Path())
images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
np.save(sys.argv[1], load(model).outputs(images)[model.id])
print(model.to_json())
try:
    resolve(TaskConfig(model="timm/resnet50.a1_in1k"), base_dir=Path())
except Exception as error:
    print(type(error).__name__, error)
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(tmp_path / "logits.npy")],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    resolved, refused = done.stdout.splitlines()
    model = ResolvedModel.from_json(resolved)
    assert model.id == "timm/mobilenetv3_small_050.lamb_in1k"
    assert model.location == f"hf://timm/mobilenetv3_small_050.lamb_in1k@{commit}/model.safetensors"
    assert model.sha256 == hashlib.sha256((snapshot / "model.safetensors").read_bytes()).hexdigest()
    assert refused.startswith(JobError.__name__)
    for said in ("timm/resnet50.a1_in1k", "model.safetensors", "models--timm--resnet50.a1_in1k", str(tmp_path / "hub")):
        assert said in refused

    import numpy as np

    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    mean, std = torch.tensor(model.mean), torch.tensor(model.std)
    pixels = ((torch.from_numpy(images) / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.inference_mode():
        expected = network(pixels).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, atol=1e-4)
