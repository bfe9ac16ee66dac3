from __future__ import annotations

import numpy as np
import pytest

from jinn.engine.cache import BlockCache
from jinn.engine.messages import SamplingParams
from jinn.engine.scheduler import Scheduler, SchedulerConfig
from jinn.engine.sequence import Sequence, SequenceStatus


def make_scheduler(num_blocks=64, block_size=4, **limits):
    limits = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 16,
        "max_model_len": min(64, num_blocks * block_size),
        **limits,
    }
    return Scheduler(
        SchedulerConfig(**limits), BlockCache(num_blocks, block_size, lambda source, target: None)
    )


def make_sequence(arrival, num_prompt_tokens, *, tenant="t", prompt=None):
    prompt_ids = np.arange(num_prompt_tokens, dtype=np.int32) + 1000 * arrival if prompt is None else prompt
    return Sequence(
        f"r{arrival}", 0, tenant, prompt_ids, SamplingParams(), 0, arrival, 10**6, ending_ids=frozenset()
    )


def step(scheduler, num_tokens_beside_others=10**6):
    """One step, in which every draw gives the token 7: what each sequence computed."""
    chunks = scheduler.schedule(num_tokens_beside_others)
    for chunk in chunks:
        scheduler.commit(chunk)
        if chunk.is_last:
            chunk.sequence.append(7)
    scheduler.check_integrity()
    return {chunk.sequence.arrival: chunk.stop - chunk.start for chunk in chunks}


def test_prompts_are_cut_to_the_budget_and_follow_the_decodes():
    scheduler = make_scheduler()
    scheduler.add([make_sequence(0, 20)])
    scheduler.add([make_sequence(1, 20)])
    assert step(scheduler) == {0: 16}
    assert step(scheduler) == {0: 4, 1: 12}
    assert step(scheduler) == {0: 1, 1: 8}
    assert step(scheduler) == {0: 1, 1: 1}


def test_decodes_are_never_starved_and_neither_are_prompts():
    """Even where the budget is smaller than the number of decodes, each step gives every one its token."""
    scheduler = make_scheduler(max_num_batched_tokens=2, num_blocks=256)
    for arrival in range(4):
        scheduler.add([make_sequence(arrival, 2)])
    while len(step(scheduler)) < 4:
        pass
    for arrival in range(4, 8):
        scheduler.add([make_sequence(arrival, 6)])
        for _ in range(6):
            assert step(scheduler) == dict.fromkeys(range(arrival), 1) | {arrival: 1}


def test_a_step_with_decodes_is_bounded_by_time():
    scheduler = make_scheduler(max_num_batched_tokens=1000, num_blocks=512, max_model_len=2000)
    scheduler.add([make_sequence(0, 900)])
    assert step(scheduler, 10) == {0: 900}  # nobody waits for the next token
    scheduler.add([make_sequence(1, 900)])
    assert step(scheduler, 10) == {0: 1, 1: 10}
    assert step(scheduler, 50) == {0: 1, 1: 50}
    assert step(scheduler, 1) == {0: 1, 1: 1}
    assert step(scheduler, 10**6) == {0: 1, 1: 839}


def test_max_num_seqs():
    scheduler = make_scheduler(max_num_seqs=2)
    for arrival in range(3):
        scheduler.add([make_sequence(arrival, 3)])
    assert step(scheduler) == {0: 3, 1: 3}
    scheduler.finish(scheduler.running[0])
    assert step(scheduler) == {1: 1, 2: 3}


def test_the_latest_arrival_is_preempted_and_waits_first():
    scheduler = make_scheduler(num_blocks=6)
    sequences = [make_sequence(arrival, 6) for arrival in range(3)]
    for sequence in sequences:
        scheduler.add([sequence])
    step(scheduler)
    assert scheduler.running == sequences[:2]  # the third would leave no spare block
    while scheduler.num_preemptions == 0:
        step(scheduler)
    assert scheduler.running == sequences[:1]
    assert scheduler.waiting == sequences[1:]
    assert sequences[1].status is SequenceStatus.WAITING
    assert sequences[1].num_computed_tokens == 0
    outputs = list(sequences[1].output_ids)
    scheduler.finish(sequences[0])
    step(scheduler)
    assert scheduler.running == sequences[1:2]
    assert sequences[1].output_ids[: len(outputs)] == outputs
    assert sequences[1].num_cached_tokens == 0  # what it computed itself does not count


