"""A training worker: steps, epochs, checkpoints.

Every worker has a stream of chunks of its own: what it looks at in each step, epoch after epoch, the validation images
behind each. Which images these are follows from the seed, the epoch and the step alone, so a training goes on after a
kill as if nothing had been, from its last checkpoint: ``runs/<run>/checkpoints/<step>.safetensors`` in the warehouse.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from winnow.errors import JobError, WinnowError
from winnow.splits import SPLITS
from winnow_connectors.ledger import Plan
from winnow_connectors.warehouse import Warehouse
from winnow_jobs.cluster import quieten_ray
from winnow_jobs.heads import class_warnings
from winnow_jobs.labelled import LabelledImages
from winnow_jobs.measuring import LEAST_VAL, check_left_out, to_safetensors
from winnow_jobs.resources import WorkerPlan
from winnow_jobs.training.measure import Measure
from winnow_jobs.training.reader import ReadForTraining
from winnow_jobs.training.spec import FineTuneSpec, count_classes, targets_of

logger = logging.getLogger(__name__)

RESULT = "trained.safetensors"
"""Weights of a training that is done, in the folder of its run."""

_SPAN = 2_000
"""Chunks that one execution of Ray Data goes through."""

_REPORT_S = 1.0


def train_worker(config: dict[str, Any]) -> dict[str, Any] | None:
    """One of the workers, from its first step or the last checkpoint to the end; the first one measures.

    A fault that would come again is told to the board, and ends them all.
    """
    import ray

    try:
        return _Worker(config).work()
    except WinnowError as error:
        ray.get(config["board"].fail.remote(error), timeout=60)
        raise


class _Worker:
    def __init__(self, config: dict[str, Any]) -> None:
        import torch
        from ray import train
        from ray.train.torch import get_device

        from winnow.models.fine_tuning import Trainable, freeze, make_optimiser, with_head
        from winnow.models.loading import load_network

        self.spec: FineTuneSpec = config["spec"]
        self.warehouse: Warehouse = config["warehouse"]
        plan: Plan = config["plan"]
        self.run = self.warehouse.ledger.at(plan)
        self.workers: WorkerPlan = config["workers"]
        self.board = config["board"]
        self.rows_ref = config["rows"]
        context = train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        import ray

        self.labels = LabelledImages(ray.get(self.rows_ref))
        self.num: dict[str, int] = {split: self.labels.of(split).num_rows for split in SPLITS}
        self.device = get_device()
        if self.device.type == "cpu":
            torch.set_num_threads(self.workers.num_threads)
        torch.manual_seed(self.spec.seed)
        spec, start = self.spec, self.spec.start
        network = load_network(start, fetch=self.warehouse.stores.download)
        network = with_head(network, start.classes, spec.classes, start.view, spec.target)
        self.model = Trainable(network, start.mean, start.std, is_dense=spec.is_dense)
        freeze(self.model, spec.config.unfreeze)
        self.model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimiser = make_optimiser(self.model, spec.config)
        self.forward: Callable[[Any], Any] = self.model
        if self.world > 1:
            from torch.nn.parallel import DistributedDataParallel

            self.forward = DistributedDataParallel(
                self.model, broadcast_buffers=False, find_unused_parameters=spec.is_dense
            )
        self.dtype = self._precision()
        self.batch = math.ceil(spec.config.batch_size / self.world)
        self.num_steps = math.ceil(self.num["train"] / (self.batch * self.world))
        self.total_steps = spec.config.epochs * self.num_steps
        self.weights_C = self._class_weights()
        self.best: dict[str, Any] = {}
        self.pixels: list[float] = []
        self.seen: dict[str, list[int]] = {}
        self.failed: dict[tuple[str, int], tuple[str, str]] = {}
        self.curve: list[dict[str, float]] = []
        self.epoch = self.step = 0
        self.best_score, self.best_epoch, self.since_best = -math.inf, -1, 0
        self.loss_total, self.loss_count = 0.0, 0.0
        self.train_s = 0.0
        self._reported = 0.0

    def _precision(self) -> Any:
        import torch

        asked = self.spec.config.precision
        if asked == "bfloat16" or (asked == "auto" and self.device.type == "cuda" and torch.cuda.is_bf16_supported()):
            return torch.bfloat16
        return torch.float32

    def _class_weights(self) -> Any:
        import torch

        from winnow.models.fine_tuning import class_weights

        if self.spec.config.balance != "weights":
            return None
        if self.spec.target == "mask":
            return None  # of the pixels seen so far: see ``_count_pixels``
        targets = targets_of(self.spec, self.labels.of("train"))
        if targets.ndim == 1:
            weights_C = class_weights(np.bincount(targets, minlength=len(self.spec.classes)))
        else:
            present_C = targets.sum(axis=0)
            weights_C = ((len(targets) - present_C) / np.maximum(1, present_C)).astype(np.float32)
        return torch.from_numpy(weights_C).to(self.device)

    # ------------------------------------------------------------------------------------------------------------ loop

    def work(self) -> dict[str, Any] | None:
        self._resume()
        started = time.monotonic()
        saved = time.monotonic()
        config = self.spec.config
        val_logits: list[Any] = []
        ended = self.epoch >= config.epochs
        for split, epoch, batch in self._batches():
            if ended:
                break
            if split == "train":
                self._learn(batch)
                self.step += 1
                self._report(epoch)
                if time.monotonic() - saved >= config.checkpoint_s:
                    self._save()
                    saved = time.monotonic()
                if self.step < self.num_steps or self.num["val"]:
                    continue
            else:
                val_logits.append(self._ask(batch))
                if len(val_logits) < self._num_val_steps():
                    continue
            ended = self._end_epoch(val_logits)
            val_logits = []
            self.train_s += time.monotonic() - started
            started = time.monotonic()
            self._save()
            saved = time.monotonic()
        return self._finish()

    def _num_val_steps(self) -> int:
        num: int = math.ceil(self.num["val"] / (self.batch * self.world))
        return num

    def _chunks(self) -> Iterator[dict[str, Any]]:
        """What this worker looks at from here on."""
        own, whole = self.rank * self.batch, self.world * self.batch
        first = self.step
        for epoch in range(self.epoch, self.spec.config.epochs):
            for split, steps in (("train", range(first, self.num_steps)), ("val", range(self._num_val_steps()))):
                for step in steps:
                    start = step * whole + own
                    yield {"split": split, "epoch": epoch, "start": start, "stop": start + self.batch}
            first = 0

    def _batches(self) -> Iterator[tuple[str, int, dict[str, NDArray[Any]]]]:
        import ray.data
        from ray.data import ActorPoolStrategy

        quieten_ray("ray.train", "ray.data")
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.execution_options.preserve_order = True
        chunks = self._chunks()
        readers = self.workers.num_readers
        while span := list(itertools.islice(chunks, _SPAN)):
            dataset = ray.data.from_items(span, override_num_blocks=len(span)).map_batches(
                ReadForTraining,
                fn_constructor_args=(self.spec, self.rows_ref, self.warehouse.stores, 1 if readers > 1 else 2),
                batch_size=1,
                batch_format="numpy",
                compute=ActorPoolStrategy(size=readers),
                num_cpus=self.workers.reader_cpus,
            )
            batches = dataset.iter_batches(batch_size=self.batch, batch_format="numpy", prefetch_batches=2)
            for chunk, batch in zip(span, batches, strict=True):
                yield chunk["split"], chunk["epoch"], batch

    def _learn(self, batch: dict[str, NDArray[Any]]) -> None:
        import torch
        import torch.distributed as dist

        from winnow.models.fine_tuning import CLIP, loss_sum, set_rate

        self._note_failures("train", batch)
        done = self.epoch * self.num_steps + self.step
        torch.manual_seed((self.spec.seed * 1_000_003 + done) * self.world + self.rank)  # of dropout
        pixels, targets, valid_N = self._tensors(batch)
        count = valid_N.sum().to(torch.float64)
        if self.world > 1:
            dist.all_reduce(count)
        set_rate(self.optimiser, done, self.total_steps, self.spec.config.schedule)
        if self.spec.is_dense:
            self._count_pixels(batch)
        self.model.train()
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype is torch.bfloat16):
            logits = self.forward(pixels)
        loss = loss_sum(logits, targets, valid_N, self.spec.target, self.weights_C)
        # DDP takes the mean over workers; the loss is the mean over the images of all of them.
        (loss * self.world / count.clamp(min=1.0).float()).backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], CLIP)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise JobError(
                f"the loss of epoch {self.epoch + 1} is not finite; lower train.learning_rate, or use float32"
            )
        self.loss_total += value
        self.loss_count += float(valid_N.sum())

    def _count_pixels(self, batch: dict[str, NDArray[Any]]) -> None:
        """Pixels and images of each class so far, in all workers: what weights in the loss and warnings go by."""
        import torch

        from winnow.models.fine_tuning import class_weights

        num = len(self.spec.classes)
        if self.spec.config.balance == "weights":
            labelled = batch["target"][batch["valid"]]
            pixels = np.bincount(labelled[labelled != np.iinfo(labelled.dtype).max].astype(np.int64), minlength=num)
            found = self._add_up([float(count) for count in pixels])
            self.pixels = [have + new for have, new in zip(self.pixels or [0.0] * num, found, strict=True)]
            self.weights_C = torch.from_numpy(class_weights(np.array(self.pixels, dtype=np.int64))).to(self.device)
        if not self.epoch:
            for position, target in zip(batch["position"].tolist(), batch["target"], strict=True):
                if position >= 0:
                    for value in np.unique(target[target != np.iinfo(target.dtype).max]):
                        self.seen.setdefault(str(position), []).append(int(value))

    def train_counts(self) -> dict[str, int]:
        """Labelled images of the train split by class."""
        train = self.labels.of("train")
        if self.spec.is_dense:
            found = Counter(self.spec.classes[value] for values in self.seen.values() for value in set(values))
            return {name: found[name] for name in self.spec.classes if found[name]}
        kept = [place for place in range(train.num_rows) if ("train", place) not in self.failed]
        return count_classes(targets_of(self.spec, train.take(pa.array(kept, pa.int64()))), self.spec.classes)

    def _class_warnings(self, counts: Mapping[str, int]) -> list[str]:
        what = "labelled image" if self.spec.is_dense else "label"
        return class_warnings({name: counts.get(name, 0) for name in self.spec.classes}, what)

    def _ask(self, batch: dict[str, NDArray[Any]]) -> Any:
        """Logits of validation images with their places; for masks what was confused, and the loss."""
        import torch

        from winnow.metrics import confusion
        from winnow.models.fine_tuning import loss_sum

        self._note_failures("val", batch)
        pixels, targets, valid_N = self._tensors(batch)
        self.model.eval()
        with torch.inference_mode():
            logits = self.model(pixels)
            loss = float(loss_sum(logits, targets, valid_N, self.spec.target, None))
        valid = batch["valid"]
        if self.spec.is_dense:
            answers = logits.argmax(dim=1).cpu().numpy()[valid]
            void = int(np.iinfo(batch["target"].dtype).max)
            found = confusion(batch["target"][valid], answers, len(self.spec.classes), void=void)
            return found, loss, int(valid.sum())
        return logits.float().cpu().numpy()[valid], np.asarray(batch["target"])[valid], loss, int(valid.sum())

    def _tensors(self, batch: dict[str, NDArray[Any]]) -> tuple[Any, Any, Any]:
        import torch

        pixels = torch.from_numpy(np.array(batch["pixels"])).to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        values = np.array(batch["target"])
        if self.spec.is_dense:
            void = np.iinfo(values.dtype).max
            values = np.where(values == void, -1, values.astype(np.int64))
        return (
            pixels,
            torch.from_numpy(values).to(self.device),
            torch.from_numpy(np.array(batch["valid"])).to(self.device),
        )

    # ---------------------------------------------------------------------------------------------------------- epochs

    def _end_epoch(self, val: list[Any]) -> bool:
        """Add a point to the curve and keep the weights when they are the best; True when training is over."""
        sums = self._add_up([self.loss_total, self.loss_count])
        point: dict[str, float] = {"epoch": self.epoch + 1, "train_loss": sums[0] / max(1.0, sums[1])}
        score = None
        if self.num["val"]:
            score, measured = self._score(val)
            point |= measured
        self._share_failures()
        point["learning_rate"] = float(self.optimiser.param_groups[0]["lr"])
        self.curve.append(point)
        self.loss_total = self.loss_count = 0.0
        self.epoch, self.step = self.epoch + 1, 0
        chooses = score is not None and self.num["val"] >= LEAST_VAL
        if not chooses or (score is not None and score > self.best_score):
            self.best_score, self.best_epoch, self.since_best = score or 0.0, self.epoch, 0
            self.best = self.model.state()
        else:
            self.since_best += 1
        patience = self.spec.config.patience
        return self.epoch >= self.spec.config.epochs or bool(chooses and patience and self.since_best >= patience)

    def _score(self, val: list[Any]) -> tuple[float, dict[str, float]]:
        """How good the weights are on the val split, higher is better; and what the curve shows."""
        from winnow.calibration import fit_temperature
        from winnow.metrics import classification_metrics, segmentation_metrics
        from winnow.uncertainty import softmax

        gathered = [part for parts in self._gather(val) for part in parts]
        num = sum(part[-1] for part in gathered)
        loss = sum(part[-2] for part in gathered) / max(1, num)
        if not num:
            return -math.inf, {}
        if self.spec.is_dense:
            total_CC = np.sum([part[0] for part in gathered], axis=0)
            found = segmentation_metrics(total_CC, self.spec.classes, num)
            iou = float(found.get("mean_iou", 0.0))
            return iou, {"val_loss": loss, "val_mean_iou": iou}
        logits_NC = np.concatenate([part[0] for part in gathered])
        targets = np.concatenate([part[1] for part in gathered])
        if self.spec.target == "classes":
            right = float(((logits_NC > 0) == (targets > 0.5)).all(axis=1).mean())
            return -loss, {"val_loss": loss, "val_exact_match": right}
        probabilities_NC = softmax(logits_NC / fit_temperature(logits_NC, targets))
        found = classification_metrics(targets, probabilities_NC, self.spec.classes)
        return -found["log_loss"], {"val_loss": loss, "val_accuracy": found["accuracy"]}

    def _note_failures(self, split: str, batch: dict[str, NDArray[Any]]) -> None:
        """Remember images that could not be used; stop when they are too many."""
        for position, error in zip(batch["position"].tolist(), batch["error"].tolist(), strict=True):
            if error:
                kind, _, message = error.partition("\n")
                self.failed[split, position] = (kind, message)
        if self.failed and not self.epoch:
            self._check_failures(min(self.num["train"], (self.step + 1) * self.batch))

    def _check_failures(self, num_seen: int) -> None:
        failures = Counter(kind for kind, _ in self.failed.values())
        check_left_out(failures, self.examples(), num_seen, self.spec.reading.max_failure_share)

    def examples(self) -> list[str]:
        return [message for _, message in list(self.failed.values())[:3]]

    def _share_failures(self) -> None:
        """All workers know of all images that could not be used."""
        for failed, seen in self._gather((self.failed, self.seen)):
            self.failed |= failed
            self.seen |= seen

    def _add_up(self, values: list[float]) -> list[float]:
        import torch
        import torch.distributed as dist

        sums = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            sums = sums.to(self.device)
            dist.all_reduce(sums)
        return [float(value) for value in sums.cpu()]

    def _gather(self, value: Any) -> list[Any]:
        import torch.distributed as dist

        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    # -------------------------------------------------------------------------------------------------- going on later

    def _save(self) -> None:
        """A checkpoint, by the first worker: all of them hold the same weights."""
        from winnow.models.fine_tuning import pack_checkpoint

        if self.rank:
            return
        state = {name: getattr(self, name) for name in _STATE}
        state["failed"] = [[*key, *value] for key, value in self.failed.items()]
        done = self.epoch * self.num_steps + self.step
        store, folder = self.run.store, self.run.key("checkpoints/")
        older = [info.key for info in store.list(folder)]
        store.put(f"{folder}{done:09d}.safetensors", pack_checkpoint(self.model, self.optimiser, self.best, state))
        for key in sorted(older)[:-1]:
            store.delete(key)

    def _resume(self) -> None:
        """Go on from the newest checkpoint; the first worker says which that is."""
        import torch.distributed as dist

        from winnow.models.fine_tuning import unpack_checkpoint

        found = [max((info.key for info in self.run.store.list(self.run.key("checkpoints/"))), default=None)]
        if self.world > 1:
            dist.broadcast_object_list(found, src=0)
        if found[0] is None:
            return
        self.best, state = unpack_checkpoint(self.run.store.get(found[0]), self.model, self.optimiser)
        for name in _STATE:
            setattr(self, name, state[name])
        self.failed = {(split, place): (kind, message) for split, place, kind, message in state["failed"]}
        logger.info("going on from epoch %d, step %d", self.epoch + 1, self.step)

    def _report(self, epoch: int) -> None:
        """Say how far it is, once a second; end when the board says why."""
        import ray

        now = time.monotonic()
        if now - self._reported < _REPORT_S:
            return
        self._reported = now
        fault: WinnowError | None = ray.get(self.board.fault.remote(), timeout=60)
        if fault is not None:
            raise fault
        if self.rank:
            return
        note = f"epoch {epoch + 1} of {self.spec.config.epochs}  loss {self.loss_total / max(1.0, self.loss_count):.3f}"
        if self.curve:
            note += "".join(
                f"  {name.removeprefix('val_').replace('_', ' ')} {value:.3f}"
                for name, value in self.curve[-1].items()
                if name in ("val_accuracy", "val_mean_iou", "val_exact_match")
            )
        whole = self.batch * self.world
        self.board.report.remote(
            {
                "done": (epoch * self.num_steps + self.step) * whole,
                "total": self.total_steps * whole,
                "failed": len(self.failed),
                "note": note,
            }
        )

    # ------------------------------------------------------------------------------------------------------------- end

    def _finish(self) -> dict[str, Any] | None:
        """Measure the best weights and write them, by the first worker."""
        if self.rank:
            return None
        started = time.monotonic()
        used = self.num["train"] - sum(split == "train" for split, _ in self.failed)
        if used < 1:
            raise JobError(f"no labelled image of the train split could be used: {'; '.join(self.examples())}")
        self.model.load_state_dict(self.best, strict=True)
        measured = Measure(self).measure()
        self.run.store.put(self.run.key(RESULT), to_safetensors(self.best))
        fit = {
            "epochs": len(self.curve),
            "best_epoch": self.best_epoch,
            "chosen_by": "val" if self.num["val"] >= LEAST_VAL else "last epoch",
            "num_workers": self.world,
            "precision": str(self.dtype).removeprefix("torch."),
            "curve": self.curve,
        }
        metrics = {**measured.metrics, "train": {"n": used}, "fit": fit}
        failures = Counter(kind for kind, _ in self.failed.values())
        return {
            "temperature": measured.temperature,
            "metrics": metrics,
            "counts": measured.counts,
            "num_images": {**measured.num_images, "train": used},
            "failures": dict(failures),
            "examples": self.examples(),
            "warnings": self._class_warnings(measured.counts["train"]) + measured.warnings,
            "seconds": {"train": self.train_s, "measure": time.monotonic() - started},
        }


_STATE = (
    *("epoch", "step", "best_score", "best_epoch", "since_best", "loss_total", "loss_count", "curve", "train_s"),
    *("pixels", "seen"),
)
"""What a checkpoint keeps beside the weights, under the names of the worker's attributes."""
