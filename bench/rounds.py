"""Rounds of labels chosen by a policy against labels chosen at random: accuracy by number of labels.

FOLDER holds labelled photographs as for ``bench/heads.py``; the labels of train are what people would say when asked.
Each seed starts from as many photographs at random, the same for every way. Then, round after round, a head on frozen
features (``winnow train --head``) is fitted on the labels so far and answers the rest, and ``winnow select``'s own code
chooses the next ones. val chooses the head's strength and temperature, as always. Photographs of train that are
near-duplicates of val or test are left out for all ways.

Judged on test; or, to compare policies without looking at test, on photographs of train kept out by contributor
(``--held-out``), others with every seed.

::

    python bench/rounds.py FOLDER                                    # the default policy, three seeds, up to 700
    python bench/rounds.py FOLDER --seeds 10 --out rounds.md
    python bench/rounds.py FOLDER --held-out 0.33 --seeds 8 --most 500 --policy margin=1 --policy entropy=0.5,random=0.5
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from click import echo
from numpy.typing import NDArray

from photographs import Photographs, photographs
from winnow import uncertainty
from winnow.config import Config
from winnow.coreset import Coverage
from winnow.models.linear_head import LinearHead
from winnow.similarity import NearRule
from winnow_jobs.candidates import Covered, Images
from winnow_jobs.measuring import LEAST_VAL
from winnow_jobs.selection import choose_among

Places = NDArray[np.int64]
"""Numbers of photographs."""

DEFAULT, RANDOM = "default", "random choice"
STRATEGIES = {"least_confidence", "margin", "entropy", "diversity", "class_balance", "random"}
CONFIG = {
    "tasks": {
        name: {"kind": kind, "model": "torchvision/mobilenet_v2@IMAGENET1K_V1"}
        for name, kind in (("kind", "classification"), ("alike", "embedding"))
    }
}


@dataclass(frozen=True)
class Race:
    """What all ways share.

    Attributes:
        photos: all of them.
        pool: those that can be labelled.
        val: those that choose strength and temperature.
        judged: those that accuracy is measured on.
        step: labels of a round.
        most: labels of the last round.
        rule: what a near-duplicate is.
    """

    photos: Photographs
    pool: Places
    val: Places
    judged: Places
    step: int
    most: int
    rule: NearRule

    def sizes(self) -> range:
        """Numbers of labels."""
        return range(self.step, self.most + 1, self.step)

    def head(self, labelled: Places) -> LinearHead:
        """The head that these labels teach."""
        photos = self.photos
        if len(self.val) < LEAST_VAL:
            raise SystemExit(f"{len(self.val)} photographs of val are fewer than the {LEAST_VAL} that choose a head")
        return photos.head(labelled, self.val, np.concatenate([self.pool, self.val]))

    def accuracy(self, head: LinearHead) -> float:
        answers = head.logits(self.photos.scaled_ND[self.judged]).argmax(axis=1)
        return float((answers == self.photos.classes_N[self.judged]).mean())

    def choose(self, head: LinearHead, labelled: Places, shares: Mapping[str, float], seed: int) -> Places:
        """The photographs of the next round, as ``winnow select`` chooses them."""
        photos, vectors_ND = self.photos, self.photos.vectors_ND
        rest = np.setdiff1d(self.pool, labelled)
        known = np.concatenate([labelled, self.val])
        probabilities = uncertainty.softmax(head.logits(photos.scaled_ND[rest]) / (head.temperature or 1.0))
        numbers = {
            "confidence": uncertainty.confidence(probabilities),
            "margin": uncertainty.margin(probabilities),
            "entropy": uncertainty.entropy(probabilities),
        }
        candidates = self._images(rest, probabilities.argmax(axis=1), numbers)
        references = self._images(known, photos.classes_N[known], {})
        ties_N = np.random.default_rng(seed).permutation(len(rest))
        coverage = Coverage(
            vectors_ND[rest], candidates.phashes_N, self.rule, num=self.step, start=int(ties_N.argmin())
        )
        coverage.refer(vectors_ND[known], references.phashes_N, references.is_center_N)
        covered = Covered(coverage, np.arange(len(rest)), np.arange(len(rest)))
        choices, _ = choose_among(
            candidates, references, covered, shares, self.step, ties_N=ties_N, num_classes=photos.num_classes
        )
        return rest[[choice.index for choice in choices]]

    def _images(self, places: Places, classes_N: Places, numbers: Mapping[str, NDArray[np.float32]]) -> Images:
        unknown_N = np.zeros(len(places), np.uint64)  # equal bytes are near-duplicates by their vectors, too
        return Images(
            ids_N=np.array([b"%d" % place for place in places]),
            classes_N=classes_N,
            bytes_N=unknown_N,
            pixels_N=unknown_N,
            phashes_N=self.photos.phashes_N[places],
            is_center_N=self.photos.splits_N[places] == "train",
            numbers=numbers,
        )


def without_repeats(photos: Photographs, pool: Places, judged: Places, rule: NearRule) -> Places:
    """The pool without near-duplicates of what judges."""
    coverage = Coverage(photos.vectors_ND[pool], photos.phashes_N[pool], rule, num=0)
    coverage.refer(photos.vectors_ND[judged], photos.phashes_N[judged])
    return pool[~coverage.near_M]


def race_of(photos: Photographs, arguments: argparse.Namespace, seed: int, rule: NearRule) -> Race:
    """The pool and what judges, for a seed."""
    train, val, judged = photos.of("train"), photos.of("val"), photos.of("test")
    if arguments.held_out:
        groups = np.random.default_rng(seed).permutation(np.unique(photos.groups_N[train]))
        counts = np.array([np.sum(photos.groups_N[train] == group) for group in groups])
        kept_out = groups[np.cumsum(counts) <= arguments.held_out * len(train)]
        is_out = np.isin(photos.groups_N[train], kept_out)
        train, judged = train[~is_out], train[is_out]
    pool = without_repeats(photos, train, np.concatenate([val, judged]), rule)
    return Race(photos, pool, val, judged, arguments.step, min(arguments.most, len(pool)), rule)


def run(race: Race, policies: Mapping[str, Mapping[str, float]], seed: int) -> dict[str, list[float]]:
    """Accuracy by number of labels, for each policy and for random choice."""
    order = np.random.default_rng(seed).permutation(race.pool)
    first = race.head(order[: race.step])
    found = {RANDOM: [race.accuracy(first)]}
    for size in race.sizes()[1:]:
        found[RANDOM].append(race.accuracy(race.head(order[:size])))
    for name, shares in policies.items():
        labelled, head = order[: race.step], first
        found[name] = [race.accuracy(head)]
        for size in race.sizes()[1:]:
            labelled = np.concatenate([labelled, race.choose(head, labelled, shares, seed + size)])
            head = race.head(labelled)
            found[name].append(race.accuracy(head))
    return found


def table(sizes: range, found: Mapping[str, NDArray[np.float64]], seeds: int) -> str:
    """Markdown: mean over seeds, and the paired difference to random choice with its range."""
    names = [name for name in found if name != RANDOM]
    lines = [
        f"| labels | {RANDOM} | " + " | ".join(f"{name} | difference (of single seeds)" for name in names) + " |",
        "|---|---|" + "---|---|" * len(names),
    ]
    for place, size in enumerate(sizes):
        cells = [f"{size}", _short(found[RANDOM][:, place].mean())]
        for name in names:
            difference = (found[name] - found[RANDOM])[:, place]
            cells += [
                _short(found[name][:, place].mean()),
                f"{difference.mean():+.3f} ({difference.min():+.3f} to {difference.max():+.3f})",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    for name in names:
        reached = reaches(sizes, found[name].mean(axis=0), float(found[RANDOM][:, -1].mean()))
        mean = (found[name] - found[RANDOM])[:, 1:].mean(axis=1)
        error = mean.std(ddof=1) / seeds**0.5 if seeds > 1 else float("nan")
        lines.append("")
        lines.append(
            f"{name}: {mean.mean():+.4f} ± {error:.4f} (standard error over {seeds} seeds) on the mean of all rounds; "
            + (
                f"reaches {RANDOM}'s accuracy at {sizes[-1]} with {reached:.0f} labels"
                if reached is not None
                else f"does not reach {RANDOM}'s accuracy at {sizes[-1]}"
            )
        )
    return "\n".join(lines)


def reaches(sizes: range, accuracy: NDArray[np.float64], wanted: float) -> float | None:
    """Number of labels, on the line through the rounds' means, at which accuracy is first as high; None if never."""
    if accuracy[0] >= wanted:
        return float(sizes[0])
    for place in range(1, len(sizes)):
        low, high = accuracy[place - 1 : place + 1]
        if high >= wanted:
            return float(sizes[place - 1] + (sizes[place] - sizes[place - 1]) * (wanted - low) / (high - low))
    return None


