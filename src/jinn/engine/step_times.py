"""How long steps take by the prompt tokens they read, to choose how many fit into a given time."""

from __future__ import annotations

_FIRST_TOKENS = 16  # while nothing short enough is known


class StepTimes:
    """Times of steps so far, one mean for each power of two of prompt tokens, the recent ones counting most.

    More tokens never take less time, and k times as many at most k times: weights are read once a step. So
    what one size took bounds what others take.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[float, float]] = {}  # mean tokens and ms, by bit length

    def note(self, num_tokens: int, ms: float) -> None:
        """A step that read `num_tokens` prompt tokens took `ms`."""
        mean_tokens, mean_ms = self._seen.get(num_tokens.bit_length(), (num_tokens, ms))
        self._seen[num_tokens.bit_length()] = (mean_tokens + num_tokens) / 2, (mean_ms + ms) / 2

    def most_tokens(self, ms: float) -> int:
        """The most tokens that a step of `ms` should read; at least 1.

        A size that once took longer is tried again, lest a pause of the machine count for ever.
        """
        within = [tokens * ms / took for tokens, took in self._seen.values() if took <= ms]
        beyond = [tokens for tokens, took in self._seen.values() if took > ms]
        if within:
            return int(min([max(within), *beyond]))
        return max(1, int(min([_FIRST_TOKENS, *(tokens / 2 for tokens in beyond)])))
