"""Builds a step's `Batch` out of what each sequence computes."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import numpy as np

from jinn.engine.scheduler import Chunk
from jinn.ops.protocol import NO_ADAPTER, Batch, IntArray


def pack(
    token_ids: SequenceOf[IntArray],
    starts: SequenceOf[int],
    blocks: SequenceOf[IntArray],
    logit_rows: SequenceOf[int],
) -> Batch:
    """Tokens of some sequences, from position `starts[s]` on, packed end to end.

    `blocks[s]` are the ids of the sequence's blocks; unused places of `block_tables` are 0.
    """
    num_tokens = np.array([len(ids) for ids in token_ids], np.int32)
    query_start = np.zeros(len(num_tokens) + 1, np.int32)
    np.cumsum(num_tokens, out=query_start[1:])
    block_tables = np.zeros((len(blocks), max(map(len, blocks))), np.int32)
    for index, ids in enumerate(blocks):
        block_tables[index, : len(ids)] = ids
    return Batch(
        np.concatenate(token_ids),
        positions=np.concatenate(
            [np.arange(start, start + n, dtype=np.int32) for start, n in zip(starts, num_tokens, strict=True)]
        ),
        query_start=query_start,
        context_lens=np.array(starts, np.int32) + num_tokens,
        block_tables=block_tables,
        logit_rows=np.array(logit_rows, np.int32),
    )


def with_states(
    batch: Batch, slots: SequenceOf[int], num_drafts: SequenceOf[int], num_accepted: SequenceOf[int]
) -> Batch:
    """The batch with `Batch`'s fields of recurrent states, one number per sequence."""
    return replace(
        batch,
        state_slots=np.array(slots, np.int32),
        num_drafts=np.array(num_drafts, np.int32),
        num_accepted=np.array(num_accepted, np.int32),
    )


def with_adapters(batch: Batch, adapters: SequenceOf[int]) -> Batch:
    """The batch with the number of each sequence's adapter, or NO_ADAPTER."""
    return replace(batch, adapters=np.array(adapters, np.int32))


def batch_of(chunks: SequenceOf[Chunk]) -> Batch:
    """The chunks' tokens, with logits of each last known token and each draft where the chunk is the last."""
    rows: list[int] = []
    offset = 0
    for chunk in chunks:
        offset += chunk.num_tokens
        if chunk.is_last:
            rows.extend(range(offset - 1 - len(chunk.drafts), offset))
    batch = pack(
        [chunk.token_ids() for chunk in chunks],
        [chunk.start for chunk in chunks],
        [chunk.sequence.table.blocks for chunk in chunks],
        rows,
    )
    adapters = [chunk.sequence.adapter for chunk in chunks]
    if any(adapter != NO_ADAPTER for adapter in adapters):
        batch = with_adapters(batch, adapters)
    if chunks[0].sequence.state_slot is None:
        return batch
    return with_states(
        batch,
        [chunk.sequence.slot for chunk in chunks],
        [len(chunk.drafts) + chunk.keeps_last_aside for chunk in chunks],
        [chunk.sequence.num_pending_tokens for chunk in chunks],
    )
