"""Whatever happens in whatever order, the books balance and every answer is what it is alone."""

from __future__ import annotations

from random import Random

import pytest
from fake_runner import FakeRunner, answer, check_against_solo, collect, make_engine
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jinn.engine.messages import Abort, SamplingParams, Submit

prompts = st.lists(st.integers(1, 3), min_size=1, max_size=20)
sampling = st.builds(
    SamplingParams,
    n=st.sampled_from([1, 1, 2, 4]),
    max_tokens=st.integers(1, 24),
    temperature=st.sampled_from([0.0, 1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 1.0]),
    logprobs=st.sampled_from([None, 1]),
    stop_token_ids=st.sampled_from([(), (2,)]),
    ignore_eos=st.booleans(),
    seed=st.integers(0, 5),
)


class RandomDrafter:
    """Guesses that are right now and then, since the ids are few."""

    def __init__(self, num_tokens):
        self.num_tokens = num_tokens
        self.rng = Random(0)

    def draft(self, chunks):
        for chunk in chunks:
            count = self.rng.randrange(self.num_tokens + 1)
            chunk.sequence.drafts = tuple(self.rng.randrange(23) for _ in range(count))

    def forget(self, sequence):
        sequence.drafts = ()


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        block_size=st.sampled_from([1, 3, 4, 16]),
        spare_blocks=st.integers(0, 20),
        chunk=st.sampled_from([1, 7, 64, 512]),
        max_num_seqs=st.integers(1, 6),
        tenant_cache_memory=st.sampled_from([None, 0, 1000, 5000]),
        num_state_slots=st.sampled_from([0, 0, 1, 2, 5, 40]),
        num_drafts=st.sampled_from([0, 0, 1, 4]),
    )
    def start(
        self, block_size, spare_blocks, chunk, max_num_seqs, tenant_cache_memory, num_state_slots, num_drafts
    ):
        num_blocks = -(-64 // block_size) + spare_blocks
        self.num_state_slots = num_state_slots
        self.engine = make_engine(
            FakeRunner(num_blocks, block_size, num_state_slots=num_state_slots),
            RandomDrafter(num_drafts) if num_drafts else None,
            max_num_batched_tokens=chunk,
            max_num_seqs=max_num_seqs,
            tenant_cache_memory=tenant_cache_memory,
            cache_memory=10_000,
        )
        self.requests = []
        self.steps = []

    @rule(
        tenant=st.sampled_from("ab"),
        prompt=prompts,
        sampling=sampling,
        turn_starts=st.lists(st.integers(0, 25), max_size=6).map(sorted),
    )
    def submit(self, tenant, prompt, sampling, turn_starts=()):
        request = Submit(
            f"r{len(self.requests)}", tenant, tuple(prompt), sampling, turn_starts=tuple(turn_starts)
        )
        self.requests.append(request)
        self.engine.submit(request)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def continue_a_conversation(self, data):
        """A prompt that begins with all that an earlier request has said."""
        earlier = data.draw(st.sampled_from(self.requests))
        said = collect(self.steps).get((earlier.request_id, 0))
        ids = answer(said)[0] if said else ()
        prompt = (*earlier.prompt_ids, *ids, 1)
        if len(prompt) < 60:
            self.submit(earlier.tenant, prompt, data.draw(sampling))

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), index=st.sampled_from([None, 0, 1]))
    def abort(self, data, index):
        self.engine.abort(Abort(data.draw(st.sampled_from(self.requests)).request_id, index))

    @rule(count=st.integers(1, 10))
    def step(self, count):
        self.steps += [self.engine.step() for _ in range(count)]

    @rule(count=st.integers(1, 8))
    def evict(self, count):
        self.engine._cache.evict(count)

    @rule(count=st.integers(1, 3))
    def evict_snapshots(self, count):
        if self.num_state_slots:
            self.engine._states.evict(count)

    @precondition(lambda self: self.engine._scheduler.running)
    @rule()
    def preempt(self):
        self.engine._scheduler.preempt_latest()

    @invariant()
    def books_balance(self):
        if hasattr(self, "engine"):
            self.engine.check_integrity()

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        for _ in range(100 + sum(60 * request.sampling.n for request in self.requests)):
            if not self.engine.has_work:
                break
            self.steps.append(self.engine.step())
        assert not self.engine.has_work, "a request waits for ever"
        self.engine.check_integrity()
        assert self.engine.stats.num_used_blocks == 0
        answers = {key: answer(outputs) for key, outputs in collect(self.steps).items()}
        check_against_solo(self.requests, answers, num_state_slots=self.num_state_slots)


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


@pytest.mark.soak
class TestEngineMachineAtLength(EngineMachine.TestCase):
    settings = settings(max_examples=2000, stateful_step_count=60, deadline=None)
