"""Splits: which images train, which measure, and which are kept back for honest statistics.

An image gets its split and its place in the audit reserve when it is first seen, by hash of its group, so that all
images of a group (the frames of a video, the photographs of a patient) fall on the same side. The two hashes are
salted differently: the reserve cuts across the three splits.

Shares may change in the configuration; what was given stays, because whoever calls this asks only for new groups.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from winnow.config import SplitsConfig

SPLITS = ("train", "val", "test")
"""Every split, in the order in which the shares cut [0, 1)."""

_SPLIT_SALT = b"winnow.split"
_AUDIT_SALT = b"winnow.audit"


def split_positions(groups: Iterable[str]) -> NDArray[np.float64]:
    """Where each group falls for its split: float64 (N,), uniform in [0, 1), the same forever."""
    return _positions(groups, _SPLIT_SALT)


def audit_positions(groups: Iterable[str]) -> NDArray[np.float64]:
    """Where each group falls for the audit reserve: float64 (N,), uniform in [0, 1), independent of its split."""
    return _positions(groups, _AUDIT_SALT)


def assign_splits(groups: Iterable[str], shares: SplitsConfig) -> NDArray[np.object_]:
    """``train``, ``val`` or ``test`` for each group: object array (N,)."""
    edges = np.array([shares.train, shares.train + shares.val])
    index = np.searchsorted(edges, split_positions(groups), side="right")
    if shares.test == 0.0:  # train + val may fall short of 1 by a rounding error
        index = np.minimum(index, 1 if shares.val > 0.0 else 0)
    return np.array(SPLITS, dtype=object)[index]


def assign_audit(groups: Iterable[str], shares: SplitsConfig) -> NDArray[np.bool_]:
    """True for each group in the audit reserve: bool (N,). A larger share only adds groups."""
    return audit_positions(groups) < shares.audit


def _positions(groups: Iterable[str], salt: bytes) -> NDArray[np.float64]:
    digests = b"".join(hashlib.blake2b(group.encode(), digest_size=8, salt=salt).digest() for group in groups)
    # The upper 53 bits fill a float64's mantissa exactly, so that no value rounds up to 1.
    return (np.frombuffer(digests, dtype="<u8") >> np.uint64(11)).astype(np.float64) * 2.0**-53
