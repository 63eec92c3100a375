"""Charts as SVG, from numbers alone. Colours come from the page's style sheet, so that they suit light and dark.

Every chart is drawn for a width of 360 units, on which its text is legible on a telephone, and says in words what it
shows (``aria-label``). The numbers themselves stand in a table beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from markupsafe import Markup

from winnow.audit import CurvePoint
from winnow.evaluation import Slice
from winnow_jobs.report.gather import CalibrationBin, EpochPoint, Measured, ModelPoint

WIDTH, HEIGHT = 360, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 12, 12, 42


class Plot:
    """An area with two axes, and marks on it.

    Args:
        x, y: lowest and highest value of each axis.
        height: of the chart, in units.
        left: room for the labels of the y axis.
    """

    def __init__(
        self, x: tuple[float, float], y: tuple[float, float], *, height: int = HEIGHT, left: int = _LEFT
    ) -> None:
        self._x, self._y = x, y
        self._height, self._left = height, left
        self._marks: list[str] = []

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Place of a value, kept inside of the area."""
        (x0, x1), (y0, y1) = self._x, self._y
        share_x, share_y = (min(max((v - a) / (b - a), 0.0), 1.0) for v, a, b in ((x, x0, x1), (y, y0, y1)))
        bottom = self._height - _BOTTOM
        return self._left + share_x * (WIDTH - _RIGHT - self._left), bottom - share_y * (bottom - _TOP)

    def add(self, mark: str) -> None:
        self._marks.append(mark)

    def x_axis(self, title: str, ticks: Iterable[tuple[float, str]]) -> None:
        bottom = self._height - _BOTTOM
        for value, label in ticks:
            x, _ = self.at(value, self._y[0])
            self.add(f'<path class="tick" d="M{x:.1f} {bottom}v4"/>')
            self.add(f'<text class="label" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{escape(label)}</text>')
        middle = (self._left + WIDTH - _RIGHT) / 2
        self.add(f'<path class="axis" d="M{self._left} {bottom}H{WIDTH - _RIGHT}"/>')
        self.add(
            f'<text class="title" x="{middle:.1f}" y="{self._height - 6}" text-anchor="middle">{escape(title)}</text>'
        )

    def y_axis(self, title: str, ticks: Iterable[tuple[float, str]]) -> None:
        for value, label in ticks:
            _, y = self.at(self._x[0], value)
            self.add(f'<path class="grid" d="M{self._left} {y:.1f}H{WIDTH - _RIGHT}"/>')
            self.add(
                f'<text class="label" x="{self._left - 6}" y="{y + 3.5:.1f}" text-anchor="end">{escape(label)}</text>'
            )
        middle = (_TOP + self._height - _BOTTOM) / 2
        self.add(
            f'<text class="title" transform="translate(11 {middle:.1f}) rotate(-90)" text-anchor="middle">'
            f"{escape(title)}</text>"
        )

    def line(self, points: Sequence[tuple[float, float]], style: str) -> None:
        self.add(f'<path class="line {style}" d="M{self._path(points)}"/>')

    def band(self, points: Sequence[tuple[float, float, float]], style: str) -> None:
        """Between a low and a high value at each x."""
        lower = [(x, low) for x, low, _ in points]
        upper = [(x, high) for x, _, high in reversed(points)]
        self.add(f'<path class="band {style}" d="M{self._path([*lower, *upper])}Z"/>')

    def whisker(self, x: float, low: float, high: float, style: str) -> None:
        (left, bottom), (_, top) = self.at(x, low), self.at(x, high)
        self.add(f'<path class="whisker {style}" d="M{left:.1f} {bottom:.1f}V{top:.1f}"/>')

    def dot(self, x: float, y: float, radius: float, style: str) -> None:
        left, top = self.at(x, y)
        self.add(f'<circle class="dot {style}" cx="{left:.1f}" cy="{top:.1f}" r="{radius:.1f}"/>')

    def _path(self, points: Sequence[tuple[float, float]]) -> str:
        return "L".join(f"{x:.1f} {y:.1f}" for x, y in (self.at(*point) for point in points))

    def svg(self, label: str) -> Markup:
        """The chart; ``label`` says in a sentence what it shows."""
        return _svg(WIDTH, self._height, label, self._marks)


