"""The checks of this folder can fail: each fault planted here is noticed by them."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import fake_runner
import numpy as np
import pytest
from fake_runner import (
    FakeRunner,
    PlantedDrafter,
    answer,
    check_against_solo,
    collect,
    make_engine,
    random_requests,
    run,
    run_schedule,
)

from jinn.engine import batch, cache, engine, scheduler, sequence
from jinn.engine.batch import with_states
from jinn.engine.cache import BlockCache
from jinn.engine.messages import SamplingParams, Submit
from jinn.engine.scheduler import Scheduler
from jinn.engine.sequence import Sequence
from jinn.engine.states import StatePool


def check_schedules():
    for seed, (block_size, num_blocks) in enumerate([(4, 20), (5, 14), (16, 12), (4, 80)]):
        rng = random.Random(seed)
        requests = random_requests(rng, 20)
        engine = make_engine(FakeRunner(num_blocks, block_size), max_num_batched_tokens=7 + 10 * seed)
        check_against_solo(requests, run_schedule(engine, requests, rng))
        assert engine.stats.num_used_blocks == 0


def check_tenants():
    engine = make_engine(FakeRunner(32, 4))
    found = []
    for tenant in ("a", "b", "a"):
        engine.submit(Submit("r", tenant, tuple(range(1, 12)), SamplingParams(seed=1, max_tokens=2)))
        found.append(collect(run(engine))["r", 0][0].num_cached_tokens)
    assert found == [0, 0, 10]


def check_states():
    for seed, num_state_slots in enumerate([2, 40]):
        rng = random.Random(seed)
        requests = [replace(r, turn_starts=(3, 9, 20)) for r in random_requests(rng, 12)]
        runner = FakeRunner(40, 4, num_state_slots=num_state_slots)
        drafter = PlantedDrafter(requests, 3, 2, num_state_slots=num_state_slots)
        engine = make_engine(runner, drafter, max_num_batched_tokens=7 + 10 * seed)
        answers = run_schedule(engine, requests, rng)
        check_against_solo(requests, answers, num_state_slots=num_state_slots)


def check_conversation():
    """Each turn computes what is new, and the same prompt again its last token."""
    engine = make_engine(FakeRunner(60, 4, num_state_slots=9), max_model_len=200)
    prompt, found, expected = (1, 2, 3, 4, 5), [], []
    for turn in range(8):
        for tenant in "ab":
            sampling = SamplingParams(seed=turn, max_tokens=6, ignore_eos=True)
            engine.submit(Submit("r", tenant, prompt, sampling))
            outputs = collect(run(engine))["r", 0]
            found.append(outputs[0].num_cached_tokens)
            expected.append(len(prompt) - 3 if turn else 0)
        engine.submit(Submit("again", "b", prompt, replace(sampling, max_tokens=1)))
        found.append(collect(run(engine))["again", 0][0].num_cached_tokens)
        expected.append(len(prompt) - 1)
        prompt = (*prompt, *answer(outputs)[0], 1, 2)
    assert found == expected


def check_everything():
    check_schedules()
    check_tenants()
    check_states()
    check_conversation()


def test_without_a_fault_nothing_is_noticed():
    check_everything()


def forget_to_copy(patch):
    patch.setattr(FakeRunner, "copy_block", lambda self, source, target: None)


def copy_the_wrong_way(patch):
    copy = FakeRunner.copy_block
    patch.setattr(FakeRunner, "copy_block", lambda self, source, target: copy(self, target, source))


def share_between_tenants(patch):
    acquire = BlockCache.acquire
    patch.setattr(BlockCache, "acquire", lambda self, tenant, ids: acquire(self, "everyone", ids))


def never_reuse(patch):
    acquire = BlockCache.acquire
    patch.setattr(BlockCache, "acquire", lambda self, tenant, ids: acquire(self, tenant, ids[:0]))


def match_a_token_too_many(patch):
    longest_match = cache._longest_match

    def match(nodes, key):
        node, length = longest_match(nodes, key)
        return node, min(length + 4, len(key)) if node else length

    patch.setattr(cache, "_longest_match", match)


def fill_a_shared_block(patch):
    """Go on in the matched block itself instead of a copy."""
    patch.setattr(BlockCache, "_copy_partial", _share_partial)


def _share_partial(self, table, key):
    source, length = cache._longest_match(table.node.children, key)
    if source is not None:
        table.append(source.block)
        table.tail_key = key[:length]


def evict_what_is_held(patch):
    patch.setattr(BlockCache, "_hold", lambda self, node: None)


def free_a_block_twice(patch):
    let_go = BlockCache._let_go

    def let_go_and_free(self, node):
        let_go(self, node)
        self._free.append(node.block)

    patch.setattr(BlockCache, "_let_go", let_go_and_free)


def leak_the_tail(patch):
    withdraw = BlockCache._withdraw_tail

    def forget(self, table):
        withdraw(self, table)
        table.num_blocks = min(table.num_blocks, table.num_nodes + 1)

    patch.setattr(BlockCache, "_withdraw_tail", forget)


def show_tokens_before_they_are_computed(patch):
    commit = Scheduler.commit

    def commit_too_much(self, chunk, num_accepted=0):
        stop = min(chunk.stop + 1, chunk.sequence.num_tokens)
        commit(self, replace(chunk, stop=stop), num_accepted)

    patch.setattr(Scheduler, "commit", commit_too_much)


def forget_the_output_after_preemption(patch):
    release = Scheduler._release

    def forget(self, sequence, *, keep=True):
        release(self, sequence, keep=keep)
        sequence.output_ids.clear()

    patch.setattr(Scheduler, "_release", forget)


def draw_by_step_instead_of_position(patch):
    counter = itertools.count()
    row = Sequence._sample_row
    patch.setattr(Sequence, "_sample_row", lambda *a: replace(row(*a), position=next(counter)))


def give_all_choices_one_seed(patch):
    row = Sequence._sample_row
    patch.setattr(Sequence, "_sample_row", lambda self, *a: replace(row(self, *a), seed=self.sampling.seed))


def mix_up_two_rows(patch):
    batch_of = engine.batch_of
    patch.setattr(engine, "batch_of", lambda chunks: batch_of(chunks[::-1]))


def never_ban_the_end(patch):
    row = Sequence._sample_row
    solo = fake_runner.solo

    def oracle(*arguments, **settings):
        with patch.context() as unpatched:
            unpatched.setattr(Sequence, "_sample_row", row)
            return solo(*arguments, **settings)

    patch.setattr(fake_runner, "solo", oracle)
    patch.setattr(Sequence, "_sample_row", lambda *a: replace(row(*a), banned_ids=()))


def count_another_sequences_tokens(patch):
    shared = {}
    counts = sequence.TokenCounts
    patch.setattr(sequence, "TokenCounts", lambda prompt_ids: shared.setdefault(0, counts(prompt_ids)))


def forget_those_who_wait_for_an_aborted_choice(patch):
    patch.setattr(Scheduler, "_stop_following", lambda self, follower: None)


def preempt_the_earliest(patch):
    def preempt(self):
        victim = self.running.pop(0)
        self._release(victim)
        self._enqueue(victim)
        return victim

    patch.setattr(Scheduler, "preempt_latest", preempt)


def schedule_a_token_twice(patch):
    chunk = scheduler.Chunk
    patch.setattr(
        scheduler, "Chunk", lambda s, start, *rest, **named: chunk(s, max(start - 1, 0), *rest, **named)
    )


def take_in_the_drafts_at_once(patch):
    patch.setattr(batch, "with_states", lambda b, slots, drafts, n: with_states(b, slots, [0] * len(n), n))


def accept_a_draft_too_few(patch):
    def fewer(b, slots, drafts, accepted):
        return with_states(b, slots, drafts, [max(n - 1, 0) for n in accepted])

    patch.setattr(batch, "with_states", fewer)


def forget_to_copy_states(patch):
    patch.setattr(FakeRunner, "copy_state", lambda self, source, target: None)


def share_states_between_tenants(patch):
    start = StatePool.start
    patch.setattr(StatePool, "start", lambda self, tenant, ids: start(self, "everyone", ids))


def take_a_snapshot_for_a_token_too_many(patch):
    snapshot = StatePool.snapshot

    def longer(self, slot, tenant, token_ids):
        snapshot(self, slot, tenant, np.concatenate((token_ids, token_ids[-1:])))

    patch.setattr(StatePool, "snapshot", longer)


def take_no_snapshots(patch):
    patch.setattr(StatePool, "snapshot", lambda *a: None)


def drop_states_at_the_end(patch):
    patch.setattr(StatePool, "keep", lambda self, slot, tenant, ids: self.release(slot))


def leak_a_slot(patch):
    patch.setattr(StatePool, "release", lambda self, slot: None)
    patch.setattr(StatePool, "keep", lambda self, slot, tenant, ids: None)


def draw_after_wrong_drafts(patch):
    append = engine._append

    def append_all(sequence, tokens, drafts):
        return append(sequence, tokens, tuple(token.token_id for token in tokens[:-1]))

    patch.setattr(engine, "_append", append_all)


def ignore_drafts_in_penalties(patch):
    arrays = sequence.TokenCounts.arrays
    patch.setattr(sequence.TokenCounts, "arrays", lambda self, drafts=(): arrays(self))


FAULTS = [
    forget_to_copy,
    copy_the_wrong_way,
    share_between_tenants,
    never_reuse,
    match_a_token_too_many,
    fill_a_shared_block,
    evict_what_is_held,
    free_a_block_twice,
    leak_the_tail,
    show_tokens_before_they_are_computed,
    forget_the_output_after_preemption,
    draw_by_step_instead_of_position,
    give_all_choices_one_seed,
    mix_up_two_rows,
    never_ban_the_end,
    count_another_sequences_tokens,
    forget_those_who_wait_for_an_aborted_choice,
    preempt_the_earliest,
    schedule_a_token_twice,
    take_in_the_drafts_at_once,
    accept_a_draft_too_few,
    forget_to_copy_states,
    share_states_between_tenants,
    take_a_snapshot_for_a_token_too_many,
    take_no_snapshots,
    drop_states_at_the_end,
    leak_a_slot,
    draw_after_wrong_drafts,
    ignore_drafts_in_penalties,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_noticed(fault, monkeypatch, caplog):
    fault(monkeypatch)
    with pytest.raises(Exception):  # noqa: B017, PT011  (a fault may show anywhere)
        check_everything()
