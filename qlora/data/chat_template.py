"""Chat templates: writing a chat with one, and finding each turn of the assistant in what it wrote."""

import json
import re
from contextlib import suppress
from dataclasses import replace
from datetime import date
from functools import lru_cache, partial
from pathlib import Path

from jinja2 import TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from qlora.data.chat import Chat, with_arguments
from qlora.data.segments import DropRow, Segment, special_tokens
from qlora.errors import InputError, first_line

# For message rows if the tokenizer has no chat template, as with base models such as Llama-2-7b-hf.
FALLBACK_CHAT_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}### Assistant: {{ message['content'] }}{{ eos_token }}\n"
    "{% elif message['role'] == 'system' %}### System: {{ message['content'] }}\n"
    "{% elif message['role'] == 'user' %}### Human: {{ message['content'] }}\n"
    "{% else %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}### Assistant:{% endif %}"
)
DATE_CALL = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")
PROBE = "\ufdd2"  # a noncharacter, so that it stands nowhere else

CALLS = "tool calls"  # as notes name them
UNCLEAR = "where it stands in the text of the chat template is unclear"

Span = tuple[int, int]  # [start, end) of characters


class DropTurn(Exception):
    """This turn of the assistant cannot be trained. The message is the reason."""


def set_chat_template(tokenizer, path: str | None, today: date) -> None:
    """Give the tokenizer the chat template in a file, if one is given, and fix its date.

    A template that writes the date (Llama 3's) would write another one tomorrow: a resumed run would have
    other data, and an adapter would be asked in another way than it was trained. So `today` is written into
    the template, which is saved with checkpoints and adapters. Raises InputError.
    """
    if path is not None:
        try:
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
            tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--chat_template {path} cannot be read: {first_line(error)}") from error
        except TemplateSyntaxError as error:
            raise InputError(f"--chat_template {path} line {error.lineno}: {error.message}") from error
        except Exception:  # a template is code; one that refuses this chat may take the data's
            pass
    templates = tokenizer.chat_template
    if isinstance(templates, dict):  # several, by name
        tokenizer.chat_template = {name: _with_date(text, today) for name, text in templates.items()}
    elif templates:
        tokenizer.chat_template = _with_date(templates, today)


def _with_date(template: str, today: date) -> str:
    return DATE_CALL.sub(lambda call: json.dumps(today.strftime(call[2])), template)


