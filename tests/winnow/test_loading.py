"""Loading: the right file, whole and unchanged, or a clear error; nothing is unpickled."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import torchvision.models

from winnow.config import TaskConfig
from winnow.errors import CallError, JobError
from winnow.models.checkpoints import read_state_dict
from winnow.models.loading import load, load_network, obtain_weights
from winnow.models.networks import state_of
from winnow.models.references import ResolvedModel, resolve

WEIGHTS = "mobilenet_v2-b0353104.pth"


@pytest.fixture
def mobilenet() -> ResolvedModel:
    return resolve(TaskConfig(model="torchvision/mobilenet_v2@IMAGENET1K_V1"), base_dir=Path())


@pytest.fixture
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    return tmp_path / "torch_home" / "hub" / "checkpoints"


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A folder and the URL under which a real HTTP server shows it."""
    folder = tmp_path / "served"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", folder
    finally:
        server.shutdown()
        thread.join(timeout=10)
        server.server_close()


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_published_weights_load_as_torchvision_loads_them(torch_home: Path, mobilenet: ResolvedModel) -> None:
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    state = {key.split(".", 1)[1]: value for key, value in state_of(load_network(mobilenet)).items()}
    assert os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD") == before
    expected = torch.load(torch_home / "hub" / "checkpoints" / WEIGHTS, weights_only=True)
    state |= {f"classifier.1.{key}": state.pop(key) for key in ("weight", "bias")}  # the head
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], value) for key, value in expected.items())


def test_weights_that_cannot_be_downloaded_say_where_to_put_them(empty_home: Path, mobilenet: ResolvedModel) -> None:
    unreachable = dataclasses.replace(mobilenet, location=f"http://127.0.0.1:{closed_port()}/models/{WEIGHTS}")
    with pytest.raises(JobError) as caught:
        load(unreachable)
    for said in (WEIGHTS, str(empty_home), "127.0.0.1", "TORCH_HOME", mobilenet.id):
        assert said in str(caught.value)


def test_weights_are_downloaded_once_and_checked(
    shared_data: Path, served: tuple[str, Path], empty_home: Path, mobilenet: ResolvedModel
) -> None:
    url, folder = served
    shutil.copyfile(shared_data / "weights" / WEIGHTS, folder / WEIGHTS)
    local = dataclasses.replace(mobilenet, location=f"{url}/{WEIGHTS}")
    assert obtain_weights(local) == empty_home / WEIGHTS
    (folder / WEIGHTS).unlink()
    assert obtain_weights(local) == empty_home / WEIGHTS
    assert load(local).predict(np.zeros((1, 224, 224, 3), dtype=np.uint8))[local.id].shape == (1, 1000)


def test_damaged_download_leaves_nothing_behind(
    served: tuple[str, Path], empty_home: Path, mobilenet: ResolvedModel
) -> None:
    url, folder = served
    (folder / WEIGHTS).write_bytes(b"not the weights")
    with pytest.raises(JobError, match="not b0353104"):
        load(dataclasses.replace(mobilenet, location=f"{url}/{WEIGHTS}"))
    assert list(empty_home.iterdir()) == []


def test_damaged_file_in_the_cache_is_named(empty_home: Path, mobilenet: ResolvedModel) -> None:
    empty_home.mkdir(parents=True)
    (empty_home / WEIGHTS).write_bytes(b"half of it")
    with pytest.raises(JobError, match=f"{WEIGHTS} is damaged.*delete it"):
        load(mobilenet)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("EVIL_PICKLE",)


def test_code_in_published_weights_never_runs(
    empty_home: Path, mobilenet: ResolvedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    empty_home.mkdir(parents=True)
    torch.save({"evil": Evil()}, empty_home / WEIGHTS)
    sha256 = hashlib.sha256((empty_home / WEIGHTS).read_bytes()).hexdigest()
    with pytest.raises(JobError, match="does not hold the weights"):
        load(dataclasses.replace(mobilenet, sha256=sha256))
    assert not Path("EVIL_PICKLE").exists()


def test_checkpoint_from_a_url_answers_as_its_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = torchvision.models.mobilenet_v3_small(num_classes=3).eval()
    content = safetensors.torch.save(network.state_dict())
    task = TaskConfig(
        model="s3://bucket/pets.safetensors", architecture="torchvision/mobilenet_v3_small", classes=("a", "b", "c")
    )
    model = ResolvedModel.from_json(resolve(task, base_dir=tmp_path, fetch=lambda _: content).to_json())
    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    mean, std = torch.tensor(model.mean), torch.tensor(model.std)
    with torch.inference_mode():
        expected = network(((torch.from_numpy(images) / 255 - mean) / std).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(load(model, fetch=lambda _: content).outputs(images)[model.id], expected, atol=1e-4)
    (tmp_path / "copy").write_bytes(content)
    np.testing.assert_allclose(
        load(model, fetch=lambda _: tmp_path / "copy").outputs(images)[model.id], expected, atol=1e-4
    )
    with pytest.raises(JobError, match="has changed"):
        load(model, fetch=lambda _: content + b" ")
    with pytest.raises(CallError, match="nothing here reads URLs"):
        load(model)


def test_checkpoint_that_changed_or_vanished_is_told(tmp_path: Path) -> None:
    path = tmp_path / "pets.pth"
    torch.save(torchvision.models.mobilenet_v3_small(num_classes=2).state_dict(), path)
    task = TaskConfig(model="pets.pth", architecture="torchvision/mobilenet_v3_small", classes=("a", "b"))
    model = resolve(task, base_dir=tmp_path)
    torch.save(torchvision.models.mobilenet_v3_small(num_classes=2).state_dict(), path)
    with pytest.raises(JobError, match=r"pets\.pth has changed"):
        load(model)
    path.unlink()
    with pytest.raises(CallError, match="not on this machine"):
        load(model)


def test_ctrl_c_while_a_file_is_read_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "small.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(2)}, path)
    read = safetensors.torch.load_file

    def interrupted(path: Path) -> dict[str, torch.Tensor]:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:  # as the native code does, in the middle of a tensor
            raise safetensors.SafetensorError("could not determine the shape") from None
        return read(path)

    monkeypatch.setattr(safetensors.torch, "load_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read_state_dict(path, path.name)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
