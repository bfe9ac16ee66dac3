"""How many prompt tokens a step may read while other sequences wait for their next token."""

from __future__ import annotations

_FIRST_TOKENS = 16  # while nothing is known


class StepSize:
    """The prompt tokens that steps can read in `ms` milliseconds, as far as the last ones tell.

    More tokens never take less time, and k times as many at most k times, since weights are read once a step.
    So a step within the time says how many would have been, and one beyond it how many are too many. Times
    change: later tokens of a prompt attend to more, and machines pause. So each step counts, but growth goes
    half of the way, or one token, and a step takes away half at most. No step reads more than `max_tokens`.
    """

    def __init__(self, ms: float, max_tokens: int) -> None:
        self._ms = ms
        self._max_tokens = max_tokens
        self._tokens = float(min(_FIRST_TOKENS, max_tokens))

    def note(self, num_tokens: int, ms: float) -> None:
        """A step that read `num_tokens` prompt tokens took `ms`."""
        fitting = num_tokens * self._ms / ms
        if ms > self._ms:
            self._tokens = min(self._tokens, max(fitting, self._tokens / 2, 1.0))
        else:
            larger = max((self._tokens + fitting) / 2, num_tokens + 1.0, self._tokens)
            self._tokens = min(larger, self._max_tokens)

    @property
    def tokens(self) -> int:
        """At least 1."""
        return int(self._tokens)
