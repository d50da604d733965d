"""Chats in rows of data: messages, tool calls and tools, as chat templates take them."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

from qlora.data.segments import DropRow, mark_special_tokens

# Names that datasets use for the sides of a chat. Other roles are kept as they are.
ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "bot": "assistant", "function_call": "assistant", "observation": "tool",
    "function": "tool",
}  # fmt: skip
COLUMNS = ("messages", "conversations")  # OpenAI's name and ShareGPT's


@dataclass(frozen=True)
class Chat:
    """A chat as chat templates take it."""

    messages: list[dict]  # "role" and "content", and whatever else the row has: "tool_calls", "name", ...
    tools: list[dict] | None = None  # JSON schemas of the functions that may be called
    untrained: tuple[str | None, ...] = ()  # for each message: why its turn must not be trained, or None
    columns: frozenset[str] = frozenset()  # of the row, those that the chat is read from

    @property
    def turns(self) -> list[int]:
        """Positions of the assistant's messages."""
        return [number for number, message in enumerate(self.messages) if message["role"] == "assistant"]

    @property
    def is_question(self) -> bool:
        """Whether the next turn is the assistant's."""
        return bool(self.messages) and self.messages[-1]["role"] != "assistant"

    def until(self, length: int) -> "Chat":
        """The first `length` messages."""
        return replace(self, messages=self.messages[:length])

    def with_message(self, position: int, message: dict) -> "Chat":
        """The chat with another message at this position."""
        return replace(self, messages=[*self.messages[:position], message, *self.messages[position + 1 :]])


def read_chat(row: dict) -> Chat:
    """The chat in a row of `messages` or ShareGPT's `conversations`, with its `system` and `tools` columns.

    Messages keep all their keys but `weight` and `train`, with which a row says what not to train. Raises
    DropRow.
    """
    column = next((name for name in COLUMNS if row.get(name) is not None), COLUMNS[0])
    turns = row.get(column)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DropRow(f"'{column}' is not a list of messages")
    messages = [_read_message(turn, column) for turn in turns]
    untrained = [_why_untrained(turn) for turn in turns]
    columns, system = {column, "tools"}, row.get("system")
    if not (messages and messages[0]["role"] == "system"):  # a system text among the messages is preferred
        columns.add("system")
        if isinstance(system, str) and system.strip():
            messages, untrained = [{"role": "system", "content": system}, *messages], [None, *untrained]
    return Chat(messages, _read_tools(row.get("tools")), tuple(untrained), frozenset(columns))


def _read_message(turn: dict, column: str) -> dict:
    extra = {
        name: value
        for name, value in turn.items()
        if value not in (None, "", [], {})  # exports fill in empty values
        and name not in ("role", "from", "content", "value", "weight", "train", "function_call")
    }
    role = turn.get("role") or turn.get("from")
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    if isinstance(content, list):
        content = _joined_parts(content)
    if role == "function_call" and isinstance(content, str):  # ShareGPT's way to write calls
        calls, content = parsed(content, "a call"), None
        calls = calls if isinstance(calls, list) else [calls]
        extra["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    elif call := turn.get("function_call"):  # OpenAI's earlier way
        extra["tool_calls"] = [{"type": "function", "function": call}]
    if calls := extra.get("tool_calls"):
        _check_calls(calls)
    if not isinstance(role, str) or not (isinstance(content, str) or (content is None and extra)):
        raise DropRow(f"a message in '{column}' has no text or no role")
    return {"role": ROLES.get(role, role), "content": content, **extra}


def _joined_parts(parts: list) -> str:
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise DropRow("a message has a part that is not text")
    return "".join(texts)


def _check_calls(calls) -> None:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise DropRow("'tool_calls' is not a list of calls")
    if not all(isinstance(call.get("function", call), dict) for call in calls):
        raise DropRow("a tool call has no function")


def with_arguments(chat: Chat, convert: Callable) -> Chat:
    """The chat with the arguments of its tool calls converted."""
    messages = []
    for message in chat.messages:
        if "tool_calls" in message:
            message = message | {
                "tool_calls": [_with_arguments(call, convert) for call in message["tool_calls"]]
            }
        messages.append(message)
    return replace(chat, messages=messages)


def _with_arguments(call: dict, convert: Callable) -> dict:
    function = call.get("function", call)
    if "arguments" in function:
        function = function | {"arguments": convert(function["arguments"])}
    return call | {"function": function} if "function" in call else function


def _read_tools(tools) -> list[dict] | None:
    if isinstance(tools, str):
        tools = parsed(tools, "'tools'") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DropRow("'tools' is not a list of tools")
    return tools


def parsed(text: str, name: str):
    """A JSON text. Raises DropRow, naming it."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DropRow(f"{name} cannot be read as JSON") from error


def _why_untrained(turn: dict) -> str | None:
    for name in ("weight", "train"):
        value = turn.get(name)
        if value not in (None, 0, 1):  # False and True are among these
            raise DropRow(f"the '{name}' of a message is neither 0 nor 1")
        if value is not None and not value:
            return f"its '{name}' is {json.dumps(value)}"
    return None


def mark_chat(chat: Chat, tokenizer) -> Chat:
    """The chat with mark_special_tokens() applied to every text in it. Raises DropRow."""
    return replace(chat, messages=_marked(chat.messages, tokenizer), tools=_marked(chat.tools, tokenizer))


def _marked(value, tokenizer):
    if isinstance(value, str):
        return mark_special_tokens(value, tokenizer)
    if isinstance(value, list):
        return [_marked(item, tokenizer) for item in value]
    if isinstance(value, dict):
        return {key: _marked(item, tokenizer) for key, item in value.items()}
    return value
