import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorwire_server.scheduling.pages import PagePool, PagesExhausted


def test_pages_for_rounds_up() -> None:
    pool = PagePool(8, 16)
    assert [pool.pages_for(tokens) for tokens in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_more_than_is_free_takes_nothing() -> None:
    pool = PagePool(4, 16)
    pool.allocate(3)
    with pytest.raises(PagesExhausted) as caught:
        pool.allocate(2)
    assert (caught.value.wanted, caught.value.available) == (2, 1)
    assert (pool.used, pool.free) == (3, 1)


def test_a_page_released_twice_is_our_own_bug() -> None:
    pool = PagePool(4, 16)
    pages = pool.allocate(2)
    pool.release(pages)
    with pytest.raises(AssertionError, match="nobody holds"):
        pool.release(pages)


@pytest.mark.parametrize(("pages", "tokens"), [(0, 16), (4, 0)])
def test_a_pool_of_nothing_is_refused(pages: int, tokens: int) -> None:
    with pytest.raises(ValueError, match="at least one page"):
        PagePool(pages, tokens)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6))))
def test_no_page_is_lost_or_doubled_whatever_the_order(actions: list[tuple[bool, int]]) -> None:
    pool = PagePool(12, 16)
    held: list[list[int]] = []
    for takes, number in actions:
        if takes and number <= pool.free:
            held.append(pool.allocate(number))
        elif held:
            pool.release(held.pop(number % len(held)))
        pool.check_invariants()
        assert sorted(page for pages in held for page in pages) == sorted(
            set(range(12)) - set(pool._free)
        )
