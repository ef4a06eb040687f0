from tensorwire_server.scheduling.forecast import Forecast
from tensorwire_server.scheduling.sequences import Sequence
from tensorwire_server.scheduling.work import Sampling

GREEDY = Sampling(temperature=0.0, top_k=None, top_p=1.0, seed=0)


def a_sequence(made: int = 0) -> Sequence:
    one = Sequence(id=1, prompt_ids=(1,) * 10, max_new_tokens=100, sampling=GREEDY)
    one.tokens += [5] * made
    return one


def test_before_there_were_answers_all_that_was_asked_for_is_expected() -> None:
    assert Forecast().tokens(a_sequence()) == 110


def test_short_answers_make_for_short_expectations_with_some_to_spare() -> None:
    forecast = Forecast()
    for _ in range(200):
        forecast.note_end(a_sequence(made=20))
    assert 10 + 28 <= forecast.tokens(a_sequence()) <= 10 + 32
    assert 70 + 11 <= forecast.tokens(a_sequence(made=60)) <= 70 + 13, "it may go on"


def test_long_answers_bring_it_back_and_never_beyond_what_was_asked_for() -> None:
    forecast = Forecast(0.0)
    assert forecast.tokens(a_sequence()) == 10
    for _ in range(200):
        forecast.note_end(a_sequence(made=100))
    assert forecast.tokens(a_sequence()) == 110
