"""Renders a model's chat template: a program of its own, because a template cannot be trusted.

The sandbox keeps a template from Python's insides, not from taking all time and memory there is,
and nothing in the same process could stop it: a single `*` or filter may be one call into C. So it
runs here, in a process that the kernel ends when its time is over and that has little memory.
`rendering.py` starts it and talks to it: one JSON object to a line, first the template, then
conversations, each of which is answered with `{"text": …}` or `{"refused": …}`.

It imports nothing but jinja2, so that it starts in a moment.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from datetime import datetime
from typing import IO, TYPE_CHECKING, Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

CPU_S = 2.0  # for one conversation
MEMORY_BYTES = 256 * 1024 * 1024  # address space of the process
OUTPUT_BYTES = 1024 * 1024  # of one rendered conversation, in UTF-8
_FILES = 16
_SHOWN_CHARS = 200  # of what a template says when it refuses


class TooLong(Exception):
    """A template wrote more than it may."""


# -- the environment, as transformers builds it (transformers.utils.chat_template_utils) -----------


class _Generation(Extension):
    """`{% generation %}` marks what an assistant said, for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012  (jinja's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_pass_on")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _pass_on(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` as a template has it: without the type's own attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` as a template has it: without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # As jinja's own: a template may have an attribute named `self`.
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot have the attribute {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # jinja's own writes for HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def build_template(source: str) -> jinja2.Template:
    """Compile a chat template.

    Raises:
        jinja2.TemplateError: it is none.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(source)


def render(
    template: jinja2.Template, messages: list[dict[str, str]], variables: Mapping[str, Any]
) -> str:
    """Return a conversation as text, ready for the assistant's turn.

    Raises:
        TooLong: it is longer than `OUTPUT_BYTES`.
        Exception: whatever a template does.
    """
    pieces: list[str] = []
    left = OUTPUT_BYTES
    for piece in template.generate(
        messages=messages, tools=None, documents=None, add_generation_prompt=True, **variables
    ):
        left -= len(piece.encode())
        if left < 0:
            raise TooLong
        pieces.append(piece)
    return "".join(pieces)


# -- the process -----------------------------------------------------------------------------------


def _confine() -> None:
    for what, most in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, _FILES),
    ):
        resource.setrlimit(what, (most, most))


def _answer(template: jinja2.Template, line: bytes, variables: Mapping[str, Any]) -> dict[str, str]:
    # Of the process's own time, so that a busy machine costs nobody an answer. No handler: the
    # kernel ends the process, whatever it does.
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    try:
        return {"text": render(template, json.loads(line), variables)}
    except TooLong:
        return {"refused": f"it makes more than {OUTPUT_BYTES} bytes of them"}
    except MemoryError:
        return {"refused": f"it needs more than {MEMORY_BYTES >> 20} MiB for them"}
    except RecursionError:
        return {"refused": "it calls itself without end"}
    except Exception as error:
        return {"refused": str(error)[:_SHOWN_CHARS] or type(error).__name__}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer each line until there are no more."""

    def send(answer: dict[str, str]) -> None:
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()

    begin = json.loads(requests.readline())
    _confine()
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    try:
        template = build_template(begin["template"])
    except Exception as error:
        reason = f"it cannot be compiled: {str(error)[:_SHOWN_CHARS] or type(error).__name__}"
        for _ in requests:
            send({"refused": reason})
        return
    for line in requests:
        send(_answer(template, line, begin["variables"]))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is its parent's affair
    serve(sys.stdin.buffer, sys.stdout.buffer)
