"""The verdict names the stage that bounds the run, from the run's own measurements."""

from __future__ import annotations

import pytest

from winnow_jobs.verdict import Capacity, judge

CPU = Capacity(num_fetch_slots=32, num_decoders=2, num_infer=1, num_cpus=2, device="cpu")
GPU = Capacity(num_fetch_slots=96, num_decoders=12, num_infer=1, num_cpus=16, device="cuda")


def test_on_cpu_decoding_and_inference_share_the_cores() -> None:
    verdict = judge(
        num_images=1000,
        num_here=1000,
        seconds={"fetching": 10, "decoding": 3, "inference_cpu": 17, "starting": 5, "working": 12.5},
        capacity=CPU,
    )
    assert verdict is not None
    assert verdict.bound_by == "inference"
    assert verdict.ceiling_images_per_s == pytest.approx(100)
    assert verdict.images_per_s == pytest.approx(80)
    assert verdict.ceiling_share == pytest.approx(0.8)
    assert "bound by inference: 80% of the 100.0 images/s" in verdict.text


@pytest.mark.parametrize(
    ("seconds", "bound_by"),
    [
        ({"fetching": 960, "decoding": 3, "inference": 1}, "fetching"),
        ({"fetching": 1, "decoding": 60, "inference": 1}, "decoding"),
        ({"fetching": 1, "decoding": 3, "inference": 10}, "inference"),
    ],
)
def test_on_gpu_the_slowest_stage_bounds(seconds: dict[str, float], bound_by: str) -> None:
    verdict = judge(num_images=1000, num_here=1000, seconds={**seconds, "starting": 1, "working": 20}, capacity=GPU)
    assert verdict is not None
    assert verdict.bound_by == bound_by


def test_a_run_shorter_than_its_start_says_so() -> None:
    seconds = {"fetching": 0.1, "decoding": 0.1, "inference_cpu": 0.2, "starting": 9, "working": 0.5}
    verdict = judge(num_images=10, num_here=10, seconds=seconds, capacity=CPU)
    assert verdict is not None
    assert verdict.bound_by == "start-up"
    assert "10 images in 0.5 s after 9.0 s of start-up" in verdict.text


def test_after_a_resume_the_rate_counts_only_what_was_done_here() -> None:
    seconds = {"fetching": 10, "decoding": 3, "inference_cpu": 17, "starting": 1, "working": 5}
    verdict = judge(num_images=1000, num_here=200, seconds=seconds, capacity=CPU)
    assert verdict is not None
    assert verdict.images_per_s == pytest.approx(40)


def test_nothing_measured_gives_no_verdict() -> None:
    assert judge(num_images=0, num_here=0, seconds={}, capacity=CPU) is None