def render(chat: Chat, tokenizer, add_generation_prompt: bool = False) -> str:
    """The chat as its template writes it. Raises DropRow if the template refuses it."""
    try:
        return tokenizer.apply_chat_template(
            chat.messages, tools=chat.tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # templates are code: any type, for any role they reject
        raise DropRow(f"the chat template refuses it: {error}") from error


def template_segments(chat: Chat, tokenizer, train_on: str = "all") -> tuple[list[Segment], list[str]]:
    """(segments, notes) of a chat as its template writes it; `train_on` is --train_on.

    Each turn of the assistant is a segment of its own, from behind the generation prompt to its end-of-turn
    token, trained unless the row says otherwise. A chat that ends with a question closes with the generation
    prompt. Notes name what the template left out, and turns that are not trained although they should be.
    Raises DropRow.
    """
    chat, text = _fit_to_template(chat, tokenizer)
    left_out = _left_out(chat, text, tokenizer)
    notes = [f"the chat template leaves out {what}" for _, what in left_out]
    marked = _marked_spans(chat, text, tokenizer)
    segments, end = [], 0
    for position in chat.turns:
        try:
            if (position, CALLS) in left_out:  # it would learn to stop instead of calling
                raise DropTurn("the chat template leaves out its tool calls")
            span = marked.get(position) or _turn_span(chat, position, text, tokenizer)
            if span[0] < end:
                raise DropTurn(UNCLEAR)
        except DropTurn as reason:
            notes.append(f"a turn of the assistant is not trained: {reason}")
            continue
        why_not = chat.untrained[position] if chat.untrained else None
        if why_not:
            notes.append(f"a turn of the assistant is not trained: {why_not}")
        content = (chat.messages[position]["content"] or "").strip()
        if content not in text[span[0] : span[1]] and position not in dict(left_out):
            notes.append("the chat template rewrites the content of a turn of the assistant")
        is_trained = not why_not and (train_on == "all" or position == chat.turns[-1])
        segments += [(text[end : span[0]], False), (text[span[0] : span[1]], is_trained)]
        end = span[1]
    if text[end:]:
        segments.append((text[end:], False))
    return segments, notes


def _fit_to_template(chat: Chat, tokenizer) -> tuple[Chat, str]:
    """(the chat in the form that its template expects, what the template writes of it). Raises DropRow."""
    try:
        text = render(chat, tokenizer, chat.is_question)
    except DropRow:
        if not any("tool_calls" in message for message in chat.messages):
            raise
        chat = _with_arguments_as_text(chat)  # some templates, DeepSeek's among them, expect text after all
        text = render(chat, tokenizer, chat.is_question)
    if any(message["content"] is None for message in chat.messages):
        # Some templates need null here, others write it as the word None.
        filled = replace(chat, messages=[m | {"content": m["content"] or ""} for m in chat.messages])
        with suppress(DropRow):
            filled_text = render(filled, tokenizer, chat.is_question)
            if filled_text.count("None") < text.count("None"):
                return filled, filled_text
    return chat, text


def _with_arguments_as_text(chat: Chat) -> Chat:
    to_json = partial(json.dumps, ensure_ascii=False)
    return replace(chat, messages=[
        message | {"tool_calls": with_arguments(message["tool_calls"], to_json)}
        if "tool_calls" in message else message
        for message in chat.messages
    ])  # fmt: skip


def _marked_spans(chat: Chat, text: str, tokenizer) -> dict[int, Span]:
    """The turns by the template's own {% generation %} marks; {} if it has none, or not one for each turn.

    An end-of-turn token right behind a mark belongs to its turn: without it no answer would learn to stop.
    """
    template = tokenizer.get_chat_template(tools=chat.tools)
    if not GENERATION.search(template):
        return {}
    (marked_text,), (spans,) = render_jinja_template(
        [chat.messages], chat.tools, chat_template=template, return_assistant_tokens_mask=True,
        add_generation_prompt=chat.is_question, **tokenizer.special_tokens_map,
    )  # fmt: skip
    if len(spans) != len(chat.turns) or marked_text != text:  # transformers marks a null content as "None"
        return {}
    special = special_tokens(tokenizer)
    turns = {}
    for position, (start, end) in zip(chat.turns, spans):
        is_closed = any(match.end() == end for match in special.finditer(text, start, end))
        closing = None if is_closed else special.match(text, end)
        turns[position] = (start, closing.end() if closing else end)
    return turns


def _turn_span(chat: Chat, position: int, text: str, tokenizer) -> Span:
    """Where the assistant's turn at `position` stands in `text`, the rendered chat. Raises DropTurn.

    It is found by rendering the chat with another turn in its place, which shows what stands before and
    behind it. So it does not matter that many templates write a turn differently when others follow it.
    """
    message = chat.messages[position]
    probe = {"role": "assistant", "content": PROBE}
    if calls := message.get("tool_calls"):  # in its place only a call keeps the roles of the chat alternating
        (call,) = with_arguments(calls[:1], lambda arguments: type(arguments)())  # none
        named = {"function": call["function"] | {"name": PROBE}} if "function" in call else {"name": PROBE}
        probe = message | {"tool_calls": [call | named]}
    probed = chat.with_message(position, probe)
    try:
        before, is_written, behind = render(probed, tokenizer, chat.is_question).partition(PROBE)
        last = render(probed.until(position + 1), tokenizer)  # what is written behind it when nothing follows
        start = _turn_start(chat, position, before, tokenizer)
    except DropRow as error:
        raise DropTurn(UNCLEAR) from error
    ending = behind  # of the turn: its end-of-turn token
    if position < len(chat.messages) - 1:
        ending = _until_special_token(_common_prefix(behind, last.partition(PROBE)[2]), tokenizer)
    elif behind.rstrip().endswith(tokenizer.eos_token):
        ending = behind.rstrip()  # whitespace after EOS is not part of the turn
    rest = behind.removeprefix(ending)
    end = len(text) - len(rest)
    is_unchanged = text.startswith(before[:start]) and text.endswith(rest)  # around the turn
    if not is_written or not is_unchanged or start >= end:
        raise DropTurn(UNCLEAR)
    return start, end


def _turn_start(chat: Chat, position: int, before: str, tokenizer) -> int:
    """The end of the generation prompt in `before`, which is all that stands in front of the turn."""
    prompt = _generation_prompt(tokenizer, str(tokenizer.chat_template))
    previous = (chat.messages[position - 1]["content"] or "").strip() if position else ""
    header, prompt, behind_prompt = before.rpartition(prompt) if prompt else (before, "", "")
    if prompt and not (previous and previous in behind_prompt):  # else it is the prompt of an earlier turn
        return len(header + prompt)
    if not chat.messages[position].get("tool_calls"):
        return len(before)
    # `before` ends within the call. The prompt may end in more than the turn begins with, such as <think>.
    prompt = render(chat.until(position), tokenizer, add_generation_prompt=True)
    header = _common_prefix(before, prompt)
    header = header if header == prompt else _until_special_token(header, tokenizer)
    if previous not in header:
        raise DropTurn(UNCLEAR)
    return len(header)


@lru_cache(maxsize=8)
def _generation_prompt(tokenizer, _template: str) -> str:
    """What the template writes between a question and its answer."""
    return render(Chat([{"role": "user", "content": PROBE}]), tokenizer, True).partition(PROBE)[2]


def _common_prefix(one: str, other: str) -> str:
    shorter = min(len(one), len(other))
    return one[: next((n for n in range(shorter) if one[n] != other[n]), shorter)]


def _until_special_token(text: str, tokenizer) -> str:
    """The text up to its last special token; all of it if it has none."""
    ends = [match.end() for match in special_tokens(tokenizer).finditer(text)]
    return text[: ends[-1]] if ends else text


def _left_out(chat: Chat, text: str, tokenizer) -> list[tuple[int, str]]:
    """(position, what) of everything without which the template writes the same `text`; tools stand at -1."""
    left_out = []
    if chat.tools and _is_same(replace(chat, tools=None), text, tokenizer):
        left_out.append((-1, "'tools'"))
    for position, message in enumerate(chat.messages):
        for name in message.keys() - {"role", "content"}:
            rest = {key: value for key, value in message.items() if key != name}
            if _is_same(chat.with_message(position, rest), text, tokenizer):
                left_out.append((position, CALLS if name == "tool_calls" else f"'{name}' of a message"))
        content = (message["content"] or "").strip()
        if content and content not in text:  # written as JSON, rewritten, or not at all
            probe = message | {"content": PROBE}
            if _is_same(chat.with_message(position, probe), text, tokenizer):
                left_out.append((position, f"the content of a message of the role {message['role']}"))
    return left_out


def _is_same(chat: Chat, text: str, tokenizer) -> bool:
    """Whether the template writes `text` for this chat too."""
    try:
        return render(chat, tokenizer, chat.is_question) == text
    except DropRow:
        return False
