from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from reviewed import Reviewed

if TYPE_CHECKING:
    from winnow_connectors.label_studio import LabelStudio
    from winnow_jobs.local_label_studio import LocalLabelStudio


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    """One Ray on 2 CPUs for the whole module; jobs of this process join it."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def cached_weights(torch_home_folder: Path) -> Iterator[None]:
    """The weights are in torch's cache, for workers too: this comes before Ray starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(torch_home_folder))
        yield


@pytest.fixture
def reviewed(
    tmp_path: Path,
    label_studio: LabelStudio,
    label_studio_server: LocalLabelStudio,
    monkeypatch: pytest.MonkeyPatch,
) -> Reviewed:
    """On local disk, in a folder that Label Studio may show."""
    root = label_studio_server._files()
    place = root / re.sub(r"\W", "", tmp_path.name)
    (tmp_path / "images").mkdir()
    monkeypatch.setenv("LABEL_STUDIO_URL", label_studio.url)
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", label_studio_server.token)
    monkeypatch.setenv("LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT", str(root))
    return Reviewed(tmp_path, label_studio, warehouse=str(place), images=(tmp_path / "images").as_uri())
