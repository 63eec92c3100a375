"""The hostile set: every file is decoded as Pillow decodes it, or is a typed failure; none is skipped or does harm."""

from __future__ import annotations

import csv
import hashlib
import io
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from winnow.decoders import Decoded, DecoderPool
from winnow.errors import FAILURE_KINDS
from winnow.image_formats import FAULTS
from winnow.images import DecodeLimits, View

LIMITS = DecodeLimits(max_bytes=50_000_000, max_pixels=50_000_000, timeout_s=60.0)
DEEP = ("I;16", "I;16B", "I;16L", "I", "F")
SIXTEEN_BIT = {
    "made/gray16.png",
    "mode/pillow__16_bit_noise.tif",
    "mode/pillow__16bit.MM.deflate.tif",
    "mode/pillow__9bit.j2k",
}
HARMLESS_BOMBS = {"bomb/pillow__decompression_bomb_extents.gif"}
"""Only a later frame is a bomb, and only first frames are decoded."""


@dataclass(frozen=True)
class Case:
    """One file of the set, what is known about it, and what became of it."""

    name: str
    category: str
    row: dict[str, str]
    data: bytes
    decoded: Decoded


@pytest.fixture(scope="module")
def cases(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Case]]:
    folder = shared_data / "hostile"
    with (folder / "expected.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("hostile"))  # where an unpickled file would leave its mark
        with DecoderPool(2, limits=LIMITS, views=(View(), View(256, (224, 224))), scaled=False) as pool:
            asked = [(row, data, pool.submit(data)) for row in rows for data in [(folder / row["file"]).read_bytes()]]
            outcomes = [
                Case(row["file"].removeprefix("files/"), row["category"], row, data, future.result(300.0))
                for row, data, future in asked
            ]
        yield outcomes


def reference(data: bytes) -> tuple[np.ndarray, str] | None:
    """Pillow's pixels and the mode it found; None where Pillow cannot."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                mode = image.mode
                return np.asarray(ImageOps.exif_transpose(image).convert("RGB")), mode
        except FAULTS:
            return None


def test_every_file_has_exactly_one_outcome(cases: list[Case], shared_data: Path) -> None:
    files = [path for path in (shared_data / "hostile" / "files").rglob("*") if path.is_file()]
    assert len(cases) == len(files) == 290
    categories = Counter(case.category for case in cases)
    assert {"bomb", "truncated", "exif", "mode", "animated", "fuzz", "unsafe_checkpoint"} < set(categories)
    for case in cases:
        assert (case.decoded.image is None) != (case.decoded.error is None), case.name
        assert case.decoded.sha256 == case.row["sha256"] == hashlib.sha256(case.data).hexdigest()


def test_decoded_files_have_pillows_size_orientation_and_pixels(cases: list[Case]) -> None:
    good = [case for case in cases if case.decoded.image is not None]
    assert len(good) > 150
    deep = set()
    for case in good:
        known = reference(case.data)
        assert known is not None, f"{case.name}: Pillow refuses it and we do not"
        pixels, mode = known
        image = case.decoded.image
        assert image is not None
        assert (image.height, image.width) == pixels.shape[:2], case.name
        assert image.format == case.row["format"], case.name
        assert image.views[1].shape == (224, 224, 3)
        if mode in DEEP:
            deep.add(case.name)
            with Image.open(io.BytesIO(case.data)) as source:
                pixels = np.repeat((np.asarray(source) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
        np.testing.assert_array_equal(image.views[0], pixels, err_msg=case.name)
    assert deep == SIXTEEN_BIT


def test_failed_files_say_what_is_wrong(cases: list[Case]) -> None:
    failed = [case for case in cases if case.decoded.error is not None]
    for case in failed:
        error = case.decoded.error
        assert error is not None
        assert error.stage == "decode"
        assert error.kind in FAILURE_KINDS, case.name
        assert 15 < len(error.message) < 400, case.name
        assert " at 0x" not in error.message
        assert "\n" not in error.message
    kinds = Counter(case.decoded.error.kind for case in failed if case.decoded.error)
    # Nothing in the set crashes a decoder, hangs it or fills its memory.
    assert not kinds.keys() & {"crashed", "timeout", "out_of_memory"}, kinds


def test_what_pillow_loads_fails_only_for_a_stated_reason(cases: list[Case]) -> None:
    """A format or a size that we refuse; or the file fails in Pillow too, when it is loaded for the first time."""
    for case in cases:
        if case.decoded.error is not None and case.decoded.error.kind not in ("unsupported", "too_many_pixels"):
            known = reference(case.data)
            assert known is None or case.name.endswith(".imt"), f"{case.name}: {case.decoded.error}"


@pytest.mark.parametrize(
    ("category", "kinds"),
    [
        ("bomb", {"too_many_pixels", "unsupported"}),
        ("empty", {"empty", "not_an_image"}),
        ("garbage", {"not_an_image"}),
        ("not_an_image", {"not_an_image", "unsupported"}),
        ("truncated_benign", {"truncated"}),
        ("unsafe_checkpoint", {"not_an_image"}),
    ],
)
def test_failures_are_of_the_expected_kind(cases: list[Case], category: str, kinds: set[str]) -> None:
    of_category = [case for case in cases if case.category == category and case.name not in HARMLESS_BOMBS]
    assert of_category
    for case in of_category:
        assert case.decoded.error is not None, case.name
        assert case.decoded.error.kind in kinds, f"{case.name}: {case.decoded.error.kind}"


def test_plain_pictures_are_all_decoded(cases: list[Case]) -> None:
    for category in ("plain", "filename", "interlaced", "geometry", "wrong_extension", "polyglot", "degenerate"):
        of_category = [case for case in cases if case.category == category]
        assert of_category
        for case in of_category:
            assert case.decoded.error is None, f"{case.name}: {case.decoded.error}"


def test_truncated_files_are_never_shown_grey(cases: list[Case]) -> None:
    for case in cases:
        if case.category == "truncated" and case.decoded.image is not None:
            # Named so in the source, yet complete: Pillow, which refuses truncated data, reads every pixel.
            assert case.row["loads_fully"] == "yes", case.name


def test_bombs_are_refused_from_the_header_in_little_memory(cases: list[Case]) -> None:
    bombs = [case.data for case in cases if case.category == "bomb" and case.name not in HARMLESS_BOMBS]
    with DecoderPool(1, limits=LIMITS, views=(View(256, (224, 224)),)) as pool:
        pool.submit(cases[0].data).result(60.0)
        started = time.monotonic()
        outcomes = [pool.submit(data).result(60.0) for data in bombs]
        seconds = time.monotonic() - started
        (pid,) = pool.pids
        status = Path(f"/proc/{pid}/status").read_text()
    peak_kib = int(status.partition("VmHWM:")[2].split()[0])
    assert all(outcome.error is not None for outcome in outcomes)
    assert sum(outcome.decode_s for outcome in outcomes) < 2.0
    assert seconds < 10.0
    assert peak_kib < 150 * 1024


def test_nothing_is_ever_unpickled(cases: list[Case], shared_data: Path) -> None:
    assert any(case.category == "unsafe_checkpoint" for case in cases)
    assert not list(Path.cwd().glob("EVIL_PICKLE*"))
    assert not list((shared_data / "hostile").rglob("EVIL_PICKLE*"))
