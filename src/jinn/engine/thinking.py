"""How far a sequence is in its thoughts, and the tokens that close them once their budget is spent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jinn.engine.messages import ThinkingBudget


@dataclass(slots=True)
class Thinking:
    """One sequence's way through its budget.

    Attributes:
        num_tokens: thought so far, closing tokens included; None before the thoughts and after them.
    """

    budget: ThinkingBudget
    num_tokens: int | None
    is_over: bool = False

    @classmethod
    def start(cls, budget: ThinkingBudget) -> Thinking:
        return cls(budget, 0 if budget.start_id is None else None)

    def advance(self, token_id: int) -> None:
        """Take the sequence's next token."""
        budget = self.budget
        if self.num_tokens is None:
            if token_id == budget.start_id and not self.is_over:
                self.num_tokens = 0
            return
        num_left = budget.max_tokens - self.num_tokens
        self.num_tokens += 1
        if (num_left > 0 and token_id == budget.end_id) or num_left == 1 - len(budget.closing_ids):
            self.num_tokens, self.is_over = None, True

    def forced_id(self, next_ids: Sequence[int] = ()) -> int | None:
        """The token that must follow, after `next_ids` if those come first; None where it is drawn."""
        state = self
        if next_ids:
            state = Thinking(self.budget, self.num_tokens, self.is_over)
            for token_id in next_ids:
                state.advance(token_id)
        if state.num_tokens is None or state.num_tokens < self.budget.max_tokens:
            return None
        return self.budget.closing_ids[state.num_tokens - self.budget.max_tokens]
