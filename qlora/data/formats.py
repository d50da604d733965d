"""Row formats: from a row of data, or a chat, to segments of text, each trained or not.

Training and generation share these functions, so a prompt is always written and split the way the adapter saw
it in training.
"""

import json
import re
from collections import Counter

from qlora.data.chat import Chat, mark_chat, read_chat
from qlora.data.chat_template import FALLBACK_CHAT_TEMPLATE, PROBE, template_segments
from qlora.data.formatting import Formatting
from qlora.data.segments import DropRow, Segment, adds_bos_itself, mark_special_tokens, spells_special_tokens

ALPACA_INTRO = "Below is an instruction that describes a task. "
ALPACA_INTRO_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
)
ALPACA_REQUEST = "Write a response that appropriately completes the request.\n\n"

GUANACO_ANSWER = re.compile(r"### Assistant:(.*?)(?=### Human:|\Z)", re.DOTALL)
LLAMA2_ANSWER = re.compile(r"\[/INST\](.*?)(?:</s>|(?=<s>|\[INST\]|\Z))", re.DOTALL)

# One turn as these two formats write it; the groups are what stands around question and answer.
TURNS = {
    "guanaco": re.compile(
        r"()### Human:(\s*)\S.*?(\s*)### Assistant:(\s*)\S.*?(\s*)(?=(### Human:)|\Z)", re.DOTALL
    ),
    "llama2": re.compile(
        r"((?:<s>\s*)?)\[INST\](\s*)\S.*?(\s*)\[/INST\](\s*)\S.*?(\s*(?:</s>\s*)?)(?=((?:<s>\s*)?\[INST\])|\Z)",
        re.DOTALL,
    ),
}
STANDARD_SPACING = {"guanaco": ("", " ", "", " ", ""), "llama2": ("<s>", " ", " ", " ", " </s>")}
MARKERS = {"guanaco": ("### Human:", "### Assistant:"), "llama2": ("[INST]", "[/INST]")}
# Begins what turn_template() returns.
TURN_TEMPLATE_MARK = "{# asks as the rows of text did that the adapter was trained on #}"
# Begins what format_template() returns for formats without earlier turns.
PROMPT_TEMPLATE_MARK = "{# writes prompts in the format of the training rows #}"


def detect_format(rows: list[dict], text_field: str) -> str | None:
    """Recognize the format of sample `rows` by their columns; None for an unknown one.

    A text column counts as guanaco or llama2 only if every sample row has that format's markers.
    """
    columns = set().union(*rows)
    if columns & {"messages", "conversations"}:
        return "messages"
    if {"instruction", "output"} <= columns:
        return "alpaca"
    if {"prompt", "completion"} <= columns:
        return "prompt_completion"
    if text_field in columns:
        texts = [
            row[text_field]
            for row in rows
            if isinstance(row.get(text_field), str) and row[text_field].strip()
        ]
        for name, answer in (("guanaco", GUANACO_ANSWER), ("llama2", LLAMA2_ANSWER)):
            if texts and all(answer.search(text) for text in texts):
                return name
        return "text"
    return None


def required_columns(row_format: str, text_field: str) -> set[str]:
    """The columns a row of this format needs: all of them, or for messages any one."""
    return {
        "messages": {"messages", "conversations"},
        "alpaca": {"instruction", "output"},
        "prompt_completion": {"prompt", "completion"},
    }.get(row_format, {text_field})


