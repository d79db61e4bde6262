"""Chat templates: rendered as transformers does, in a sandbox, without torch."""

import json
import shutil

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from moqc.errors import ArtifactError, UserError
from moqc.package import copy_metadata
from moqc.runtime.artifact import load
from moqc.runtime.chat import ChatTemplate

PLAIN = """{%- if messages[0]['role'] == 'system' %}
    {%- set told = messages[0]['content'] %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if loop.first and told is defined %}
{{ '[' + told + '] ' }}
    {%- endif %}
    {{- '<|' + message.role + '|>' + message.content | trim }}
    {%- if loop.index > 20 %}{% break %}{% endif %}
    {%- if message.role == 'assistant' %}{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}
{%- endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}
{{ {'é': messages | length} | tojson(indent=1) }}
{%- if add_generation_prompt %}
<|assistant|>
{% endif %}"""
SPECIAL = {"bos_token": "<s>", "eos_token": "<end>"}
CHATS = (
    [{"role": "user", "content": " Il "}],
    [{"role": "system", "content": "Be <brief> & kind"}, {"role": "user", "content": "hé"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c\n"},
    ],
)


@pytest.mark.parametrize("messages", CHATS, ids=len)
def test_text_is_that_of_transformers(messages):
    expected, _ = render_jinja_template(
        [messages], chat_template=PLAIN, add_generation_prompt=True, **SPECIAL
    )
    assert ChatTemplate(PLAIN, SPECIAL, "toy").render(messages) == expected[0]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (PLAIN, "roles must alternate"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for i in range(999999999) %}{% endfor %}", "Range too big"),
        ("{{ nothing.there }}", "nothing"),
        ("{{ 1 + messages }}", "unsupported operand"),
    ],
)
def test_refusals_are_one_line(source, says):
    template = ChatTemplate(source, SPECIAL, "toy")
    with pytest.raises(UserError, match=f"toy: the chat template refuses these messages: .*{says}"):
        template.render([{"role": "assistant", "content": "b"}])


def test_text_that_is_no_template():
    with pytest.raises(ArtifactError, match="toy: the chat template cannot be read"):
        ChatTemplate("{% if %}", {}, "toy")


def test_where_templates_and_tokens_are_found(tmp_path):
    def write(**content):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))

    with pytest.raises(UserError, match="no chat template"):
        ChatTemplate.of(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<old>", "eos_token": "</s>"}')
    write(chat_template="{{ bos_token }}{{ eos_token }}", bos_token={"content": "<s>", "lstrip": False})
    assert ChatTemplate.of(tmp_path).render([]) == "<s></s>"
    write(chat_template=[{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}])
    assert ChatTemplate.of(tmp_path).render([]) == "y"
    (tmp_path / "chat_template.jinja").write_text("z{{ messages[0].content }}")
    assert ChatTemplate.of(tmp_path).render([{"role": "user", "content": "!"}]) == "z!"
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ArtifactError, match="not a JSON object"):
        ChatTemplate.of(tmp_path)


@pytest.fixture
def chatty(toy, tmp_path):
    """The toy, which recites its text from where the prompt ends, with a template of three characters."""
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(toy.folder / "tokenizer.json", source)
    (source / "chat_template.jinja").write_text("{{ messages | length }}{{ messages[-1].content }}<end>")
    folder = shutil.copytree(toy.folder, tmp_path / "chatty")
    copy_metadata(source, folder)
    return folder


def test_chat_prompt_has_special_tokens_as_ids(chatty, toy):
    artifact = load(chatty)
    ids = artifact.chat_prompt([{"role": "user", "content": "x"}])
    assert ids == [*artifact.encode("1x"), toy.eos]
    assert artifact.generate(ids) == toy.text[3:]
