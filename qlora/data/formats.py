"""Row formats: from a row of data, or a chat, to segments of text marked as trained or not, and to token ids.

Training and generation share these functions, so a prompt is always written, split and tokenized the way the
adapter saw it in training.
"""

import re

IGNORE_INDEX = -100  # label of a token left out of the loss: cross_entropy's default ignore_index

Segment = tuple[str, bool]  # (text, whether it is trained)

ALPACA_INTRO = "Below is an instruction that describes a task. "
ALPACA_INTRO_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
)
ALPACA_REQUEST = "Write a response that appropriately completes the request.\n\n"

GUANACO_ANSWER = re.compile(r"### Assistant:(.*?)(?=### Human:|\Z)", re.DOTALL)
LLAMA2_ANSWER = re.compile(r"\[/INST\](.*?)(?:</s>|(?=<s>|\[INST\]|\Z))", re.DOTALL)

# For message rows if the tokenizer has no chat template, as with base models such as Llama-2-7b-hf.
FALLBACK_CHAT_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}### Assistant: {{ message['content'] }}{{ eos_token }}\n"
    "{% elif message['role'] == 'system' %}### System: {{ message['content'] }}\n"
    "{% elif message['role'] == 'user' %}### Human: {{ message['content'] }}\n"
    "{% else %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}### Assistant:{% endif %}"
)
# Names that datasets use for the two sides of a chat. Other roles, such as tool, are kept as they are.
ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "bot": "assistant",
}  # fmt: skip


class DropRow(Exception):
    """This row cannot be trained on. The message is the reason it is counted under."""


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


def row_segments(row: dict, row_format: str, text_field: str, tokenizer) -> list[Segment]:
    """Split a training row into segments, the last of them trained. Raises DropRow with the reason."""
    if row_format == "messages":
        messages = _messages(row)
        while messages and messages[-1]["role"] != "assistant":  # a last question without an answer
            messages.pop()
        segments = _template_segments(messages, tokenizer)
    elif row_format == "alpaca":
        segments = [(_alpaca_prompt(row), False), (_text(row, "output"), True)]
    elif row_format == "prompt_completion":
        segments = [(_text(row, "prompt"), False), (_text(row, "completion"), True)]
    else:
        segments = _text_segments(_text(row, text_field), row_format, tokenizer)
    while segments and not segments[-1][1]:
        segments.pop()
    if not segments:
        raise DropRow("no response")
    answers = [text for text, is_trained in segments if is_trained]
    if not all(answer.replace(tokenizer.eos_token, "").strip() for answer in answers):
        raise DropRow("empty response")
    return segments


def prompt_segments(row: dict, row_format: str, text_field: str, tokenizer) -> list[Segment]:
    """The prompt of a row: the row without its last answer, if it has one. Raises DropRow.

    A row with only a `prompt` column is a question from the user, and written as `chat_segments` does.
    """
    if required_columns(row_format, text_field).isdisjoint(row) and "prompt" in row:
        return chat_segments([{"role": "user", "content": _text(row, "prompt")}], row_format, tokenizer)
    if row_format == "messages":
        messages = _messages(row)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        return chat_segments(messages, row_format, tokenizer)
    if row_format == "alpaca":
        return [(_alpaca_prompt(row), False)]
    if row_format == "prompt_completion":
        return [(_text(row, "prompt"), False)]
    segments = _text_segments(_text(row, text_field), row_format, tokenizer)
    return segments[:-1] if len(segments) > 1 and segments[-1][1] else segments


def chat_segments(messages: list[dict], row_format: str, tokenizer) -> list[Segment]:
    """Write a chat as the prompt for its next answer; `messages` are {"role", "content"}, the user's last.

    alpaca and prompt_completion have no history: only the last message counts. In plain text each question
    after the first starts a new line. Raises DropRow.
    """
    if not messages or messages[-1]["role"] == "assistant":
        raise DropRow("no question")
    if row_format == "messages":
        return _template_segments(messages, tokenizer)
    if row_format == "alpaca":
        return [(_alpaca_prompt({"instruction": messages[-1]["content"]}), False)]
    if row_format == "prompt_completion":
        return [(messages[-1]["content"], False)]
    if row_format == "guanaco":
        written = {"user": "### Human: {}### Assistant:", "assistant": " {}"}
    elif row_format == "llama2":
        written = {"user": "<s>[INST] {} [/INST]", "assistant": " {} </s>"}
    else:
        written = {"user": "\n{}", "assistant": "{}"}
    text = "".join(written[message["role"]].format(message["content"]) for message in messages)
    text = text.removeprefix("\n")
    return _text_segments(text, row_format, tokenizer)


