"""What training whole networks is made of: heads that grow, what is frozen, orders, weights, checkpoints."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from winnow.config import TrainConfig
from winnow.errors import JobError
from winnow.images import View
from winnow.models.fine_tuning import (
    Trainable,
    blocks_of,
    class_weights,
    freeze,
    loss_sum,
    make_optimiser,
    order_of_epoch,
    pack_checkpoint,
    set_rate,
    standard_augmentation,
    unpack_checkpoint,
    with_head,
)
from winnow.models.networks import Network, PyramidHead, RmsLinear, maps_of

SIZE = (32, 32)
VIEW = View(resize=SIZE)


def backbone(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    blocks = [
        nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU()),
    ]
    return nn.Sequential(nn.Sequential(*blocks), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def trainable(*, classes: tuple[str, ...] = ("a", "b", "c"), seed: int = 0) -> Trainable:
    network = with_head(Network(backbone(seed)), (), classes, VIEW, "class")
    return Trainable(network, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), is_dense=False)


def learn(model: Trainable, optimiser: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        random = torch.Generator().manual_seed(step)
        pixels = torch.randint(0, 256, (8, 3, *SIZE), generator=random, dtype=torch.uint8)
        targets = torch.randint(0, 3, (8,), generator=random)
        set_rate(optimiser, step, 20, "cosine")
        model.train()
        loss_sum(model(pixels), targets, torch.ones(8, dtype=torch.bool), "class", None).backward()
        optimiser.step()
        optimiser.zero_grad()


def test_the_module_normalises_as_predict_does() -> None:
    model = trainable().eval()
    pixels = torch.randint(0, 256, (2, 3, *SIZE), dtype=torch.uint8)
    expected = model.head(model.backbone((pixels.float() / 255 - 0.5) / 0.25))
    assert torch.allclose(model(pixels), expected, atol=1e-6)


def test_statistics_of_pretrained_norms_stay_those_of_a_new_decoder_do_not() -> None:
    model = trainable()
    before = [buffer.clone() for buffer in model.backbone.buffers()]
    learn(model, make_optimiser(model, TrainConfig()), range(3))
    assert all(torch.equal(old, new) for old, new in zip(before, model.backbone.buffers(), strict=True))
    import timm

    network = maps_of(timm.create_model("test_resnet", num_classes=5), 5, "timm/test_resnet")
    dense = Trainable(
        with_head(Network(network), (), ("a", "b"), View(resize=(64, 64)), "mask"),
        (0.0,) * 3,
        (1.0,) * 3,
        is_dense=True,
    ).train()
    assert isinstance(dense.head, PyramidHead)
    assert dense.head.smooth[1].training
    assert not any(module.training for module in dense.backbone.modules() if isinstance(module, nn.BatchNorm2d))
    assert dense(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape == (1, 2, 64, 64)


def test_a_head_that_knows_the_classes_stays_and_one_that_knows_some_keeps_them() -> None:
    network = Network(backbone(), nn.Linear(6, 3))
    assert with_head(network, ("a", "b", "c"), ("a", "b", "c"), VIEW, "class") is network
    grown = with_head(network, ("a", "b", "c"), ("c", "new", "a"), VIEW, "class").head
    assert isinstance(grown, nn.Linear)
    assert isinstance(network.head, nn.Linear)
    assert torch.equal(grown.weight[0], network.head.weight[2])
    assert torch.equal(grown.weight[2], network.head.weight[0])
    assert torch.equal(grown.bias[0], network.head.bias[2])
    assert grown.bias.tolist()[1] == 0.0
    assert not torch.equal(grown.weight[1], network.head.weight[1])
    scaled = Network(backbone(), RmsLinear(6, 3))
    kept = with_head(scaled, ("a", "b", "c"), ("b", "d"), VIEW, "class").head
    assert isinstance(kept, RmsLinear)
    assert isinstance(scaled.head, RmsLinear)
    assert torch.equal(kept.linear.weight[0], scaled.head.linear.weight[1])


def test_a_decoder_that_grows_keeps_all_but_the_rows_of_new_classes() -> None:
    import timm

    maps = maps_of(timm.create_model("test_resnet", num_classes=5), 5, "timm/test_resnet")
    view = View(resize=(64, 64))
    first = with_head(Network(maps), (), ("none", "cell"), view, "mask")
    grown = with_head(first, ("none", "cell"), ("none", "cell", "dirt"), view, "mask").head
    assert isinstance(grown, PyramidHead)
    assert isinstance(first.head, PyramidHead)
    assert torch.equal(grown.lateral[0].weight, first.head.lateral[0].weight)
    assert torch.equal(grown.classify.weight[:2], first.head.classify.weight)
    assert grown.classify.weight.shape[0] == 3


@pytest.mark.parametrize(("unfreeze", "trained"), [("head", 0), ("last", 1), ("all", 3)])
def test_only_what_was_asked_for_is_learned(unfreeze: str, trained: int) -> None:
    model = trainable()
    freeze(model, unfreeze)  # type: ignore[arg-type]
    blocks = blocks_of(model.backbone)
    assert len(blocks) == 3
    has_gradient = [all(parameter.requires_grad for parameter in block.parameters()) for block in blocks]
    assert has_gradient == [False] * (3 - trained) + [True] * trained
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    learn(model, make_optimiser(model, TrainConfig(learning_rate=0.01)), range(2))
    changed = {
        key.rsplit(".", 2)[0] for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])
    }
    assert len([key for key in changed if key.startswith("backbone.")]) == trained


def test_the_head_learns_faster_and_norms_do_not_decay() -> None:
    model = trainable()
    optimiser = make_optimiser(model, TrainConfig(learning_rate=1e-3, head_learning_rate=1e-2, weight_decay=0.1))
    found = {(group["highest"], group["weight_decay"]) for group in optimiser.param_groups}
    assert found == {(1e-3, 0.1), (1e-3, 0.0), (1e-2, 0.1), (1e-2, 0.0)}
    decayed = sum(len(group["params"]) for group in optimiser.param_groups if group["weight_decay"])
    assert decayed == 4  # three convolutions and the head


def test_rates_rise_and_fall() -> None:
    model = trainable()
    optimiser = make_optimiser(model, TrainConfig(learning_rate=1.0, head_learning_rate=1.0))

    def rate(step: int, schedule: str) -> float:
        set_rate(optimiser, step, 100, schedule)  # type: ignore[arg-type]
        return float(optimiser.param_groups[0]["lr"])

    rates = [rate(step, "cosine") for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == pytest.approx(rates[4])
    assert rates[50] == pytest.approx(0.5)
    assert rates[99] < 0.001
    assert [rate(step, "constant") for step in (4, 50, 99)] == [1.0, 1.0, 1.0]


def test_an_epoch_looks_at_every_image_once_and_fills_the_last_batch() -> None:
    order = order_of_epoch(10, 0, seed=1, batch_size=4)
    assert len(order) == 12
    assert sorted(order[:10]) == list(range(10))
    assert list(order[10:]) == list(order[:2])
    assert list(order) == list(order_of_epoch(10, 0, seed=1, batch_size=4))
    assert list(order) != list(order_of_epoch(10, 1, seed=1, batch_size=4))
    assert list(order) != list(order_of_epoch(10, 0, seed=2, batch_size=4))


def test_balanced_sampling_shows_rare_classes_as_often() -> None:
    labels = np.array([0] * 900 + [1] * 100)
    weights_N = 1.0 / np.bincount(labels)[labels]
    drawn = labels[order_of_epoch(1000, 0, seed=0, batch_size=10, weights_N=weights_N)]
    assert 0.44 < drawn.mean() < 0.56  # four standard deviations of 1,000 draws are 0.063


def test_class_weights_are_one_in_the_mean_over_images() -> None:
    counts_C = np.array([90, 10, 0])
    weights_C = class_weights(counts_C)
    assert weights_C[2] == 0.0
    assert weights_C[1] == pytest.approx(9 * weights_C[0])
    assert (weights_C * counts_C).sum() / counts_C.sum() == pytest.approx(1.0)


def test_losses_count_valid_images_and_labelled_pixels_only() -> None:
    torch.manual_seed(0)
    logits_NC, targets = torch.randn(3, 4), torch.tensor([0, 3, 1])
    valid_N = torch.tensor([True, False, True])
    expected = cross_entropy(logits_NC[[0, 2]], targets[[0, 2]], reduction="sum")
    assert torch.allclose(loss_sum(logits_NC, targets, valid_N, "class", None), expected)
    dense, labels = torch.randn(2, 3, 4, 4), torch.full((2, 4, 4), -1)
    labels[0, 0, :2] = torch.tensor([1, 2])
    found = loss_sum(dense, labels, torch.tensor([True, True]), "mask", None)
    one = cross_entropy(dense[0, :, 0, :2].T, torch.tensor([1, 2]))
    assert torch.allclose(found, one)  # the image without a labelled pixel adds nothing
    several = loss_sum(torch.zeros(1, 4), torch.tensor([[1.0, 0.0, 1.0, 0.0]]), torch.tensor([True]), "classes", None)
    assert float(several) == pytest.approx(math.log(2))


def test_a_training_goes_on_from_its_checkpoint_as_if_nothing_had_been() -> None:
    whole, optimiser = trainable(), None
    optimiser = make_optimiser(whole, TrainConfig())
    learn(whole, optimiser, range(4))
    data = pack_checkpoint(whole, optimiser, {"head.bias": torch.tensor([1.0])}, {"epoch": 3, "curve": [{"loss": 0.5}]})
    learn(whole, optimiser, range(4, 8))
    other = trainable(seed=5)
    again = make_optimiser(other, TrainConfig())
    best, state = unpack_checkpoint(data, other, again)
    assert (state, float(best["head.bias"])) == ({"epoch": 3, "curve": [{"loss": 0.5}]}, 1.0)
    learn(other, again, range(4, 8))
    for key, tensor in whole.state().items():
        assert torch.equal(tensor, other.state()[key]), key


def test_a_checkpoint_that_is_cut_off_or_of_another_network_is_told(tmp_path: Path) -> None:
    model = trainable()
    optimiser = make_optimiser(model, TrainConfig())
    learn(model, optimiser, range(1))
    data = pack_checkpoint(model, optimiser, {}, {})
    with pytest.raises(JobError, match="cannot be used"):
        unpack_checkpoint(data[: len(data) // 2], trainable(), make_optimiser(trainable(), TrainConfig()))
    other = trainable(classes=("a", "b"))
    with pytest.raises(JobError, match="cannot be used"):
        unpack_checkpoint(data, other, make_optimiser(other, TrainConfig()))


def test_standard_augmentation_keeps_the_size_and_depends_on_the_epoch() -> None:
    policy = standard_augmentation(VIEW, seed=3)
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    first, _ = policy.apply(pixels, image_id="a", view=1)
    second, _ = policy.apply(pixels, image_id="a", view=2)
    assert first.shape == pixels.shape
    assert not np.array_equal(first, second)
    assert np.array_equal(first, policy.apply(pixels, image_id="a", view=1)[0])
