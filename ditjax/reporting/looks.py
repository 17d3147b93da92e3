"""Which colour and which marker a run has, the same in every plot of a page."""

from collections.abc import Sequence

from ditjax.reporting.svg import MARKERS, Looks
from ditjax.runs.results import Found
from ditjax.studies.words import short


class Encoding:
    """Colour: the patch, or where all have one patch the block, or else the size; marker: the rest.

    Beyond as many values as there are markers a marker would mean two things: all are the first.
    """

    def __init__(self, runs: Sequence[Found]) -> None:
        self._runs = list(runs)
        varied = [key for key in ("patch", "block", "size") if len(self._distinct((key,))) > 1]
        self._colour = tuple(varied[:1])
        self._marker = tuple(key for key in ("size", "block") if key in varied[1:])
        colours = self._distinct(self._colour)
        if self._colour == ("patch",):
            colours.reverse()  # few tokens first, as the costs grow
        markers = self._distinct(self._marker)
        self._colours = {words: i for i, words in enumerate(colours)}
        self._named = 1 < len(markers) <= len(MARKERS)
        self._markers = {words: i if self._named else 0 for i, words in enumerate(markers)}

    def of(self, each: Found) -> Looks:
        return Looks(
            self._colours[_words(each, self._colour)], self._markers[_words(each, self._marker)]
        )

    @property
    def colours(self) -> tuple[str, list[tuple[str, Looks]]]:
        """What colours stand for, and (value, looks) of each; no values where all are alike."""
        shown = self._colours if len(self._colours) > 1 else {}
        return " ".join(self._colour), [(words, Looks(i, 0)) for words, i in shown.items()]

    @property
    def markers(self) -> tuple[str, list[tuple[str, Looks]]]:
        shown = self._markers if self._named else {}
        return " ".join(self._marker), [(words, Looks(0, i)) for words, i in shown.items()]

    def _distinct(self, keys: tuple[str, ...]) -> list[str]:
        """By patch size, or by the most parameters and Gflops of what carries the words."""
        if keys == ("patch",):
            return [str(p) for p in sorted({each.result["model"]["patch"] for each in self._runs})]
        largest: dict[str, tuple[float, float]] = {}
        for each in self._runs:
            words, cost = _words(each, keys), (each.result["params"], each.result["gflops"])
            largest[words] = max(largest.get(words, (0.0, 0.0)), cost)
        return sorted(largest, key=lambda words: (largest[words], words))


def _words(each: Found, keys: tuple[str, ...]) -> str:
    model = each.result["model"]
    return " ".join(short(str(model[key]), 18) for key in keys)  # type: ignore[literal-required]
