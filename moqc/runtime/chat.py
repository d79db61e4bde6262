"""Chat templates: messages to the text a model was trained on, rendered by jinja2 in its sandbox.

A template comes with the model and is not trusted: it sees the messages and names of special tokens, cannot
reach Python's objects, and cannot change what it is given. The environment is that of transformers'
``apply_chat_template``.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moqc.errors import ArtifactError, UserError, reason

Message = Mapping[str, str]
"""``role`` (system, user, assistant) and ``content``."""

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


class _Generation(Extension):
    """``{% generation %}`` marks for training what the model is to say; its content is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """The template of one model and its special tokens."""

    def __init__(self, source: str, special: Mapping[str, str], origin: str) -> None:
        """Compile `source`, which is from `origin`. Raises ArtifactError when it is no template."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _now
        self._special, self._origin = dict(special), origin
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ArtifactError(f"{origin}: the chat template cannot be read: {error}") from error

    @classmethod
    def of(cls, folder: Path) -> ChatTemplate:
        """The template in ``chat_template.jinja`` or ``tokenizer_config.json`` of `folder`.

        Raises UserError when there is none: the model was not trained to chat.
        """
        declared = _read(folder / "tokenizer_config.json")
        file = folder / "chat_template.jinja"
        try:
            source = file.read_text(encoding="utf-8") if file.is_file() else _declared(declared)
        except (OSError, UnicodeDecodeError) as error:
            raise ArtifactError(f"{file}: cannot read ({reason(error)})") from error
        if source is None:
            raise UserError(
                f"{folder}: the model has no chat template; give a --prompt to continue without --chat"
            )
        special = {**_read(folder / "special_tokens_map.json"), **declared}
        tokens = {name: _content(special.get(name)) for name in _SPECIAL}
        return cls(source, {name: text for name, text in tokens.items() if text is not None}, str(folder))

    def render(self, messages: Sequence[Message]) -> str:
        """The text of `messages`, ready for the model's answer.

        Raises UserError when the template refuses them, for example for roles that do not alternate.
        """
        plain = [dict(message) for message in messages]
        try:
            return str(
                self._template.render(messages=plain, add_generation_prompt=True, tools=None, **self._special)
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, OverflowError) as error:
            raise UserError(f"{self._origin}: the chat template refuses these messages: {error}") from error


def _read(file: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no file. Raises ArtifactError."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{file}: cannot read ({reason(error)})") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{file}: is not a JSON object")
    return content


def _declared(declared: Mapping[str, Any]) -> str | None:
    """The template of ``tokenizer_config.json``: a text, or several by name, of which ``default`` counts."""
    found = declared.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _content(token: Any) -> str | None:
    """The text of a special token: written as it is, or as the content of an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON as it is; jinja2's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
