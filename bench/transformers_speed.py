"""Times transformers in bfloat16 as `jinn bench` times jinn: random tokens, and the last one's logits only.

Prints one JSON object: tokens per second of each repeat, `prefill` (none without a prompt) and `decode`.
"""

from __future__ import annotations

import argparse
import json
from time import perf_counter

import torch
from transformers import AutoModelForCausalLM, DynamicCache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    for name in ("threads", "prompt", "depth", "decode", "repeats"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.bfloat16)
    token_ids = torch.randint(0, model.config.vocab_size, (1, max(options.prompt, options.depth, 1)))

    def read(num_tokens: int, cache: DynamicCache) -> None:
        model(token_ids[:, :num_tokens], past_key_values=cache, logits_to_keep=1)

    def prefill() -> float:
        started = perf_counter()
        read(options.prompt, DynamicCache())
        return options.prompt / (perf_counter() - started)

    def decode() -> float:
        cache = DynamicCache()
        if options.depth:
            read(options.depth, cache)
        started = perf_counter()
        for _ in range(options.decode):
            read(1, cache)
        return options.decode / (perf_counter() - started)

    with torch.inference_mode():
        read(8, DynamicCache())  # what is made when it is first used
        speeds = {
            "prefill": [prefill() for _ in range(options.repeats)] if options.prompt else [],
            "decode": [decode() for _ in range(options.repeats)],
        }
    print(json.dumps(speeds))


if __name__ == "__main__":
    main()
