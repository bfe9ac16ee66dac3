"""What drafting gains: acceptance and speed of each way to draft, on texts that repeat themselves and not.

Every text is continued without drafts and with them in turn, `--rounds` times, on the same engine settings;
the table has medians of each pair's ratio. The answers must be equal, or this stops.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

from jinn import LLM, SamplingParams

TABLE = "\n".join(f"| {n} | item-{n:03d} | in stock | {n * 7 % 50} EUR |" for n in range(1, 25))
TEXTS = {
    "a table to go on with": f"| no | name | state | price |\n|---|---|---|---|\n{TABLE}\n",
    "code to write out again": (
        "Here is the file:\n\n"
        + "\n".join(f"def add_{n}(x: int) -> int:\n    return x + {n}\n" for n in range(1, 13))
        + "\nHere is the same file again:\n\ndef add_1(x: int) -> int:\n    return x + 1\n\n"
    ),
    "an essay": "The history of the lighthouse begins in antiquity, when",
}


@dataclass(frozen=True)
class Run:
    """One answer: its ids, and how long each took."""

    token_ids: tuple[int, ...]
    seconds_per_token: float


@dataclass
class Row:
    """A drafter on a text, against none."""

    text: str
    drafter: str
    ratios: list[float]
    num_drafts: int
    num_accepted: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a file, folder or pulled name; the packaged model without one")
    parser.add_argument("--drafters", nargs="+", default=["ngram:4", "ngram:8"], metavar="KIND:TOKENS")
    parser.add_argument("--draft-model", help="for draft:TOKENS")
    parser.add_argument("--tokens", type=int, default=200, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    print("| text | drafter | tokens per step | drafts that were right | speed |")
    print("|---|---|---|---|---|")
    for drafter in arguments.drafters:
        for row in measure(drafter, arguments):
            share = row.num_accepted / max(row.num_drafts, 1)
            steps = arguments.tokens * arguments.rounds - row.num_accepted
            low, middle, high = min(row.ratios), statistics.median(row.ratios), max(row.ratios)
            print(
                f"| {row.text} | {row.drafter} | {arguments.tokens * arguments.rounds / steps:.2f} "
                f"| {row.num_accepted} of {row.num_drafts} ({share:.0%}) "
                f"| **{middle:.2f}×** ({low:.2f} to {high:.2f}) |"
            )


def measure(drafter: str, arguments: argparse.Namespace) -> list[Row]:
    kind, _, num_tokens = drafter.partition(":")
    common = {"threads": arguments.threads}
    with (
        LLM(arguments.model, **common) as plain,
        LLM(
            arguments.model,
            speculative=kind,
            num_speculative_tokens=int(num_tokens or 4),
            draft_model=arguments.draft_model if kind == "draft" else None,
            **common,
        ) as drafting,
    ):
        return [compare(name, text, drafter, plain, drafting, arguments) for name, text in TEXTS.items()]


def compare(
    name: str, text: str, drafter: str, plain: LLM, drafting: LLM, arguments: argparse.Namespace
) -> Row:
    before = drafting.stats
    ratios = []
    for _ in range(arguments.rounds):
        slow, fast = run(plain, text, arguments.tokens), run(drafting, text, arguments.tokens)
        if slow.token_ids != fast.token_ids:
            raise SystemExit(f"{drafter} on {name!r}: the answers differ")
        ratios.append(slow.seconds_per_token / fast.seconds_per_token)
    after = drafting.stats
    return Row(
        name,
        drafter,
        ratios,
        after.num_draft_tokens - before.num_draft_tokens,
        after.num_accepted_tokens - before.num_accepted_tokens,
    )


def run(llm: LLM, text: str, num_tokens: int) -> Run:
    """Greedy; the prompt is read before the clock starts."""
    llm.generate([text], SamplingParams(temperature=0.0, max_tokens=1))
    started = time.perf_counter()
    (answer,) = llm.generate([text], SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=num_tokens))
    return Run(tuple(answer.token_ids), (time.perf_counter() - started) / num_tokens)


if __name__ == "__main__":
    main()