def row_segments(row: dict, formatting: Formatting, tokenizer) -> tuple[list[Segment], list[str]]:
    """(segments, notes) of a training row, the last segment trained. Raises DropRow with the reason.

    Notes say what of the row is not trained as a reader of the data might expect.
    """
    row_format, notes = formatting.row_format, []
    read = required_columns(row_format, formatting.text_field)
    if row_format == "messages":
        chat = read_chat(row)
        read = chat.columns
        if not chat.turns:
            raise DropRow("no response")
        if chat.is_question:
            notes.append("the messages after the last answer are left out")
            chat = chat.until(chat.turns[-1] + 1)
        segments, chat_notes = _written_chat(chat, formatting, tokenizer)
        notes += chat_notes
    elif row_format == "alpaca":
        read = read | {"input"}
        row = _content(row, ("instruction", "input", "output"), formatting, tokenizer)
        segments = [(_alpaca_prompt(row), False), (_text(row, "output"), True)]
    elif row_format == "prompt_completion":
        row = _content(row, ("prompt", "completion"), formatting, tokenizer)
        segments = [(_text(row, "prompt"), False), (_text(row, "completion"), True)]
    else:
        row = _content(row, (formatting.text_field,), formatting, tokenizer)
        segments = _text_segments(_text(row, formatting.text_field), row_format, tokenizer)
    while segments and not segments[-1][1]:
        segments.pop()
    if row_format != "messages" and not formatting.completion_only_loss:
        segments = [(text, True) for text, _ in segments]
    if not segments:
        raise DropRow(next((note for note in notes if "not trained" in note), "no response"))
    answers = [text for text, is_trained in segments if is_trained]
    if not all(answer.replace(tokenizer.eos_token, "").strip() for answer in answers):
        raise DropRow("empty response")
    notes = [
        f"column '{name}' is not read" for name, value in row.items() if name not in read and value
    ] + notes
    if spells_special_tokens(segments):
        notes.append("its text spells special tokens, which are taken as plain text")
    return segments, notes


def prompt_segments(row: dict, formatting: Formatting, tokenizer) -> list[Segment]:
    """The prompt of a row: the row without its last answer, if it has one. Raises DropRow.

    A row with only a `prompt` column is a question from the user, and written as `chat_segments` does.
    """
    row_format, text_field = formatting.row_format, formatting.text_field
    if required_columns(row_format, text_field).isdisjoint(row) and "prompt" in row:
        return chat_segments([{"role": "user", "content": _text(row, "prompt")}], formatting, tokenizer)
    if row_format == "messages":
        chat = read_chat(row)
        length = len(chat.messages)
        while length and chat.messages[length - 1]["role"] == "assistant":
            length -= 1
        return _question(chat.until(length), formatting, tokenizer)
    if row_format == "alpaca":
        return [(_alpaca_prompt(_content(row, ("instruction", "input"), formatting, tokenizer)), False)]
    if row_format == "prompt_completion":
        return [(_text(_content(row, ("prompt",), formatting, tokenizer), "prompt"), False)]
    row = _content(row, (text_field,), formatting, tokenizer)
    segments = _text_segments(_text(row, text_field), row_format, tokenizer)
    return segments[:-1] if len(segments) > 1 and segments[-1][1] else segments


def ends_in_answer(row: dict, formatting: Formatting, tokenizer) -> bool:
    """Whether a row ends in one answer to the prompt that prompt_segments() writes. Raises DropRow."""
    if formatting.row_format == "messages":
        chat = read_chat(row)
        roles = [message["role"] for message in chat.messages]
        is_answer = roles[-1:] == ["assistant"] and roles[-2:-1] not in ([], ["assistant"])
        return is_answer and not chat.untrained[-1]
    if formatting.row_format in ("alpaca", "prompt_completion"):
        return True
    return _text_segments(_text(row, formatting.text_field), formatting.row_format, tokenizer)[-1][1]


def chat_segments(messages: list[dict], formatting: Formatting, tokenizer) -> list[Segment]:
    """Write a chat as the prompt for its next answer; `messages` are {"role", "content"}, the user's last.

    alpaca and prompt_completion have no history: only the last message counts. guanaco and llama2 are spelled
    as in the training, if the tokenizer comes from one. In plain text each question after the first starts a
    new line. Raises DropRow.
    """
    row_format = formatting.row_format
    if row_format == "messages":
        return _question(Chat(messages), formatting, tokenizer)
    if not messages or messages[-1]["role"] == "assistant":
        raise DropRow("no question")
    if row_format in ("alpaca", "prompt_completion"):
        column = "instruction" if row_format == "alpaca" else "prompt"
        row = {column: messages[-1]["content"]}
        return prompt_segments(row, formatting, tokenizer)
    if row_format in MARKERS:
        text = tokenizer.apply_chat_template(
            messages,
            chat_template=format_template(row_format, tokenizer),
            tokenize=False,
            add_generation_prompt=True,
        )
    else:
        written = {"user": "\n{}", "assistant": "{}"}
        text = "".join(written[message["role"]].format(message["content"]) for message in messages)
        text = text.removeprefix("\n")
    return _text_segments(text, row_format, tokenizer)