def _svg(width: float, height: float, label: str, marks: Sequence[str], style: str = "chart") -> Markup:
    return Markup(
        f'<svg class="{style}" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">'
        f"{''.join(marks)}</svg>"
    )


def percent(value: float | None, digits: int = 1) -> str:
    """``75.5%``; a dash where there is no value."""
    return "–" if value is None else f"{100 * value:.{digits}f}%"


def ticks_to(highest: float, num: int = 4) -> list[float]:
    """Round numbers from 0 on, about ``num``, the last at least ``highest``."""
    rough = max(highest, 1e-9) / num
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * (1 - 1e-9))
    return [step * number for number in range(math.ceil(highest / step - 1e-9) + 1)] if highest > 0 else [0.0, step]


_TENTHS = [(number / 5, f"{number * 20}%") for number in range(6)]


def _percents(values: Sequence[float]) -> list[tuple[float, str]]:
    digits = 0 if all(abs(100 * value - round(100 * value)) < 1e-6 for value in values) else 1
    return [(value, f"{100 * value:.{digits}f}%") for value in values]


def _counts(values: Sequence[float]) -> list[tuple[float, str]]:
    return [(value, f"{value:,.0f}") for value in values if value == round(value)]


# ------------------------------------------------------------------------------------------------------------- charts


def histogram(counts: Sequence[int]) -> Markup:
    """Images by confidence, in steps of equal width from 0 to 1."""
    ticks = ticks_to(max(counts))
    plot = Plot((0.0, 1.0), (0.0, ticks[-1]))
    plot.y_axis("images", _counts(ticks))
    for number, count in enumerate(counts):
        left, top = plot.at(number / len(counts), count)
        right, bottom = plot.at((number + 1) / len(counts), 0.0)
        if count:
            height = max(bottom - top, 0.8)  # one image among a million is to be seen
            plot.add(
                f'<rect class="bar" x="{left + 0.6:.1f}" y="{bottom - height:.1f}" width="{right - left - 1.2:.1f}" '
                f'height="{height:.1f}"/>'
            )
    plot.x_axis("confidence of the answer", _TENTHS)
    return plot.svg(f"Histogram of {sum(counts):,} images by confidence; {percent(share_sure(counts))} are above 90%.")


