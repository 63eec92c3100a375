"""Splits and audit reserve by hash."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from winnow.config import SplitsConfig
from winnow.splits import SPLITS, assign_audit, assign_splits, audit_positions, split_positions

SPLIT_POSITIONS = [0.8795447868576806, 0.3943455922186435]
AUDIT_POSITIONS = [0.8456237875957755, 0.6900980665447606]

GROUPS = [f"s3://bucket/{number}.jpg" for number in range(20_000)]


def test_shares_are_met_within_sampling_error() -> None:
    splits = assign_splits(GROUPS, SplitsConfig())
    shares = {name: float((splits == name).mean()) for name in SPLITS}
    assert abs(shares["train"] - 0.8) < 0.01
    assert abs(shares["val"] - 0.1) < 0.01
    assert abs(shares["test"] - 0.1) < 0.01
    assert abs(assign_audit(GROUPS, SplitsConfig()).mean() - 0.02) < 0.004


def test_audit_cuts_across_the_splits_independently() -> None:
    correlation = np.corrcoef(split_positions(GROUPS), audit_positions(GROUPS))[0, 1]
    assert abs(correlation) < 0.03


def test_positions_are_fixed_forever() -> None:
    """These numbers stand in users' tables: changing them would move images between the splits."""
    assert split_positions(["a", "é\n😀"]).tolist() == SPLIT_POSITIONS
    assert audit_positions(["a", "é\n😀"]).tolist() == AUDIT_POSITIONS


def test_larger_audit_share_keeps_the_former_reserve() -> None:
    small = assign_audit(GROUPS, SplitsConfig(audit=0.02))
    large = assign_audit(GROUPS, SplitsConfig(audit=0.05))
    assert large[small].all()
    assert not assign_audit(GROUPS, SplitsConfig(audit=0.0)).any()
    assert assign_audit(GROUPS, SplitsConfig(audit=1.0)).all()


def test_empty_shares_get_nothing() -> None:
    assert set(assign_splits(GROUPS, SplitsConfig(train=1.0, val=0.0, test=0.0))) == {"train"}
    assert set(assign_splits(GROUPS, SplitsConfig(train=0.0, val=1.0, test=0.0))) == {"val"}
    assert set(assign_splits(GROUPS, SplitsConfig(train=0.0, val=0.0, test=1.0))) == {"test"}
    assert assign_splits([], SplitsConfig()).shape == (0,)


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_every_group_falls_into_the_unit_interval_alone(groups: list[str]) -> None:
    positions = split_positions(groups)
    assert ((positions >= 0.0) & (positions < 1.0)).all()
    assert positions.tolist() == [split_positions([group])[0] for group in groups]