def encode(segments: list[Segment], adds_bos: bool, tokenizer) -> tuple[list[int], list[int]]:
    """Tokenize segments into (input_ids, labels) of equal length, with one leading BOS or none.

    There is a BOS if `adds_bos`, or if the text itself starts with one; never two. A segment's ids do not
    depend on what follows it: a prompt has the same ids with and without its answer, so generation starts
    from exactly what was trained. Labels are the ids, and IGNORE_INDEX where not trained.
    """
    input_ids, labels = [], []
    (first, is_first_trained), *others = segments
    while tokenizer.bos_token and first.lstrip().startswith(tokenizer.bos_token):
        first, adds_bos = first.lstrip().removeprefix(tokenizer.bos_token), True
    if adds_bos:
        input_ids.append(tokenizer.bos_token_id)
        labels.append(IGNORE_INDEX)
    held_spaces = ""  # from the end of the segment before
    previous, previous_ids = "", None  # text of the last segment with any; its ids if tokenized alone
    for text, is_trained in [(first, is_first_trained), *others]:
        text = held_spaces + text
        # Tokenizers join a space with the word after it, so a prompt's trailing spaces belong to the answer.
        held_spaces = "" if is_trained else text[len(text.rstrip(" ")) :]
        text = text.removesuffix(held_spaces)
        ids = _continuation_ids(previous, previous_ids, text, tokenizer)
        input_ids += ids
        labels += ids if is_trained else [IGNORE_INDEX] * len(ids)
        if text:
            previous, previous_ids = text, None if previous else ids
    return input_ids, labels


def starts_with_bos(row_format: str, tokenizer) -> bool:
    """Whether rows of this format get a BOS that is not in their text.

    A chat template writes its own BOS, or wants none. Other rows get one if the tokenizer adds one by itself,
    as Llama's does; Qwen's and GPT-2's do not.
    """
    if row_format == "messages" or tokenizer.bos_token_id is None:
        return False
    return tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def _continuation_ids(previous: str, previous_ids: list[int] | None, text: str, tokenizer) -> list[int]:
    """Ids of `text` as it stands after `previous`, whose own ids must not change.

    Tokenized alone, a text may start differently: Llama 2's tokenizer puts a space in front of it. If the end
    of `previous` and the start of `text` would merge into one token, it is tokenized as after a newline.
    """
    for context, context_ids in ((previous, previous_ids), ("\n", None)) if previous else ():
        context_ids = context_ids or _ids(context, tokenizer)
        joined_ids = _ids(context + text, tokenizer)
        if joined_ids[: len(context_ids)] == context_ids:
            return joined_ids[len(context_ids) :]
    return _ids(text, tokenizer)


def _ids(text: str, tokenizer) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


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
    if position < len(text):
        segments.append((text[position:], False))
    if row_format == "llama2":  # its <s> and </s> stand for this tokenizer's BOS and EOS
        bos, eos = tokenizer.bos_token or "", tokenizer.eos_token
        segments = [
            (text.replace("<s>", bos).replace("</s>", eos), is_trained) for text, is_trained in segments
        ]
    return [(text, is_trained) for text, is_trained in segments if text]


def _messages(row: dict) -> list[dict]:
    """{"role", "content"} messages from a `messages` column, or from ShareGPT's `conversations`."""
    column = "messages" if "messages" in row else "conversations"
    turns = row.get(column)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DropRow(f"'{column}' is not a list of messages")
    messages = []
    for turn in turns:
        role = turn.get("role") or turn.get("from")
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        if not isinstance(role, str) or not isinstance(content, str):
            raise DropRow(f"a message in '{column}' has no text or no role")
        messages.append({"role": ROLES.get(role, role), "content": content})
    return messages


def _template_segments(messages: list[dict], tokenizer) -> list[Segment]:
    """Render messages with the tokenizer's chat template; every assistant message is trained.

    Each answer is found by rendering the chat before it, with the generation prompt, and the chat up to it.
    A template may write earlier messages differently once more follow (those that strip reasoning do): then
    only the last answer is trained, in the form that generation will see. A chat that ends with the user's
    message closes with the generation prompt.
    """
    segments, rendered = [], ""
    for position, message in enumerate(messages):
        is_answer, is_last = message["role"] == "assistant", position == len(messages) - 1
        if not is_answer and not is_last:
            continue
        prompt_messages = messages[:position] if is_answer else messages
        prompt = _render(prompt_messages, tokenizer, add_generation_prompt=True)
        if not prompt.startswith(rendered):  # the template has rewritten what was rendered so far
            segments, rendered = [], ""
        segments.append((prompt[len(rendered) :], False))
        if is_answer:
            if not message["content"].strip():
                raise DropRow("empty response")
            rendered = _render(messages[: position + 1], tokenizer, add_generation_prompt=False)
            if not rendered.startswith(prompt):
                raise DropRow("the chat template does not start an answer with its own generation prompt")
            if rendered.rstrip().endswith(tokenizer.eos_token):
                rendered = rendered.rstrip()  # whitespace after EOS is not part of the answer
            segments.append((rendered[len(prompt) :], True))
    return segments


def _render(messages: list[dict], tokenizer, add_generation_prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # templates are code: any type, for any role they reject
        raise DropRow(f"the chat template refuses it: {error}") from error


def _text(row: dict, column: str) -> str:
    if column not in row:
        raise DropRow(f"'{column}' is missing")
    value = row[column]
    if not isinstance(value, str):
        kind = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", list: "a list"}
        raise DropRow(f"'{column}' is {kind.get(type(value), 'an object')}, not text")
    return value
