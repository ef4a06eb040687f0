"""Templates that would take everything are stopped, and cost nobody but their own conversation."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from tensorwire_protocol.errors import BadParams
from tensorwire_server.engine.rendering import ChatRenderer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HI = [{"role": "user", "content": "hi"}]
SAYS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ bos_token }}"


@pytest.fixture
def renderer_of() -> Iterator[Callable[..., ChatRenderer]]:
    made: list[ChatRenderer] = []

    def make(template: str, **variables: Any) -> ChatRenderer:
        made.append(ChatRenderer(template, variables))
        return made[-1]

    yield make
    for renderer in made:
        renderer.close()
        assert renderer.num_idle == 0


def test_a_conversation_becomes_text(renderer_of: Callable[..., ChatRenderer]) -> None:
    renderer = renderer_of(SAYS, bos_token="<s>")
    assert renderer.render(HI) == "<user>hi<s>"
    long = "Größe\n\x00🙂" * 50_000
    assert renderer.render([{"role": "tool", "content": long}]) == f"<tool>{long}<s>"
    assert renderer.num_idle == 1


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        # Endless, as far as anybody could wait.
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "it takes more than 2 s for them",
        ),
        # One call into C, in which no Python runs.
        (
            "{% set n = messages | length * 10 ** 7 %}{{ 7 ** n % 3 }}",
            "it takes more than 2 s for them",
        ),
        ("{{ 'x' * (messages | length * 10 ** 10) }}", "it needs more than 256 MiB for them"),
        (
            "{% set ns = namespace(x='ab') %}"
            "{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "it needs more than 256 MiB for them",
        ),
        ("{{ '%0999999999d' | format(messages | length) }}", "it needs more than 256 MiB for them"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it calls itself without end"),
        (
            "{% for i in range(90000) %}{{ 'y' * 1000 }}{% endfor %}",
            "it makes more than 1048576 bytes of them",
        ),
        ("{{ raise_exception('no') }}", "no"),
        ("{{ raise_exception('n' * 5000) }}", "n" * 200),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ ''.__class__.x }}", "access to attribute '__class__' of 'str' object is unsafe."),
        ("{% if %}", "it cannot be compiled: Expected an expression, got 'end of statement block'"),
        ("{{ 'x' * 10 ** 8 }}", "it cannot be compiled: MemoryError"),  # folded when compiled
    ],
    ids=range(13),
)
def test_a_template_that_takes_too_much_is_refused_with_the_reason(
    renderer_of: Callable[..., ChatRenderer], template: str, reason: str
) -> None:
    renderer = renderer_of(template)
    for _ in range(1 if "2 s" in reason else 2):
        with pytest.raises(BadParams) as caught:
            renderer.render(HI)
        expected = f"the model's chat template refuses these messages: {reason}"
        assert caught.value.message == expected


def test_after_a_conversation_that_was_stopped_the_next_one_is_answered(
    renderer_of: Callable[..., ChatRenderer],
) -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    renderer = renderer_of(
        "{% if messages[0].content == 'loop' %}" + endless + "{% endif %}" + SAYS
    )
    assert renderer.render(HI) == "<user>hi"
    with pytest.raises(BadParams, match="more than 2 s"):
        renderer.render([{"role": "user", "content": "loop"}])
    assert renderer.num_idle == 0
    assert renderer.render(HI) == "<user>hi"


def test_conversations_that_run_at_once_have_processes_of_their_own(
    renderer_of: Callable[..., ChatRenderer],
) -> None:
    renderer = renderer_of(SAYS)
    texts: dict[int, str] = {}

    def render(number: int) -> None:
        for _ in range(20):
            texts[number] = renderer.render([{"role": "user", "content": f"{number}"}])

    threads = [threading.Thread(target=render, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {number: f"<user>{number}" for number in range(4)}
    assert 1 <= renderer.num_idle <= 4


def children() -> set[int]:
    with open(f"/proc/self/task/{threading.get_native_id()}/children") as found:
        return {int(pid) for pid in found.read().split()}


def test_a_process_that_somebody_killed_costs_one_answer_and_leaves_no_zombie(
    renderer_of: Callable[..., ChatRenderer],
) -> None:
    before = children()
    renderer = renderer_of(SAYS)
    renderer.render(HI)
    (pid,) = children() - before
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(BadParams, match="the process that ran it ended"):
        renderer.render(HI)
    assert renderer.render(HI) == "<user>hi"
    renderer.close()
    assert children() == before


def test_its_process_ends_with_this_one() -> None:
    """Whoever is left behind reads the end of its input, and is gone."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            ChatRenderer(SAYS, {}).render(HI)
            (helper,) = children()
            os.write(write, str(helper).encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    helper = int(os.read(read, 20))
    deadline = time.monotonic() + 20
    while os.path.exists(f"/proc/{helper}") and not is_zombie(helper):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_zombie(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True