def format_template(row_format: str, tokenizer) -> str | dict[str, str] | None:
    """The chat template that asks as rows of this format are asked; None for plain text, which has no turns.

    A question gets the ids that chat_segments() and encode() give it, if its text is tokenized without
    add_special_tokens: a BOS stands in it. There is no template for two things: special tokens that a
    question spells become special, and answers before the last question are tokenized together with what
    follows them. As in chat_segments(), alpaca and prompt_completion ask the last message alone.
    """
    if row_format == "text":
        return None
    if row_format == "messages":
        return tokenizer.chat_template or FALLBACK_CHAT_TEMPLATE
    if row_format in MARKERS:
        template = str(tokenizer.chat_template)
        return (
            template if template.startswith(TURN_TEMPLATE_MARK) else turn_template([], row_format, tokenizer)
        )
    before, after, question = "", "", "messages[-1]['content']"
    if row_format == "alpaca":
        before, after = _alpaca_prompt({"instruction": PROBE}).split(PROBE)
    else:
        question += ".rstrip(' ')"  # a space at its end is one token with the answer's first word (encode)
    begins = _written_bos(tokenizer) if adds_bos_itself(tokenizer) else ""
    return (
        f"{PROMPT_TEMPLATE_MARK}{{% if messages[-1]['role'] == 'assistant' %}}"
        "{{ raise_exception('the last message must come from the user') }}{% endif %}"
        f"{{{{ {json.dumps(begins + before)} + {question} + {json.dumps(after)} }}}}"
    )


def asks_otherwise(tokenizer) -> bool:
    """Whether the tokenizer's chat template is that of a training on other rows than messages."""
    return str(tokenizer.chat_template).startswith((TURN_TEMPLATE_MARK, PROMPT_TEMPLATE_MARK))


def turn_template(texts: list[str], row_format: str, tokenizer) -> str:
    """A chat template that writes turns as these texts, rows of guanaco or llama2, do most of the time.

    Rows are trained as they are, whether they say "### Human: Why?" or "### Human:\\nWhy?\\n", so that a
    question must be asked in the same way.
    """
    turns = [turn.groups() for text in texts for turn in TURNS[row_format].finditer(text)]
    before, before_question, after_question, before_answer, after_answer = STANDARD_SPACING[row_format]
    if turns:
        columns = list(zip(*turns))
        before, before_question, after_question, before_answer = (
            Counter(column).most_common(1)[0][0] for column in columns[:4]
        )
        followed = [turn[4] for turn in turns if turn[5]]
        after_answer = after_question if row_format == "guanaco" else after_answer
        if followed:
            after_answer = Counter(followed).most_common(1)[0][0]
    question, answer = MARKERS[row_format]
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token
    is_spelled = before.startswith("<s>")
    first_bos = _written_bos(tokenizer) if is_spelled or adds_bos_itself(tokenizer) else ""
    before, after_answer = before.replace("<s>", bos), after_answer.replace("</s>", eos)
    begins = "" if is_spelled else first_bos
    opening = json.dumps(before + question + before_question)
    if is_spelled and first_bos != bos:
        first = first_bos + before.removeprefix(bos) + question + before_question
        opening = f"({json.dumps(first)} if loop.first else {opening})"
    return (
        f"{TURN_TEMPLATE_MARK}{{{{ {json.dumps(begins)} }}}}{{% for message in messages %}}"
        "{% if message['role'] == 'user' %}"
        f"{{{{ {opening} + message['content'] + "
        f"{json.dumps(after_question + answer)} }}}}"
        "{% elif message['role'] == 'assistant' %}"
        f"{{{{ {json.dumps(before_answer)} + message['content'] + {json.dumps(after_answer)} }}}}"
        "{% else %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}{% endfor %}"
    )


