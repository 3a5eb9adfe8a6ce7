"""Conversations as text: rows of chat messages, written out by the chat template of a tokenizer.

Messages are what ``apply_chat_template`` of transformers takes: objects with a ``role`` and a ``content``,
which is text or a list of text parts. Whatever else they hold (tool calls, names, reasoning) is handed to the
template. Images and other parts are refused: only the text of a model is calibrated.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from quantlib.errors import CorpusError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Templates that write today's date (Llama 3's) would give other tokens every day. They ask for it by a
# function that transformers provides; one of that name in the template itself comes first.
_DATE = datetime(2025, 1, 1)
_DATE_MACRO = (
    "{% macro strftime_now(form) %}{{ form"
    + "".join(f"|replace('%{letter}', '{_DATE.strftime(f'%{letter}')}')" for letter in "aAbBdHIjmMpSyY")
    + " }}{% endmacro %}"
)
_PROBE = "quantmill-probe"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """One conversation.

    Attributes:
        messages: In order; ``content`` is text, or None in a message that only calls tools.
        tools: Descriptions of the tools it may call; empty without any.
        where: File and row, for messages of errors.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Any, ...]
    where: str


def chat_from(messages: Any, tools: Any, where: str) -> Chat | None:
    """A row of a chat column as a conversation; None where it is empty.

    Args:
        messages: The value of the column.
        tools: That of the column ``tools``: a list, JSON text of one, or None.
        where: File and row, for messages of errors.

    Raises:
        CorpusError: They are no chat messages, or hold something else than text.
    """
    if messages is None or messages == []:
        return None
    if not isinstance(messages, list):
        raise _unlike_messages(where, f"a {type(messages).__name__}")
    return Chat(
        messages=tuple(_message_from(message, where) for message in messages),
        tools=_tools_from(tools, where),
        where=where,
    )


class ChatTemplate:
    """What writes conversations out for one model.

    Args:
        tokenizer: The model's; it holds the template.

    Raises:
        CorpusError: It has none, or one that does not show what a user says.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if tokenizer.chat_template is None:
            raise CorpusError(
                "the text is chat messages and the tokenizer has no chat template to write them with; put"
                " the model's chat_template.jinja beside its shards, or choose a column of plain text with"
                " --text-column"
            )
        self._tokenizer = tokenizer
        self._takes_parts = False
        self._takes_parts = self._needs_parts()

    def render(self, chat: Chat) -> str:
        """The conversation as text, with all the special tokens that the template writes.

        Raises:
            CorpusError: The template refuses it (an unknown role, roles out of order).
        """
        try:
            return self._written(chat.messages, chat.tools)
        except CorpusError as error:
            raise CorpusError(
                f"the chat template of the tokenizer refuses {chat.where}: {error}; leave it out, or choose"
                " other text",
                where=chat.where,
            ) from error

    def _needs_parts(self) -> bool:
        """Whether content has to be a list of parts, as some templates of multimodal models want it."""
        faults = []
        for takes_parts in (False, True):
            self._takes_parts = takes_parts
            try:
                if _PROBE in self._written([{"role": "user", "content": _PROBE}], ()):
                    return takes_parts
                faults.append("it leaves out what the user says")
            except CorpusError as error:
                faults.append(error.message)
        raise CorpusError(
            f"the chat template of the tokenizer cannot be used: {faults[0]}; correct it, or choose a column"
            " of plain text with --text-column"
        )

    def _written(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> str:
        shaped = [self._shaped(message) for message in messages]
        given = list(tools) or None
        try:
            template = self._tokenizer.get_chat_template(tools=given)
            if "strftime_now" in template:
                template = _DATE_MACRO + template
            text = self._tokenizer.apply_chat_template(
                shaped, tools=given, chat_template=template, tokenize=False
            )
        # A template is a stranger's program in a sandbox: it raises whatever it likes.
        except Exception as error:
            raise CorpusError(str(error)) from error
        assert isinstance(text, str), "one conversation, not tokenized, is one text"
        return text

    def _shaped(self, message: Mapping[str, Any]) -> dict[str, Any]:
        if self._takes_parts and isinstance(message["content"], str):
            return {**message, "content": [{"type": "text", "text": message["content"]}]}
        return dict(message)


def template_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """sha256 in hex of a tokenizer's chat template, or of all of them by name."""
    template = tokenizer.chat_template
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _message_from(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        found = sorted(message) if isinstance(message, dict) else type(message).__name__
        raise _unlike_messages(where, f"a message of {found}")
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(_text_of(part, where) for part in content)
    elif content is not None and not isinstance(content, str):
        raise _unlike_messages(where, f"a content that is a {type(content).__name__}")
    # Parquet fills in what only other messages have.
    rest = {key: _without_none(value) for key, value in message.items() if value is not None}
    return {**rest, "content": content}


def _text_of(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise CorpusError(
        f"a message in {where} has a part of kind {kind!r}; only text can be calibrated on, leave such"
        " conversations out",
        where=where,
    )


def _tools_from(tools: Any, where: str) -> tuple[Any, ...]:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise CorpusError(f"tools in {where} are no JSON: {error}", where=where) from error
    if tools is None:
        return ()
    if not isinstance(tools, list):
        raise CorpusError(f"tools in {where} are a {type(tools).__name__}, a list is wanted", where=where)
    return tuple(_without_none(tool) for tool in tools)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_none(inner) for inner in value]
    return value


def _unlike_messages(where: str, found: str) -> CorpusError:
    return CorpusError(
        f"{where} holds {found}; chat is a list of messages, objects with a role and a content that is text"
        " or a list of text parts; choose another --text-column",
        where=where,
    )
