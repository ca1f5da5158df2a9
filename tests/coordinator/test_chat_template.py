import asyncio

import pytest

from coordinator.api.openai.prompts import encode_chat
from edge_runtime import chat_template
from edge_runtime.chat_template import ChatTemplate
from edge_runtime.errors import BundleError, UsageError

CHATML = """{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


def test_messages_are_rendered_with_a_generation_prompt():
    text = ChatTemplate(CHATML, {}).render([{"role": "user", "content": "<b>hi</b>"}])
    assert text == "<|im_start|>user\n<b>hi</b><|im_end|>\n<|im_start|>assistant\n"


def test_special_tokens_have_their_names():
    template = ChatTemplate("{{ bos_token }}{{ messages[0].content }}", {"bos_token": "<s>"})
    assert template.render([{"role": "user", "content": "x"}]) == "<s>x"


def test_a_template_may_refuse_messages_in_its_own_words():
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(UsageError, match="roles must alternate"):
        template.render([])


def test_loop_controls_json_and_indent_work():
    source = "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m|tojson }}{% endfor %}"
    assert ChatTemplate(source, {}).render([{"role": "é<"}, {"role": "b"}]) == '{"role": "é<"}'
    assert ChatTemplate("{{ 'a\nb'|indent(2) }}", {}).render([]) == "a\n  b"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ().__class__.__bases__[0].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ ''.join.__globals__.x }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ 'a' * 100000000 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ 'a'.ljust(1000000000) }}",
        "{% for a in range(100) %}{% for b in range(100000) %}{{ 'xxxxxxxxxxxxxxxx' }}{% endfor %}{% endfor %}",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{{ messages[0].content.nothing.here }}",
    ],
)
def test_what_a_template_must_not_do_is_an_error_of_ours(source, monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_OUTPUT_CHARS", 1 << 16)
    with pytest.raises((UsageError, BundleError)):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])


def test_a_template_that_computes_without_end_is_stopped(monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.05)
    source = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a %}{% endfor %}{% endfor %}"
    with pytest.raises(BundleError, match="ran for more than"):
        ChatTemplate(source, {}).render([])


def test_a_template_that_is_not_jinja_is_a_bundle_error():
    with pytest.raises(BundleError, match="can't be read"):
        ChatTemplate("{% if %}", {})


async def test_a_template_that_takes_its_whole_time_holds_up_nobody_else():
    template = ChatTemplate(
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", {}
    )

    class Slow:
        def encode_chat(self, messages):
            template.render(messages)

    turns = 0
    rendering = asyncio.ensure_future(encode_chat(Slow(), [{"role": "user", "content": "hi"}]))
    while not rendering.done():
        await asyncio.sleep(0.01)  # others' turns
        turns += 1
    with pytest.raises(BundleError, match="ran for more than"):
        await rendering
    assert turns > 10
