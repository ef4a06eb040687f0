import pytest
from tensorwire_server.scheduling.sequences import Sequence
from tensorwire_server.scheduling.work import Sampling

GREEDY = Sampling(temperature=0.0, top_k=None, top_p=1.0, seed=0)


def test_tokens_of_an_earlier_attempt_are_fed_and_counted() -> None:
    sequence = Sequence(id=1, prompt_ids=(5, 6), so_far=(7,), max_new_tokens=4, sampling=GREEDY)
    assert sequence.tokens == [5, 6, 7]
    assert sequence.new_tokens == [7]
    assert sequence.num_new == 1
    assert sequence.num_to_feed == 3
    assert sequence.num_tokens_at_most == 6


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one prompt token"):
        Sequence(id=1, prompt_ids=(), max_new_tokens=1, sampling=GREEDY)


def test_a_request_with_nothing_left_to_generate_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing left"):
        Sequence(id=1, prompt_ids=(5,), so_far=(6, 7), max_new_tokens=2, sampling=GREEDY)


@pytest.mark.parametrize(("now", "expired"), [(9.9, False), (10.0, True), (11.0, True)])
def test_a_deadline_has_passed_once_it_is_reached(now: float, expired: bool) -> None:
    sequence = Sequence(id=1, prompt_ids=(5,), max_new_tokens=1, sampling=GREEDY, deadline=10.0)
    assert sequence.is_expired(now) is expired


def test_without_a_deadline_nothing_expires() -> None:
    sequence = Sequence(id=1, prompt_ids=(5,), max_new_tokens=1, sampling=GREEDY)
    assert not sequence.is_expired(1e18)
