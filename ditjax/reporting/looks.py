"""Which colour and which marker a run has, the same in every plot of a report."""

from collections.abc import Sequence

from ditjax.reporting.study import by_patch, described_by, names_by_size
from ditjax.reporting.style import COLOURS, FAINT, MARKERS, Key, Look
from ditjax.runs.results import Found

_SHAPES = list(MARKERS)


class Encoding:
    """The looks of a study's runs.

    The colour stands for the patch size, if all have the same for the block, else for the size; the
    marker stands for the rest. If there are more values than markers, all have the first marker, so
    that none means two things.
    """

    def __init__(self, runs: Sequence[Found]) -> None:
        varied = [
            key
            for key in ("patch", "block", "size")
            if len({described_by(each, (key,)) for each in runs} - {"-"}) > 1
        ]
        self._colour = tuple(varied[:1])
        self._marker = tuple(key for key in ("size", "block") if key in varied[1:])
        colours = names_by_size(runs, self._colour)
        if self._colour == ("patch",):
            colours.sort(key=by_patch)  # few tokens first, as the costs grow
        markers = names_by_size(runs, self._marker)
        named = len(markers) <= len(_SHAPES)
        self._colours = {words: COLOURS[i % len(COLOURS)] for i, words in enumerate(colours)}
        self._markers = {words: _SHAPES[i if named else 0] for i, words in enumerate(markers)}

    def of(self, each: Found) -> Look:
        """The look of a run."""
        colour, marker = described_by(each, self._colour), described_by(each, self._marker)
        return Look(self._colours[colour], self._markers[marker])

    def keys(self) -> list[Key]:
        """What the colours and the markers stand for; nothing for what is the same for all."""
        colours = {words: Look(colour, _SHAPES[0]) for words, colour in self._colours.items()}
        markers = {words: Look(FAINT, marker) for words, marker in self._markers.items()}
        found = [Key(" ".join(self._colour), colours), Key(" ".join(self._marker), markers)]
        return [key for key in found if len(set(key.values.values())) > 1]
