"""The plan of a run's workers: it always leaves CPUs for the small tasks, whatever the cluster looks like."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from winnow.config import PredictConfig
from winnow.errors import CallError
from winnow_jobs.resources import Node, ResourcePlan, plan_batch_size, plan_fragment_rows, plan_resources

AUTO = PredictConfig()


def actors_that_fit(nodes: list[Node], plan: ResourcePlan) -> bool:
    """Place every actor first-fit, then one writing task."""
    free = [[node.num_cpus, node.num_gpus] for node in nodes]

    def place(cpus: float, gpus: float) -> bool:
        for slot in free:
            if slot[0] >= cpus - 1e-9 and slot[1] >= gpus - 1e-9:
                slot[0] -= cpus
                slot[1] -= gpus
                return True
        return False

    placed = [place(plan.infer_cpus, plan.infer_gpus) for _ in range(plan.num_infer)]
    placed += [place(plan.decode_cpus, 0) for _ in range(plan.num_decode)]
    return all(placed) and place(plan.write_cpus, 0)


@given(st.lists(st.integers(1, 96), min_size=1, max_size=6))
def test_on_cpus_everything_fits_with_room_for_writing(cpus: list[int]) -> None:
    nodes = [Node(count) for count in cpus]
    plan = plan_resources(nodes, AUTO)
    assert plan.device == "cpu"
    assert actors_that_fit(nodes, plan)


@given(st.lists(st.tuples(st.integers(1, 96), st.integers(0, 8)), min_size=1, max_size=6))
def test_with_gpus_everything_fits_with_room_for_writing(sizes: list[tuple[int, int]]) -> None:
    nodes = [Node(cpus, gpus) for cpus, gpus in sizes]
    plan = plan_resources(nodes, AUTO)
    assert actors_that_fit(nodes, plan)
    if any(gpus for _, gpus in sizes):
        assert plan.device == "cuda"
        assert plan.num_infer == sum(gpus for _, gpus in sizes)


@given(st.lists(st.integers(1, 32), min_size=1, max_size=4), st.integers(1, 6), st.integers(1, 6))
def test_numbers_chosen_by_hand_still_fit(cpus: list[int], num_infer: int, num_decode: int) -> None:
    nodes = [Node(count) for count in cpus]
    chosen = PredictConfig(num_inference_workers=num_infer, num_decode_workers=num_decode)
    plan = plan_resources(nodes, chosen)
    assert (plan.num_infer, plan.num_decode) == (num_infer, num_decode)
    assert actors_that_fit(nodes, plan)


@pytest.mark.parametrize("num_nodes", [1, 2, 4, 16])
def test_workers_grow_with_the_nodes(num_nodes: int) -> None:
    plan = plan_resources([Node(8)] * num_nodes, AUTO)
    assert (plan.num_infer, plan.num_decode) == (num_nodes, num_nodes)


def test_one_gpu_and_sixteen_cpus_give_most_cpus_to_decoding() -> None:
    plan = plan_resources([Node(16, 1)], AUTO)
    assert (plan.num_infer, plan.infer_gpus) == (1, 1.0)
    assert plan.num_decode * plan.num_decoders >= 12


def test_a_cluster_without_cpus_is_refused() -> None:
    with pytest.raises(CallError, match="no CPU"):
        plan_resources([Node(0, 1)], AUTO)


def test_sizes_follow_the_work_and_can_be_set() -> None:
    assert plan_batch_size(AUTO, device="cpu", pixel_bytes=150_528) == 32
    assert plan_batch_size(AUTO, device="cuda", pixel_bytes=150_528) == 256
    assert plan_batch_size(PredictConfig(batch_size=7), device="cuda", pixel_bytes=1) == 7
    assert plan_fragment_rows(AUTO, 100) == 256
    assert plan_fragment_rows(AUTO, 100_000_000) == 20_000
    assert plan_fragment_rows(PredictConfig(fragment_rows=5), 100) == 5


def test_only_rays_own_handlers_are_quietened() -> None:
    import logging

    from ray._private.log import PlainRayHandler

    from winnow_jobs.cluster import quieten_ray

    of_ray, of_others = PlainRayHandler(), logging.StreamHandler()
    ray_data = logging.getLogger("ray.data")
    for handler in (of_ray, of_others):
        ray_data.addHandler(handler)
    try:
        quieten_ray("ray.data")
        assert (of_ray.level, of_others.level) == (logging.CRITICAL, logging.NOTSET)
    finally:
        for handler in (of_ray, of_others):
            ray_data.removeHandler(handler)