def _short(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")


def _shares(text: str) -> dict[str, float]:
    shares = {name: float(share) for name, share in (part.split("=") for part in text.split(","))}
    if unknown := sorted(set(shares) - STRATEGIES):
        raise argparse.ArgumentTypeError(f"no such strategy here: {', '.join(unknown)}")
    return shares


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--step", type=int, default=100, help="labels of a round")
    parser.add_argument("--most", type=int, default=700, help="labels after the last round")
    parser.add_argument("--crop", type=float, default=1.0)
    parser.add_argument("--policy", type=_shares, action="append", metavar="NAME=SHARE,…", default=[])
    parser.add_argument("--held-out", type=float, default=0.0, metavar="SHARE", help="of train, which judges, not test")
    parser.add_argument("--cache", type=Path, help="folder that keeps the features")
    parser.add_argument("--out", type=Path, help="file to which the table is written as well")
    arguments = parser.parse_args()
    config = Config.model_validate(CONFIG)
    policies = {DEFAULT: config.policy(DEFAULT, "classification").shares()}
    for shares in arguments.policy:
        policies[", ".join(f"{share:g} {name}" for name, share in shares.items())] = shares
    rule = NearRule(threshold=config.select.near_duplicates)
    photos = photographs(arguments.folder, arguments.crop, arguments.cache)
    races = [race_of(photos, arguments, seed, rule) for seed in range(arguments.seeds)]
    sizes = races[0].sizes()
    echo(
        f"pool {len(races[0].pool)}, val {len(races[0].val)}, judged {len(races[0].judged)} "
        f"({'train, kept out' if arguments.held_out else 'test'})"
    )
    runs = []
    for seed, race in enumerate(races):
        runs.append(run(race, policies, seed))
        for name, accuracies in runs[-1].items():
            echo(f"seed {seed}  {name:50} " + " ".join(_short(each) for each in accuracies))
    found = {name: np.array([each[name] for each in runs]) for name in runs[0]}
    text = table(sizes, found, arguments.seeds)
    if not arguments.held_out:
        train = races[0].pool
        text += f"\n\nall {len(train):,} labels: {_short(races[0].accuracy(races[0].head(train)))}"
    echo(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