def share_sure(counts: Sequence[int]) -> float:
    """Share of the images in the highest tenth of a histogram."""
    return sum(counts[len(counts) * 9 // 10 :]) / sum(counts)


def reliability(bins: Sequence[CalibrationBin], ece: float) -> Markup:
    """Share of right answers against confidence; true probabilities lie on the diagonal."""
    plot = Plot((0.0, 1.0), (0.0, 1.0))
    plot.y_axis("right answers", _TENTHS)
    plot.line([(0.0, 0.0), (1.0, 1.0)], "reference")
    most = max(each.right.num for each in bins)
    for each in bins:
        plot.whisker(each.confidence, each.right.low, each.right.high, "one")
    plot.line([(each.confidence, each.right.value or 0.0) for each in bins], "one thin")
    for each in bins:
        plot.dot(each.confidence, each.right.value or 0.0, 2.5 + 4.5 * math.sqrt(each.right.num / most), "one")
    plot.x_axis("confidence of the answer", _TENTHS)
    return plot.svg(
        f"Calibration plot: share of right answers in {len(bins)} groups of like confidence. "
        f"Expected calibration error {ece:.3f}."
    )


def coverage_error(curves: Sequence[tuple[str, Sequence[CurvePoint], str]]) -> Markup:
    """Error rate of the surest answers against their share of all; a curve is a name, its points, and its colour."""
    points = [point for _, found, _ in curves for point in found]
    highest = max((point.error.value or 0.0 for point in points), default=0.0)
    ticks = ticks_to(min(1.0, max(0.05, 1.35 * highest)))
    plot = Plot((0.0, 1.0), (0.0, ticks[-1]))
    plot.y_axis("wrong among those kept", _percents(ticks))
    for _, found, style in curves:
        plot.band([(point.coverage, point.error.low, point.error.high) for point in found], style)
    for _, found, style in curves:
        plot.line([(point.coverage, point.error.value or 0.0) for point in found], style)
        if len(found) == 1:
            plot.dot(found[0].coverage, found[0].error.value or 0.0, 3, style)
    plot.x_axis("answers kept, the surest first", _TENTHS)
    said = "; ".join(
        f"{name}: {percent(found[-1].error.value)} wrong when all are kept" for name, found, _ in curves if found
    )
    return plot.svg(f"Error against coverage. {said}.")


def learning(points: Sequence[ModelPoint]) -> Markup:
    """Score of each model version against the number of labels it learned from."""
    shown = [(point, point.value) for point in points if point.value is not None]
    xs = ticks_to(max(point.num_labels for point, _ in shown))
    lowest = min(value if point.low is None else point.low for point, value in shown)
    highest = max(value if point.high is None else point.high for point, value in shown)
    bottom, top = math.floor(lowest * 10) / 10, min(1.0, math.ceil(highest * 10) / 10)
    if top - bottom < 0.15:  # a small difference is to look small
        bottom, top = max(0.0, bottom - 0.1), min(1.0, top + 0.1)
    step = 0.05 if top - bottom < 0.35 else 0.1 if top - bottom < 0.65 else 0.2
    plot = Plot((0.0, xs[-1]), (bottom, top))
    measure = shown[0][0].measure
    ticks = [bottom + number * step for number in range(int((top - bottom) / step + 1e-6) + 1)]
    as_text = _percents(ticks) if measure == "accuracy" else [(value, f"{value:.2f}") for value in ticks]
    plot.y_axis(measure, as_text)
    ordered = sorted(shown, key=lambda pair: pair[0].num_labels)
    if len({point.num_labels for point, _ in ordered}) == len(ordered):
        plot.line([(point.num_labels, value) for point, value in ordered], "one thin")
    for point, _ in shown:
        if point.low is not None and point.high is not None:
            plot.whisker(point.num_labels, point.low, point.high, "one")
    for point, value in shown:
        plot.dot(point.num_labels, value, 5, "one" if point.production else "one hollow")
    if len(shown) <= 8:
        for point, value in shown:
            x, y = plot.at(point.num_labels, value)
            anchor, shift = ("end", -8) if x > WIDTH * 0.8 else ("start", 8)
            number = escape(point.name.rpartition("@")[2])
            plot.add(f'<text class="label" x="{x + shift:.1f}" y="{y - 6:.1f}" text-anchor="{anchor}">@{number}</text>')
    plot.x_axis("images that it learned from", _counts(xs))
    said = ", ".join(f"{point.name} {value:.3f} of {point.num_labels:,} labels" for point, value in shown[-8:])
    return plot.svg(f"Learning curve, {measure}: {said}.")


def training(epochs: Sequence[EpochPoint], best: int) -> Markup:
    """Loss on the images that teach, and on val, by epoch; a dot on the epoch whose weights were kept."""
    judged = [(point.epoch, point.val_loss) for point in epochs if point.val_loss is not None]
    taught = [(point.epoch, point.train_loss) for point in epochs]
    ticks = ticks_to(max(loss for _, loss in (*taught, *judged)))
    last = epochs[-1].epoch
    plot = Plot((0.0, float(last)), (0.0, ticks[-1]))
    plot.y_axis("loss", [(value, f"{value:.3g}") for value in ticks])
    for points, style in ((taught, "two"), (judged, "one")):
        if len(points) > 1:
            plot.line(points, style)
        for epoch, loss in points:
            if epoch == best or len(points) == 1:
                plot.dot(epoch, loss, 4, style)
    plot.x_axis("epoch", _counts([value for value in ticks_to(float(last)) if value <= last]))
    said = f"train {taught[0][1]:.3f} to {taught[-1][1]:.3f}"
    if judged:
        said += f", val {judged[0][1]:.3f} to {judged[-1][1]:.3f}"
    return plot.svg(f"Loss by epoch: {said}.")


def confusion_map(measured: Measured) -> Markup:
    """Label by row, answer by column, for more classes than fit into a table of numbers."""
    names: list[str | None] = list(measured.names)
    if any(None in pair for pair in measured.cells):
        names.append(None)
    num = len(names)
    room, cell = 124.0, 14.0
    width = room + num * cell + 6
    height = room + num * cell + 6
    marks = []
    for row, said in enumerate(names):
        total = sum(measured.cells.get((said, answer), 0) for answer in names)
        y = room + row * cell
        shown = "all others" if said is None else said
        marks.append(
            f'<text class="label" x="{room - 5}" y="{y + 10.5}" text-anchor="end">{escape(shorten(shown))}</text>'
        )
        x = room + row * cell
        marks.append(
            f'<text class="label" transform="translate({x + 10.5} {room - 5}) rotate(-90)">'
            f"{escape(shorten(shown))}</text>"
        )
        for column, answer in enumerate(names):
            count = measured.cells.get((said, answer), 0)
            if count:
                style = "wrong" if row != column else "right" if said is not None else "other"
                other = "all others" if answer is None else answer
                marks.append(
                    f'<rect class="cell {style}" x="{room + column * cell:.0f}" y="{y:.0f}" width="{cell - 1}" '
                    f'height="{cell - 1}" fill-opacity="{0.12 + 0.88 * count / total:.2f}">'
                    f"<title>{escape(shown)} → {escape(other)}: {count:,}</title></rect>"
                )
    side = num * cell
    marks.append(f'<rect class="frame" x="{room - 1}" y="{room - 1}" width="{side + 1:.0f}" height="{side + 1:.0f}"/>')
    return _svg(width, height, f"Confusion matrix of {num} classes: label by row, answer by column.", marks, "map")


def interval_bar(value: float, low: float, high: float, reference: float | None, bounds: tuple[float, float]) -> Markup:
    """A value with its interval on a line between the bounds, and a reference, for a row of a table."""
    width, middle = 140, 8

    def at(share: float) -> float:
        return 4 + (share - bounds[0]) / (bounds[1] - bounds[0]) * (width - 8)

    marks = [f'<path class="grid" d="M4 {middle}H{width - 4}"/>']
    if reference is not None and bounds[0] <= reference <= bounds[1]:
        marks.append(f'<path class="line reference" d="M{at(reference):.1f} 1V15"/>')
    marks.append(f'<path class="whisker one" d="M{at(low):.1f} {middle}H{at(high):.1f}"/>')
    marks.append(f'<circle class="dot one" cx="{at(value):.1f}" cy="{middle}" r="3.5"/>')
    return Markup(f'<svg class="spark" viewBox="0 0 {width} 16" aria-hidden="true">{"".join(marks)}</svg>')


def bounds_of(slices: Sequence[Slice]) -> tuple[float, float]:
    """Tenths between which all intervals lie."""
    low, high = min(each.low for each in slices), max(each.high for each in slices)
    return math.floor(low * 10) / 10, max(math.ceil(high * 10), math.floor(low * 10) + 1) / 10


def shorten(text: str, most: int = 18) -> str:
    """The text, or its start and end with ``…`` between them."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-(most - most // 2 - 1) :]}"
