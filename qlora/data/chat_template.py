"""Chat templates: writing a chat with one, and finding each turn of the assistant in what it wrote."""

import json
import re
from contextlib import suppress
from dataclasses import replace
from datetime import date
from functools import lru_cache
from pathlib import Path

from jinja2 import TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from qlora.data.chat import Chat, parsed, with_arguments
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
# Keys of a message that transformers fills in from each other.
REASONING = {"reasoning_content", "thinking", "reasoning"}
PROBE, PREVIOUS = "\ufdd2", "\ufdd3"  # noncharacters, so that they stand nowhere else

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
        except Exception as error:  # a template is code; one that refuses this chat may take the data's
            print(f"--chat_template {path} refuses a chat of one question: {first_line(error)}")
    templates = tokenizer.chat_template
    if isinstance(templates, dict):  # several, by name
        tokenizer.chat_template = {name: _with_date(text, today) for name, text in templates.items()}
    elif templates:
        tokenizer.chat_template = _with_date(templates, today)


def _with_date(template: str, today: date) -> str:
    template = DATE_CALL.sub(lambda call: json.dumps(today.strftime(call[2])), template)
    if "strftime_now(" in template:  # with a format that is computed
        template = f"{{%- macro strftime_now(format) -%}}{today}{{%- endmacro -%}}" + template
    return template


