"""What ``winnow accept`` promises on labelled photographs, and what then holds: audit and truth on disjoint parts.

FOLDER is as for ``bench/heads.py``. Two sets of answers are looked at:

- *held out*: of a head on all labels of train, to val and test together (val chose its strength and temperature);
- *all*: every photograph is answered by a head that never saw its contributor: five parts by contributor, of which
  three teach, one chooses and one is answered, in turn.

Again and again a part drawn at random is the audit, of which the first look makes a claim, and the others show which
share of the answers it would accept, and how many of those are wrong.

::

    python bench/accept.py FOLDER
    python bench/accept.py FOLDER --max-error 0.05 0.1 --draws 1000
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from click import echo
from numpy.typing import NDArray

from photographs import Photographs, photographs
from winnow import uncertainty
from winnow.risk import largest_claim, share_of_look

PARTS = 5
Answers = tuple[NDArray[np.float32], NDArray[np.bool_]]
"""Confidence and whether the answer is wrong, (N,)."""


def answers(
    photos: Photographs, teach: NDArray[np.int64], choose: NDArray[np.int64], ask: NDArray[np.int64]
) -> Answers:
    """What a head says that ``teach`` taught and ``choose`` calibrated."""
    head = photos.head(teach, choose, np.concatenate([teach, choose]))
    probabilities = uncertainty.softmax(head.logits(photos.scaled_ND[ask]) / (head.temperature or 1.0))
    return uncertainty.confidence(probabilities), probabilities.argmax(axis=1) != photos.classes_N[ask]


def held_out(photos: Photographs) -> Answers:
    """To val and test, by the head on all labels of train."""
    val, test = photos.of("val"), photos.of("test")
    return answers(photos, photos.of("train"), val, np.concatenate([val, test]))


def crossed(photos: Photographs) -> Answers:
    """To all photographs, each by a head that saw none of its contributor's."""
    groups, numbers = np.unique(photos.groups_N, return_inverse=True)
    parts_N = (np.random.default_rng(0).permutation(len(groups)) % PARTS)[numbers]
    found = []
    for part in range(PARTS):
        chooser = (part + 1) % PARTS
        teach = np.flatnonzero((parts_N != part) & (parts_N != chooser))
        found.append(answers(photos, teach, np.flatnonzero(parts_N == chooser), np.flatnonzero(parts_N == part)))
    return np.concatenate([each[0] for each in found]), np.concatenate([each[1] for each in found])


def row(name: str, said: Answers, num_audit: int, max_error: float, delta: float, draws: int) -> str:
    """A row of the table: means over the draws that made a claim."""
    confidence_N, wrong_N = said
    random = np.random.default_rng(0)
    claims = []
    for _ in range(draws):
        order = random.permutation(len(wrong_N))
        audit, others = order[:num_audit], order[num_audit:]
        claim = largest_claim(confidence_N[audit], wrong_N[audit], max_error, delta)
        if claim is not None:
            inside_N = confidence_N[others] >= np.float32(claim.threshold)
            error = float(wrong_N[others][inside_N].mean()) if inside_N.any() else 0.0
            claims.append((inside_N.mean(), claim.bound, error, error > max_error))
    cells = [name, f"{num_audit:,}", f"{len(wrong_N) - num_audit:,}", f"{max_error:.0%}", f"{len(claims)} of {draws}"]
    if not claims:
        return f"| {' | '.join(cells)} | | | | |"
    coverages, bounds, errors, broken = np.array(claims).T
    low, high = np.quantile(coverages, (0.05, 0.95))
    cells += [
        f"{coverages.mean():.1%} ({low:.0%} to {high:.0%})",
        f"{bounds.mean():.1%}",
        f"{errors.mean():.1%}",
        f"{int(broken.sum())} of {draws}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--max-error", type=float, nargs="+", default=[0.1, 0.15])
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--audits", type=int, nargs="*", default=[150, 300], help="sizes of the audit, besides a half")
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--crop", type=float, default=1.0)
    parser.add_argument("--cache", type=Path, help="folder that keeps the features")
    parser.add_argument("--out", type=Path, help="file to which the table is written as well")
    arguments = parser.parse_args()
    delta = share_of_look(1.0 - arguments.confidence, 1)
    photos = photographs(arguments.folder, arguments.crop, arguments.cache)
    lines = [
        "| answers | audit | others | at most | claims | accepted of the others (5 to 95 % of draws) | bound | "
        "wrong of those | more than promised |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, said in (("held out", held_out(photos)), ("all", crossed(photos))):
        num = len(said[1])
        echo(f"{name}: {num:,} answers, {said[1].mean():.1%} wrong")
        for max_error in arguments.max_error:
            for num_audit in sorted({*arguments.audits, num // 2}):
                if num_audit <= num // 2:
                    lines.append(row(name, said, num_audit, max_error, delta, arguments.draws))
    text = "\n".join(lines)
    echo(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
