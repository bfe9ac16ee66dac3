"""How many prompt tokens a step may read while other sequences wait for their next token."""

from __future__ import annotations

_FIRST_TOKENS = 16  # while nothing is known


class StepSize:
    """The prompt tokens that steps can read in `ms` milliseconds, as far as the last ones tell.

    More tokens never take less time, and k times as many at most k times, since weights are read once a step.
    So a step within the time says how many would have been, and one beyond it how many are too many. Times
    change: later tokens of a prompt attend to more, and machines pause. So each step counts, but growth goes
    half of the way, and a step takes away half at most.
    """

    def __init__(self, ms: float) -> None:
        self._ms = ms
        self._tokens = float(_FIRST_TOKENS)

    def note(self, num_tokens: int, ms: float) -> None:
        """A step that read `num_tokens` prompt tokens took `ms`."""
        fitting = num_tokens * self._ms / ms
        if ms > self._ms:
            self._tokens = min(self._tokens, max(fitting, self._tokens / 2, 1.0))
        elif fitting > self._tokens:
            self._tokens += (fitting - self._tokens) / 2

    @property
    def tokens(self) -> int:
        """At least 1."""
        return int(self._tokens)
