"""A chat template that takes all it can get, in a worker that others use."""

from __future__ import annotations

import asyncio
import shutil
from typing import TYPE_CHECKING

import models_zoo
import pytest
from tensorwire_protocol.errors import ErrorCode
from tensorwire_protocol.messages import Failure

from .dispatching import LOADS_S, Dispatcher, supervised

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.content == 'loop' %}" + ENDLESS + "{% endif %}"
    "{% if m.content == 'grow' %}{{ 'x' * (messages | length * 10 ** 10) }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
)
BUSY_S = 90.0  # for some seconds of work, on a machine that others use
FEW = {"max_new_tokens": 4}


@pytest.fixture(scope="module")
def hostile_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "model"
    shutil.copytree(models_zoo.tiny_model("llama"), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def chat(link: Dispatcher, content: str, *, role: str = "user") -> int:
    return link.submit("chat", {"roles": [role], "texts": [content]}, params=FEW)


def test_a_template_that_runs_away_costs_its_conversation_alone(hostile_model: Path) -> None:
    async def main() -> None:
        async with supervised(str(hostile_model)) as worker:
            link = await worker.ready(within_s=LOADS_S)
            steady = link.submit("generate", {"prompt": "hello"}, params={"max_new_tokens": 200})
            loops = [chat(link, "loop") for _ in range(2)]
            others = [
                chat(link, "hello"),
                chat(link, '{"answer": 42}', role="tool"),
                link.submit("generate", {"prompt": "The quick brown fox. " * 15}, params=FEW),
            ]
            for answer in await link.answered(*others):
                assert len(answer.tokens) == 4
            assert all(link.answers[loop].terminal is None for loop in loops)
            refused = [link.answers[number] for number in (*loops, chat(link, "grow"))]
            await link.until(lambda: all(a.terminal is not None for a in refused), BUSY_S)
            for answer in refused:
                assert isinstance(answer.terminal, Failure)
                assert answer.terminal.code == ErrorCode.BAD_PARAMS
                assert "the model's chat template refuses these messages: it " in (
                    answer.terminal.message
                )
            whole, end = await link.ended(steady)
            assert end.count == len(whole.tokens)
            (again,) = await link.answered(chat(link, "hello"))
            assert again.tokens == link.answers[others[0]].tokens
            assert worker.exits == []

    asyncio.run(main())
