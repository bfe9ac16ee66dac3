"""Requests whose grammars are being compiled, in a thread beside the engine's steps.

Imported only once a request has a grammar.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jinn.engine.constraint import Constraint, GrammarError, Vocabulary
from jinn.engine.messages import Abort, Grammar, Submit

if TYPE_CHECKING:
    import llguidance

    from jinn.text.tokenizer import Tokenizer

_MAX_KEPT_GRAMMARS = 16
_MAX_KEPT_CHARACTERS = 2**20  # of all kept grammars' texts


@dataclass(slots=True, eq=False)
class Compilation:
    """A request that waits for its grammar. `aborts` came meanwhile, each for one choice."""

    request: Submit
    grammar: Grammar
    matcher: Future[llguidance.LLMatcher]
    aborts: list[Abort] = field(default_factory=list)

    @property
    def error(self) -> str | None:
        """Why the grammar cannot be followed, once that is known."""
        error = self.matcher.exception()
        if isinstance(error, GrammarError):
            return str(error)
        return None if error is None else f"the grammar could not be compiled: {type(error).__name__}"


class GrammarQueue:
    """Compiles grammars, the earliest first, and keeps those used last.

    `load_tokenizer` is called once, in the thread that compiles.
    """

    def __init__(
        self, load_tokenizer: Callable[[], Tokenizer], vocab_size: int, eos_token_ids: Collection[int]
    ) -> None:
        self._load_tokenizer = load_tokenizer
        self._vocab_size, self._eos_token_ids = vocab_size, eos_token_ids
        self._vocabulary: Vocabulary | None = None
        self._compiler = ThreadPoolExecutor(1, "grammars")
        self._masks = ThreadPoolExecutor(1, "masks")
        self._kept: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()  # by text, the last used last
        self._compilations: dict[str, Compilation] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._compilations)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._compilations

    def add(self, request: Submit, grammar: Grammar) -> None:
        """Begin to compile a request's grammar."""
        matcher = self._compiler.submit(self._compile, grammar.text)
        self._compilations[request.request_id] = Compilation(request, grammar, matcher)

    def abort(self, request: Abort) -> Submit | None:
        """Drop a request that still waits, and return it; an abort of one choice is kept for when it runs."""
        compilation = self._compilations.get(request.request_id)
        if compilation is None:
            return None
        if request.index is not None:
            compilation.aborts.append(request)
            return None
        del self._compilations[request.request_id]
        compilation.matcher.cancel()
        return compilation.request

    def take(self, max_seconds: float) -> list[Compilation]:
        """The requests whose grammars are ready, or refused; waits for the first for so long at most."""
        futures = [compilation.matcher for compilation in self._compilations.values()]
        ready = wait(futures, max_seconds, FIRST_COMPLETED).done
        taken = [c for c in self._compilations.values() if c.matcher in ready]
        for compilation in taken:
            del self._compilations[compilation.request.request_id]
        return taken

    def constraint(self, compilation: Compilation) -> Constraint:
        """For one choice of a request whose grammar is ready."""
        if self._vocabulary is None:
            raise RuntimeError("nothing has been compiled")
        return Constraint(
            self._vocabulary,
            compilation.matcher.result(),
            self._masks,
            stop_token_ids=compilation.request.sampling.stop_token_ids,
            after_id=compilation.grammar.after_id,
            opening_id=compilation.grammar.opening_id,
        )

    def _compile(self, text: str) -> llguidance.LLMatcher:
        if self._vocabulary is None:
            self._vocabulary = Vocabulary(self._load_tokenizer(), self._vocab_size, self._eos_token_ids)
        matcher = self._kept.pop(text, None) or self._vocabulary.compile(text)
        self._kept[text] = matcher
        while len(self._kept) > _MAX_KEPT_GRAMMARS or sum(map(len, self._kept)) > _MAX_KEPT_CHARACTERS:
            self._kept.popitem(last=False)
        return matcher
