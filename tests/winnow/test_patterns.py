"""Path patterns, globs and junk."""

from __future__ import annotations

import fnmatch
import re

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from winnow.errors import CallError
from winnow.patterns import PathFilter, PathPattern


def extract(pattern: str, path: str) -> dict[str, str] | None:
    matched, found = PathPattern(pattern).extract(pa.array([path]))
    values = {name: column[0].as_py() for name, column in found.items()}
    if not matched[0].as_py():
        assert set(values.values()) == {None}
        return None
    return values


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("{split}/{label}/*", "train/cat/1.jpg", {"split": "train", "label": "cat"}),
        ("{split}/{label}/*", "train/cat/deep/1.jpg", None),
        ("{split}/{label}/*", "cat/1.jpg", None),
        ("{label}/**", "cat/1.jpg", {"label": "cat"}),
        ("{label}/**", "cat/a/b/1.jpg", {"label": "cat"}),
        ("**/{label}/*", "cat/1.jpg", {"label": "cat"}),
        ("**/{label}/*", "a/b/cat/1.jpg", {"label": "cat"}),
        ("a/**/{label}/*", "a/cat/1.jpg", {"label": "cat"}),
        ("{label}_{camera}.jpg", "black_cat_7.jpg", {"label": "black_cat", "camera": "7"}),
        ("img-*-{label}.*", "img-2024-cat.jpeg", {"label": "cat"}),
        ("{label}/*", "c\na t/x\ny.jpg", {"label": "c\na t"}),
        ("{label}/*", "猫/#?%20+.jpg", {"label": "猫"}),
        ("a.b(c)/{label}", "a.b(c)/d", {"label": "d"}),
        ("a.b/{label}", "axb/d", None),
        ("/{label}/*", "cat/1.jpg", {"label": "cat"}),
        ("{label}/*", "cat/" + "x" * 1000, {"label": "cat"}),
    ],
)
def test_pattern_names_the_parts_of_a_path(pattern: str, path: str, expected: dict[str, str] | None) -> None:
    assert extract(pattern, path) == expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("train/*", "names nothing"),
        ("", "empty part"),
        ("{label}/{label}", "{label} twice"),
        ("{label}{split}/*", "need something between"),
        ("{la-bel}/*", "'{la-bel}' is not understood"),
        ("{label/*", "'{' is not understood"),
        ("{label}//x", "empty part"),
        ("{label}/a**b", "must stand alone"),
    ],
)
def test_wrong_pattern_is_refused_with_the_reason(pattern: str, message: str) -> None:
    with pytest.raises(CallError, match=re.escape(message)):
        PathPattern(pattern)


def judge(paths: list[str], **options: object) -> tuple[list[str], dict[str, int]]:
    kept, skipped = PathFilter(**options).judge(pa.array(paths, pa.string()))  # type: ignore[arg-type]
    return [path for path, keep in zip(paths, kept.to_pylist(), strict=True) if keep], dict(skipped)


def test_junk_is_left_out_and_counted_by_reason() -> None:
    images = [
        "a.jpg",
        "a b/c.jpg",
        "x..y/z.jpg",
        "-rf.jpg",
        "=cmd.jpg",
        "%2e%2e%2fetc.jpg",
        "line\nbreak.jpg",
        "noextension",
    ]
    junk = {
        "directory": ["", "folder/", "a/b/", "old_$folder$"],
        "system": [".DS_Store", "a/.DS_Store", "Thumbs.db", "b/thumbs.db", "desktop.ini", "._a.jpg", "a/._b.jpg"],
        "archive": ["__MACOSX/a.jpg", "x/__MACOSX/b.jpg"],
        "hidden": [".hidden.jpg", ".git/a.jpg", "a/.cache/b.jpg"],
    }
    kept, skipped = judge(images + [path for paths in junk.values() for path in paths])
    assert kept == images
    assert skipped == {reason: len(paths) for reason, paths in junk.items()}


def test_hidden_names_are_taken_when_asked_for() -> None:
    assert judge([".a.jpg", ".git/b.jpg", ".DS_Store"], hidden=True) == ([".a.jpg", ".git/b.jpg"], {"system": 1})


def test_listed_paths_may_lie_in_hidden_folders() -> None:
    assert judge([".cache/a.jpg", ".cache/.b.jpg"], whole_path=False) == ([".cache/a.jpg"], {"hidden": 1})


def test_globs_keep_and_leave_out() -> None:
    paths = ["a.jpg", "b/c.JPG", "b/d.json", "b/e.png"]
    assert judge(paths, include=("*.jpg", "*.png"), exclude=("b/*",)) == (["a.jpg"], {"excluded": 3})
    assert judge(paths, include=("*.[jp][pn]g",)) == (["a.jpg", "b/e.png"], {"not_included": 2})
    assert judge(paths, exclude=("*.[!j]*",)) == (["a.jpg", "b/d.json"], {"excluded": 2})


def test_wrong_glob_is_refused() -> None:
    with pytest.raises(CallError, match="not understood"):
        PathFilter(exclude=("[z-a]*",))


@settings(deadline=None)  # the machine may be busy
@given(
    st.text(st.sampled_from("ab/*?.[]!^\\-(é\n"), max_size=8).filter(
        lambda text: not re.search(r"\[.*-.*\]", text, re.DOTALL)
    ),
    st.text(st.sampled_from("ab/.[]!^\\-(é\n"), max_size=8),
)
def test_globs_mean_what_the_standard_library_means(glob: str, path: str) -> None:
    kept, _ = PathFilter(include=(glob,), hidden=True).judge(pa.array([f"x{path}"]))
    assert kept[0].as_py() == fnmatch.fnmatchcase(f"x{path}", glob) or path.endswith("/") or "/._" in path
