"""Variables that a chat template reads besides the conversation."""

import pytest
from models import tiny_tokenizer

from qadapter.data.encoding import render
from qadapter.data.template_variables import fix_variables
from qadapter.errors import ConfigError

THINKING = (
    "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    "{% if enable_thinking is defined and enable_thinking is false %}no thoughts {% endif %}{{ style | default('') }}"
    "{{ pad_token if tools }}"
)


def rendered(tokenizer, variables=None):
    return tokenizer.decode(render(tokenizer, [{"role": "user", "content": "hi"}], variables=variables))


@pytest.mark.parametrize(
    ("text", "variables"),
    [
        ("{}", {}),
        ('{"enable_thinking": false}', {"enable_thinking": False}),
        ('{"enable_thinking": true, "style": "x"}', {"enable_thinking": True, "style": "x"}),
        (r'{"style": "a \"b\" {{ c }} %} \\"}', {"style": 'a "b" {{ c }} %} \\'}),
        ('{"style": 1.5}', {"style": 1.5}),
        ('{"style": -3}', {"style": -3}),
    ],
)
def test_fixed_variables_render_as_given_ones(text, variables):
    fixed = tiny_tokenizer(THINKING)
    fix_variables(fixed, text)
    assert rendered(fixed) == rendered(tiny_tokenizer(THINKING), variables)
    assert (rendered(fixed) == "hi ") == (not variables)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("enable_thinking=false", "is no JSON"),
        ("[1]", "give names with a text, a number, true or false"),
        ('{"style": null}', "give names with a text, a number, true or false"),
        ('{"style": NaN}', "give names with a text, a number, true or false"),
        ('{"style": [1]}', "give names with a text, a number, true or false"),
        ('{"enable_think": false}', "reads no variable 'enable_think'"),
        ('{"style }}{{ x": 1}', "reads no variable 'style }}{{ x'"),
        ('{"messages": "x"}', "reads no variable 'messages'"),
        ('{"pad_token": "x"}', "reads no variable 'pad_token'"),
        ('{"tools": "x"}', "reads no variable 'tools'"),
    ],
)
def test_what_is_no_variable_of_the_template_is_refused(text, said):
    tokenizer = tiny_tokenizer(THINKING)
    with pytest.raises(ConfigError, match=said):
        fix_variables(tokenizer, text)
    assert tokenizer.chat_template == THINKING


def test_a_value_that_the_template_cannot_work_with_is_refused():
    template = THINKING + "{{ 'Style: ' + style if style }}"
    tokenizer = tiny_tokenizer(template)
    with pytest.raises(ConfigError, match=r"chat template fails with it \(can only concatenate str"):
        fix_variables(tokenizer, '{"style": 1}')
    assert tokenizer.chat_template == template
    fix_variables(tokenizer, '{"style": "plain"}')
    assert rendered(tokenizer).endswith("Style: plain")


def test_a_template_that_needs_a_system_message_has_its_variables():
    template = "{% if messages[0].role != 'system' %}{{ raise_exception('no system message') }}{% endif %}" + THINKING
    tokenizer = tiny_tokenizer(template)
    fix_variables(tokenizer, '{"enable_thinking": false}')
    assert tokenizer.chat_template.endswith(template)


def test_without_a_template_there_are_no_variables():
    with pytest.raises(ConfigError, match="has no chat template"):
        fix_variables(tiny_tokenizer(None), '{"style": 1}')