def test_one_sequence_alone_can_fill_the_cache():
    scheduler = make_scheduler(num_blocks=4)
    scheduler.add([make_sequence(0, 3)])
    for _ in range(13):
        assert step(scheduler)
    assert scheduler.running[0].num_tokens == 16
    assert scheduler.num_preemptions == 0


def test_a_model_len_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="max_model_len of 17 does not fit into 4 blocks"):
        make_scheduler(num_blocks=4, max_model_len=17)


@pytest.mark.parametrize("field", ["max_num_seqs", "max_num_batched_tokens", "max_model_len"])
def test_limits_name_the_bad_field(field):
    with pytest.raises(ValueError, match=field):
        make_scheduler(**{field: 0})


def make_choices(count, num_prompt_tokens=10):
    prompt_ids = np.arange(num_prompt_tokens, dtype=np.int32)
    return [make_sequence(arrival, 0, prompt=prompt_ids) for arrival in range(count)]


def test_choices_wait_for_the_first_then_compute_one_token():
    scheduler = make_scheduler(max_num_batched_tokens=6)
    choices = make_choices(3)
    scheduler.add(list(choices))
    assert scheduler.num_waiting == 3
    assert step(scheduler) == {0: 6}
    assert step(scheduler) == {0: 4}
    assert step(scheduler) == {0: 1, 1: 1, 2: 1}
    assert [choice.num_cached_tokens for choice in choices] == [0, 0, 0]  # the prompt was computed for them
    assert scheduler.num_cached_tokens == 18


def test_when_the_first_choice_leaves_the_second_takes_its_place():
    for steps_before in (0, 1):
        scheduler = make_scheduler(max_num_batched_tokens=6)
        choices = make_choices(3)
        scheduler.add(list(choices))
        for _ in range(steps_before):
            step(scheduler)
        scheduler.finish(choices[0])
        assert scheduler.num_waiting == 2
        assert choices[2].leader is choices[1]
        while len(step(scheduler)) < 2:
            pass
        assert scheduler.num_waiting == 0
        for choice in choices[1:]:
            scheduler.finish(choice)
        assert not scheduler.has_work
        scheduler.check_integrity()


def test_a_choice_that_waits_can_leave():
    scheduler = make_scheduler()
    choices = make_choices(3)
    scheduler.add(list(choices))
    scheduler.finish(choices[1])
    step(scheduler)
    assert step(scheduler) == {0: 1, 2: 1}


def test_what_one_prompt_was_refused_does_not_hold_back_another():
    """The blocks that were too few for the first in line are enough for those who take its place."""
    scheduler = make_scheduler(num_blocks=12, max_num_batched_tokens=64)
    running, large, small = make_sequence(0, 14), make_sequence(1, 40), make_sequence(2, 3)
    scheduler.add([running])
    scheduler.add([large])
    scheduler.add([small])
    assert step(scheduler) == {0: 14}
    scheduler.finish(large)
    assert step(scheduler) == {0: 1, 2: 3}

    scheduler = make_scheduler(num_blocks=12, max_num_batched_tokens=64)
    choices, large = make_choices(2, num_prompt_tokens=20), make_sequence(5, 32)
    scheduler.add(list(choices))
    scheduler.add([large])
    assert step(scheduler) == {0: 20}  # the large one is refused, then the second choice comes before it
    assert step(scheduler) == {0: 1, 1: 1}

    scheduler = make_scheduler(num_blocks=12, max_num_batched_tokens=64)
    sequences = [make_sequence(0, 10), make_sequence(1, 34), make_sequence(2, 3)]
    for sequence in sequences:
        scheduler.add([sequence])
    assert step(scheduler) == {0: 10}  # nine blocks left were refused to the second
    scheduler.finish(sequences[0])
    assert step(scheduler) == {1: 34, 2: 3}


def test_nothing_is_matched_again_until_blocks_come_back():
    """A prompt that has to wait must not be looked up in every step."""
    scheduler = make_scheduler(num_blocks=8)
    scheduler.add([make_sequence(0, 14)])
    scheduler.add([make_sequence(1, 25)])
    lookups = []
    acquire = scheduler.cache.acquire
    scheduler.cache.acquire = lambda *a: lookups.append(a) or acquire(*a)
    for _ in range(5):
        step(scheduler)
    assert len(lookups) == 2
    scheduler.finish(scheduler.running[0])
    assert step(scheduler) == {1: 16}
    assert len(lookups) == 3