def starts_with_bos(row_format: str, tokenizer) -> bool:
    """Whether rows of this format get a BOS that is not in their text.

    A chat template writes its own BOS, or wants none. Other rows get one if the tokenizer adds one by itself.
    """
    return row_format != "messages" and adds_bos_itself(tokenizer)


def _written_bos(tokenizer) -> str:
    """How a text spells the BOS in front of its first word, so that the word's ids stay as after a BOS's id.

    Tokenizers that put a space in front of a text, but not behind a special token (Llama 2's as transformers
    5 makes it), need that space written.
    """
    bos = tokenizer.bos_token or ""
    want = tokenizer("a", add_special_tokens=False)["input_ids"]
    for text in (bos, f"{bos} "):
        if bos and tokenizer(f"{text}a", add_special_tokens=False)["input_ids"][1:] == want:
            return text
    return bos


def _alpaca_prompt(row: dict) -> str:
    instruction = _text(row, "instruction")
    context = "" if row.get("input") is None else _text(row, "input")
    intro = ALPACA_INTRO_WITH_INPUT if context.strip() else ALPACA_INTRO
    context_part = f"### Input:\n{context}\n\n" if context.strip() else ""
    return f"{intro}{ALPACA_REQUEST}### Instruction:\n{instruction}\n\n{context_part}### Response:\n"


def _text_segments(text: str, row_format: str, tokenizer) -> list[Segment]:
    """Split a text column at its format's markers. Plain text is one trained segment."""
    if not text.strip():
        raise DropRow("empty text")
    if row_format == "text":
        return [(text, True)]
    answers = (GUANACO_ANSWER if row_format == "guanaco" else LLAMA2_ANSWER).finditer(text)
    segments, position = [], 0
    for answer in answers:
        segments.append((text[position : answer.start(1)], False))
        segments.append((text[answer.start(1) : answer.end()], True))
        position = answer.end()
    if text[position:].strip():
        segments.append((text[position:], False))
    if row_format == "llama2":  # its <s> and </s> stand for this tokenizer's BOS and EOS
        bos, eos = tokenizer.bos_token or "", tokenizer.eos_token
        segments = [
            (text.replace("<s>", bos).replace("</s>", eos), is_trained) for text, is_trained in segments
        ]
    return [(text, is_trained) for text, is_trained in segments if text]


def _question(chat: Chat, formatting: Formatting, tokenizer) -> list[Segment]:
    if not chat.is_question:
        raise DropRow("no question")
    return _written_chat(chat, formatting, tokenizer)[0]


def _written_chat(chat: Chat, formatting: Formatting, tokenizer) -> tuple[list[Segment], list[str]]:
    for message in chat.messages:
        if message["role"] == "assistant" and message.keys() == {"role", "content"}:
            if not message["content"].strip():
                raise DropRow("empty response")
    if formatting.takes_special_tokens_as_text:
        chat = mark_chat(chat, tokenizer)
    return template_segments(chat, tokenizer, formatting.train_on, formatting.completion_only_loss)


def _content(row: dict, columns: tuple[str, ...], formatting: Formatting, tokenizer) -> dict:
    """The row with the special tokens in these columns marked as plain text, if they are to be taken so.

    Not so a BOS at the start of a prompt and an EOS at the end of an answer: those are meant.
    """
    if not formatting.takes_special_tokens_as_text:
        return row
    marked = {}
    for name in columns:
        if not isinstance(text := row.get(name), str):
            continue
        start, end = "", ""
        if name == "prompt" and tokenizer.bos_token and text.lstrip().startswith(tokenizer.bos_token):
            start, text = tokenizer.bos_token, text.lstrip().removeprefix(tokenizer.bos_token)
        if name in ("completion", "output") and text.rstrip().endswith(tokenizer.eos_token):
            text, end = text.rstrip().removesuffix(tokenizer.eos_token), tokenizer.eos_token
        marked[name] = start + mark_special_tokens(text, tokenizer) + end
    return row | marked


def _text(row: dict, column: str) -> str:
    if column not in row:
        raise DropRow(f"'{column}' is missing")
    value = row[column]
    if not isinstance(value, str):
        kind = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", list: "a list"}
        raise DropRow(f"'{column}' is {kind.get(type(value), 'an object')}, not text")
    return value
