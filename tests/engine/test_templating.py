"""Conversations are rendered as transformers renders them, up to what a template may take."""

from __future__ import annotations

from typing import Any

import jinja2
import models_zoo
import pytest
import transformers
from tensorwire_server.engine import templating
from tensorwire_server.engine.templating import TooLong, build_template, render

CHATML = """{% for message in messages %}
{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{% endif %}"""
LLAMA_3 = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start|>system<|end|>\n\nToday: " + date_string + "\n" + system_message + eos_token }}
{%- if tools is not none %}{{- 'tools' }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' or message.role == 'ipython' %}
        {{- '<|start|>ipython<|end|>' + (message.content | tojson) + eos_token }}
    {%- elif 'tool_calls' in message %}{{- raise_exception('one at a time') }}
    {%- else %}{{- '<|start|>' + message['role'] + '<|end|>' + message['content'] | trim }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>' }}{%- endif %}"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{% endfor %}"""
STATE = """{%- set ns = namespace(found=false, last=-1, self=0) -%}
{%- for message in messages -%}
  {%- if loop.index0 > 5 -%}{%- break -%}{%- endif -%}
  {%- if message.role == 'system' -%}{%- continue -%}{%- endif -%}
  {%- if message.role == 'tool' -%}{%- set ns.found = true -%}{%- set ns.last = loop.index -%}
  {%- endif -%}
  {%- set all = dict(role=message.role, n=loop.index) -%}
  {% generation %}{{ all | tojson(indent=2) }}{{ message.content | upper }}{% endgeneration %}
{%- endfor -%}
{{ ns.found }} {{ ns.last }} {{ documents is none }} {{ strftime_now('%Y') | length }}
{{ {'ü': '<&>'} | tojson }} {{ range(3) | list }} {{ messages | length }}"""
CONVERSATIONS = [
    [{"role": "user", "content": "Größe? <b> & 'quotes'\n 日本語 🙂"}],
    [
        {"role": "system", "content": "  be brief "},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "tool", "content": '{"t": 21}'},
        {"role": "user", "content": ""},
    ],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ],
]


def outcome(make: Any) -> str:
    """Return the text, or what the template says against it."""
    try:
        return str(make())
    except jinja2.TemplateError as error:
        return f"refused: {error}"


@pytest.mark.parametrize("source", [CHATML, LLAMA_3, GEMMA, STATE, models_zoo.CHAT_TEMPLATE])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_a_conversation_is_rendered_as_transformers_renders_it(
    source: str, messages: list[dict[str, str]]
) -> None:
    wrapper = transformers.PreTrainedTokenizerFast(
        tokenizer_object=models_zoo.byte_level_tokenizer(), bos_token="<s>", eos_token="</s>"
    )
    wrapper.chat_template = source
    expected = outcome(
        lambda: wrapper.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    )
    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    assert outcome(lambda: render(build_template(source), messages, variables)) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ dict.__init__.__globals__ }}",
        "{% set ns = namespace(_x=1) %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ self.__init__.__globals__ }}",
        "{{ range(10 ** 9) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_a_template_gets_at_nothing_but_what_it_is_given(source: str) -> None:
    with pytest.raises((jinja2.TemplateError, OverflowError, TypeError)):
        render(build_template(source), [{"role": "user", "content": "a"}], {})


def test_what_is_rendered_has_a_bound_in_bytes() -> None:
    template = build_template("{{ messages[0].content }}")
    most = templating.OUTPUT_BYTES
    assert len(render(template, [{"content": "é" * (most // 2)}], {})) == most // 2
    with pytest.raises(TooLong):
        render(template, [{"content": "é" * (most // 2) + "a"}], {})
