"""What bounds a run, and what share of the measured ceiling it reached.

The ceiling is computed from the run's own measurements: seconds of work per image in each stage, and how many
workers each stage had. Stages overlap, so the slowest stage alone sets the ceiling; on machines without a GPU
decoding and inference share the same cores and their CPU seconds add up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_ADVICE = {
    "fetching": "raise predict.fetch_concurrency, or run closer to the storage",
    "decoding": "give the cluster more CPU cores, or set predict.scaled_decoding = true",
    "inference": "use a GPU, more cores, or a smaller model",
    "transforming": "give the cluster more CPU cores, or use cheaper transforms or --format jpeg",
    "start-up": "predict more images per run: starting the workers took longer than the work",
}


@dataclass(frozen=True)
class Capacity:
    """Workers of each stage: requests in flight, decoder processes, inference actors, CPU cores, and the device."""

    num_fetch_slots: int
    num_decoders: int
    num_infer: int
    num_cpus: float
    device: str


@dataclass(frozen=True)
class Verdict:
    """What bounds a run.

    Attributes:
        bound_by: ``fetching``, ``decoding``, ``inference`` (or ``transforming``) or ``start-up``.
        images_per_s: while the workers were at work.
        ceiling_images_per_s: what these workers could reach by their own measured times.
        ceiling_share: images_per_s / ceiling_images_per_s, at most 1.
        text: one or two sentences.
    """

    bound_by: str
    images_per_s: float
    ceiling_images_per_s: float
    ceiling_share: float
    text: str


def judge(
    *,
    num_images: int,
    num_here: int,
    seconds: Mapping[str, float],
    capacity: Capacity,
    compute: str = "inference",
) -> Verdict | None:
    """The verdict on a run, or None when it has too little to measure.

    Args:
        num_images: images of the run, which ``fetching``, ``decoding`` and ``inference`` were spent on.
        num_here: images answered in this execution, which took ``starting`` and ``working``.
        seconds: ``fetching`` (waiting, summed over requests), ``decoding`` (CPU, summed over processes),
            ``inference`` (busy, summed over actors), ``inference_cpu`` (CPU, summed), ``starting`` (wall, until the
            first image was answered), ``working`` (wall, from then on).
        capacity: workers of each stage.
        compute: name of the stage after decoding: ``inference`` or ``transforming``.
    """
    working = seconds.get("working", 0.0)
    if not num_images or not num_here or working <= 0:
        return None
    rates: dict[str, float] = {}
    if seconds.get("fetching"):
        rates["fetching"] = capacity.num_fetch_slots * num_images / seconds["fetching"]
    decode_cpu = seconds.get("decoding", 0.0) / num_images
    if capacity.device == "cpu":
        infer_cpu = seconds.get(f"{compute}_cpu", 0.0) / num_images
        rates[compute if infer_cpu >= decode_cpu else "decoding"] = capacity.num_cpus / max(
            1e-9, decode_cpu + infer_cpu
        )
    else:
        if decode_cpu:
            rates["decoding"] = capacity.num_decoders / decode_cpu
        rates[compute] = capacity.num_infer * num_images / max(1e-9, seconds.get(compute, 0.0))
    bound_by = min(rates, key=lambda stage: rates[stage])
    ceiling = rates[bound_by]
    reached = num_here / working
    share = min(1.0, reached / ceiling)
    stage = bound_by
    text = (
        f"{reached:,.1f} images/s, bound by {bound_by}: {share:.0%} of the {ceiling:,.1f} images/s that these workers "
        "could reach by their own measured times"
    )
    if seconds.get("starting", 0.0) > working:
        bound_by = "start-up"
        text = (
            f"{num_here:,} images in {working:.1f} s after {seconds['starting']:.1f} s of start-up, which bounds so "
            f"short a run; then {reached:,.1f} images/s, {share:.0%} of the {ceiling:,.1f} images/s that {stage} allows"
        )
    return Verdict(bound_by, reached, ceiling, share, f"{text}. To go faster: {_ADVICE[bound_by]}.")