def render(chat: Chat, tokenizer, add_generation_prompt: bool = False) -> str:
    """The chat as its template writes it. Raises DropRow if the template refuses it."""
    try:
        return tokenizer.apply_chat_template(
            chat.messages, tools=chat.tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # templates are code: any type, for any role they reject
        raise DropRow(f"the chat template refuses it: {error}") from error


def template_segments(
    chat: Chat, tokenizer, train_on: str = "all", completion_only_loss: bool = True
) -> tuple[list[Segment], list[str]]:
    """(segments, notes) of a chat as its template writes it; the flags of these names say what is trained.

    Each turn of the assistant is a segment of its own, from the end of the generation prompt to its
    end-of-turn token. A chat that ends with a question closes with the generation prompt. Notes name what the
    template left out, and turns that are not trained although they should be. Raises DropRow.
    """
    chat, text = _fit_to_template(chat, tokenizer)
    notes, without_calls = _left_out(chat, text, tokenizer)
    marked = _marked_spans(chat, text, tokenizer)
    segments, end = [], 0
    for position in chat.turns:
        try:
            span = marked.get(position) or _turn_span(
                chat, position, text, tokenizer, position in without_calls
            )
            if span[0] < end:
                raise DropTurn("it could not be located in the rendered chat")
        except DropTurn as reason:
            notes.append(f"a turn of the assistant is not trained: {reason}")
            continue
        why_not = chat.untrained[position] if chat.untrained else None
        if position in without_calls:  # it would learn to stop instead of calling
            why_not = "the chat template leaves out its tool calls"
        if why_not:
            notes.append(f"a turn of the assistant is not trained: {why_not}")
        is_trained = not why_not and (train_on == "all" or position == chat.turns[-1])
        segments += [(text[end : span[0]], not completion_only_loss), (text[span[0] : span[1]], is_trained)]
        end = span[1]
    if chat.turns and not chat.is_question and not _asks_as_written(chat, text, tokenizer):
        notes.append("the chat template asks for the last answer with another text than it writes here")
    if text[end:]:
        segments.append((text[end:], False))
    return segments, notes


def _asks_as_written(chat: Chat, text: str, tokenizer) -> bool:
    """Whether generation will ask for the last turn with what stands in front of it in `text`."""
    try:
        return text.startswith(render(chat.until(chat.turns[-1]), tokenizer, add_generation_prompt=True))
    except DropRow:  # nothing stands in front of it, or a system turn alone
        return True


def _fit_to_template(chat: Chat, tokenizer) -> tuple[Chat, str]:
    """(the chat in the form that its template expects, what the template writes of it). Raises DropRow."""
    given, chat = chat, with_arguments(chat, _as_object)
    has_calls = any("tool_calls" in message for message in chat.messages)
    try:
        text = render(chat, tokenizer, chat.is_question)
    except DropRow:
        if not has_calls:
            raise
        text = None
    if has_calls and (text is None or _writes_python(chat, text)):  # as DeepSeek's, which expects text
        chat = with_arguments(given, _as_text)
        text = render(chat, tokenizer, chat.is_question)
    if any(message["content"] is None for message in chat.messages):
        # Some templates need null here, others write it as the word None.
        filled = replace(chat, messages=[m | {"content": m["content"] or ""} for m in chat.messages])
        with suppress(DropRow):
            filled_text = render(filled, tokenizer, chat.is_question)
            if filled_text.count("None") < text.count("None"):
                return filled, filled_text
    return chat, text


def _as_object(arguments):
    return parsed(arguments, "the arguments of a tool call") if isinstance(arguments, str) else arguments


def _as_text(arguments) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _writes_python(chat: Chat, text: str) -> bool:
    """Whether arguments stand in the text as Python writes them, not as JSON."""
    calls = [call for message in chat.messages for call in message.get("tool_calls", [])]
    values = [call.get("function", call).get("arguments") for call in calls]
    return any(str(value) in text for value in values if value and str(value) != _as_text(value))


def _marked_spans(chat: Chat, text: str, tokenizer) -> dict[int, Span]:
    """The turns by the template's own {% generation %} marks; {} if it has none, or not one for each turn.

    A mark may include the end of the generation prompt, which is not the model's to write, and may leave out
    the end-of-turn token right after it, without which no answer would learn to stop.
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
    special, prompt = special_tokens(tokenizer), _generation_prompt(tokenizer, str(tokenizer.chat_template))
    prompt_ends = [prompt[start:] for start in range(len(prompt)) if prompt[start:].strip()]
    turns = {}
    for position, (start, end) in zip(chat.turns, spans):
        start += len(next((part for part in prompt_ends if text[start:end].startswith(part)), ""))
        stripped = start + len(text[start:end].rstrip())
        if any(token.end() == stripped for token in special.finditer(text, start, end)):
            end = stripped
        elif token := special.match(text, end):
            end = token.end()
        turns[position] = (start, end)
    return turns


def _turn_span(chat: Chat, position: int, text: str, tokenizer, without_calls: bool) -> Span:
    """Where the assistant's turn at `position` stands in `text`, the rendered chat. Raises DropTurn.

    It is found by rendering the chat with another turn in its place, which shows what stands before and after
    it. So it does not matter that many templates write a turn differently when others follow it.
    """
    message = chat.messages[position]
    has_calls = "tool_calls" in message and not without_calls
    probe = {"role": "assistant", "content": PROBE}
    if has_calls:  # in its place only a call keeps the roles of the chat alternating
        call = message["tool_calls"][0]
        empty = call.get("function", call) | {"name": PROBE}
        if "arguments" in empty:
            empty["arguments"] = type(empty["arguments"])()
        probe = message | {"tool_calls": [call | {"function": empty} if "function" in call else empty]}
    probed = chat.with_message(position, probe)
    try:
        before, is_written, after = render(probed, tokenizer, chat.is_question).partition(PROBE)
        last = render(probed.until(position + 1), tokenizer)  # what is written after it when nothing follows
        start = _end_of_prompt(probed, position, before, tokenizer)
        if start is None:
            start = _end_of_header(chat, position, before, tokenizer) if has_calls else len(before)
    except DropRow as error:
        raise DropTurn("the chat template refuses the chat with another turn in its place") from error
    ending = after  # of the turn: its end-of-turn token
    if position < len(chat.messages) - 1:
        ending = _common_prefix(after, last.partition(PROBE)[2])
    ending = _end_of_turn(ending, tokenizer, is_last=position == len(chat.messages) - 1)
    rest = after.removeprefix(ending)
    end = len(text) - len(rest)
    is_unchanged = text.startswith(before[:start]) and text.endswith(rest)  # around the turn
    if not is_written or not is_unchanged or start >= end:
        raise DropTurn("it could not be located in the rendered chat")
    return start, end


def _end_of_prompt(probed: Chat, position: int, before: str, tokenizer) -> int | None:
    """Where the generation prompt ends in `before`, the text before a turn; None if it is not there."""
    prompt = _generation_prompt(tokenizer, str(tokenizer.chat_template))
    header, found, rest = before.rpartition(prompt) if prompt else (before, "", "")
    if not found:
        return None
    if (
        rest.strip() and position
    ):  # the turn's own beginning, or messages since the prompt of an earlier turn?
        previous = probed.messages[position - 1] | {"content": PREVIOUS}
        other = render(probed.with_message(position - 1, previous), tokenizer, probed.is_question)
        if PREVIOUS in other.partition(PROBE)[0].rpartition(prompt)[2]:
            return None
    return len(header + found)


def _end_of_header(chat: Chat, position: int, before: str, tokenizer) -> int:
    """Where a turn begins whose calls begin in `before`: where that stops to be as the prompt for the turn.

    The prompt may end in more than the turn begins with, such as <think>. Raises DropTurn.
    """
    prompt = render(chat.until(position), tokenizer, add_generation_prompt=True)
    header = _common_prefix(before, prompt)
    if header != prompt:
        header = header[: _last_special_token(header, tokenizer)]
    previous = (chat.messages[position - 1]["content"] or "").strip() if position else ""
    if previous not in header:
        raise DropTurn("it could not be located in the rendered chat")
    return len(header)


@lru_cache(maxsize=8)
def _generation_prompt(tokenizer, _template: str) -> str:
    """What the template writes between a question and its answer."""
    return render(Chat([{"role": "user", "content": PROBE}]), tokenizer, True).partition(PROBE)[2]


def _end_of_turn(text: str, tokenizer, is_last: bool) -> str:
    """The start of `text`, which follows a turn, that belongs to it: up to EOS, or to the last special token.

    The last turn keeps all of it if there is no EOS: whatever closes the chat stands for one.
    """
    before_eos, eos, _ = text.partition(tokenizer.eos_token)
    if eos:
        return before_eos + eos
    return text if is_last else text[: _last_special_token(text, tokenizer)]


def _last_special_token(text: str, tokenizer) -> int:
    """The end of the last special token in a text; the text's own end if there is none."""
    return max((token.end() for token in special_tokens(tokenizer).finditer(text)), default=len(text))


def _common_prefix(one: str, other: str) -> str:
    shorter = min(len(one), len(other))
    return one[: next((n for n in range(shorter) if one[n] != other[n]), shorter)]


def _left_out(chat: Chat, text: str, tokenizer) -> tuple[list[str], set[int]]:
    """(notes on what the template did not write of the chat, positions of the turns without all their calls).

    Found by comparing `text`, the rendered chat, with what is written without a part of it.
    """
    parts, without_calls = [], set()
    if chat.tools and _is_same(replace(chat, tools=None), text, tokenizer):
        parts.append("'tools'")
    seen_roles = {"user", "assistant"}
    for position, message in enumerate(chat.messages):
        role, content = message["role"], (message["content"] or "").strip()
        for name in message.keys() - {"role", "content", "tool_calls"}:
            names = REASONING if name in REASONING else {name}
            rest = {key: value for key, value in message.items() if key not in names}
            if _is_same(chat.with_message(position, rest), text, tokenizer):
                parts.append(f"'{name}' of a message")
        calls = message.get("tool_calls", [])
        for number in range(len(calls)):
            rest = message | {"tool_calls": calls[:number] + calls[number + 1 :]}
            if len(calls) == 1:
                del rest["tool_calls"]
            if _is_same(chat.with_message(position, rest), text, tokenizer):
                parts.append("tool calls")
                without_calls.add(position)
        if not content or (content in text and role in seen_roles):
            continue
        seen_roles.add(role)
        if _is_same(chat.with_message(position, message | {"content": PROBE}), text, tokenizer):
            parts.append(f"the content of a message of the role {role}")
        elif role == "assistant":
            parts.append("some of the content of a message of the role assistant")
    return [f"the chat template leaves out {part}" for part in parts], without_calls


def _is_same(chat: Chat, text: str, tokenizer) -> bool:
    """Whether the template writes `text` for this chat too."""
    try:
        return render(chat, tokenizer, chat.is_question) == text
    except DropRow:
        return False
