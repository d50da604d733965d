"""Row formats: from a row of the data, or a chat, to segments of text that say which part is trained.

A segment is (text, trained). Training and generation share these functions, so a prompt is always written,
split and tokenized the way the adapter saw it.
"""

import re

IGNORE_INDEX = -100  # label of a token that the loss does not count: cross_entropy's default ignore_index

Segment = tuple[str, bool]

ALPACA_INTRO = "Below is an instruction that describes a task. "
ALPACA_INTRO_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
)
ALPACA_REQUEST = "Write a response that appropriately completes the request.\n\n"

GUANACO_ANSWER = re.compile(r"### Assistant:(.*?)(?=### Human:|\Z)", re.DOTALL)
LLAMA2_ANSWER = re.compile(r"\[/INST\](.*?)(?:</s>|(?=<s>|\[INST\]|\Z))", re.DOTALL)

# For message rows where the tokenizer brings no chat template (base models such as Llama-2-7b-hf).
FALLBACK_CHAT_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}### Assistant: {{ message['content'] }}{{ eos_token }}\n"
    "{% elif message['role'] == 'system' %}### System: {{ message['content'] }}\n"
    "{% elif message['role'] == 'user' %}### Human: {{ message['content'] }}\n"
    "{% else %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}### Assistant:{% endif %}"
)
# Names that data sets give the two sides of a chat. Others (tool, say) are left to the chat template.
ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "bot": "assistant",
}  # fmt: skip


class DropRow(Exception):
    """This row cannot be trained on; the message is the reason under which it is counted."""


def detect_format(rows: list[dict], text_field: str) -> str | None:
    """Recognise the format of sample `rows` from their columns, or return None.

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
    """The columns of which a row of this format needs every one (for messages: any one)."""
    return {
        "messages": {"messages", "conversations"},
        "alpaca": {"instruction", "output"},
        "prompt_completion": {"prompt", "completion"},
    }.get(row_format, {text_field})


def row_segments(row: dict, row_format: str, text_field: str, tokenizer) -> list[Segment]:
    """Split a training row into segments; the last one is trained. Raises DropRow with the reason."""
    if row_format == "messages":
        messages = _messages(row)
        while messages and messages[-1]["role"] != "assistant":  # a question without an answer trains nothing
            messages.pop()
        segments = _chat_segments(messages, tokenizer)
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
    if not all(text.replace(tokenizer.eos_token, "").strip() for text, trained in segments if trained):
        raise DropRow("empty response")
    return segments


def prompt_segments(row: dict, row_format: str, text_field: str, tokenizer) -> list[Segment]:
    """The prompt of a row to be answered: its last answer, if it has one, is left out.

    A row with only a `prompt` column is a question, wrapped as `chat_segments` does. Raises DropRow.
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
    """Write a chat ({"role", "content"} turns, the user's last) as the prompt of the next answer.

    alpaca and prompt_completion know no history: only the last turn is kept. Plain text goes on as it is,
    a later question on a line of its own.
    """
    if not messages or messages[-1]["role"] == "assistant":
        raise DropRow("no question")
    if row_format == "messages":
        return _chat_segments(messages, tokenizer)
    if row_format == "alpaca":
        return [(_alpaca_prompt({"instruction": messages[-1]["content"]}), False)]
    if row_format == "prompt_completion":
        return [(messages[-1]["content"], False)]
    if row_format == "guanaco":
        turns = {"user": "### Human: {}### Assistant:", "assistant": " {}"}
    elif row_format == "llama2":
        turns = {"user": "<s>[INST] {} [/INST]", "assistant": " {} </s>"}
    else:
        turns = {"user": "\n{}", "assistant": "{}"}
    text = "".join(turns[message["role"]].format(message["content"]) for message in messages)
    text = text.removeprefix("\n")
    return _text_segments(text, row_format, tokenizer)


def encode(segments: list[Segment], adds_bos: bool, tokenizer) -> tuple[list[int], list[int]]:
    """Tokenize segments into (input_ids, labels) of equal length, with one leading BOS or none.

    BOS is there if `adds_bos` or if the text itself begins with it, in either case once. A segment's ids
    never depend on what follows it: a prompt has the same ids with and without its answer, so generation
    starts from exactly what was trained. Labels are the ids, IGNORE_INDEX where not trained.
    """
    input_ids, labels, spaces = [], [], ""
    before, before_ids = "", None  # the text of the last segment, and its ids alone where they are known
    (first, is_first_trained), *others = segments
    while tokenizer.bos_token and first.lstrip().startswith(tokenizer.bos_token):
        first, adds_bos = first.lstrip().removeprefix(tokenizer.bos_token), True
    if adds_bos:
        input_ids.append(tokenizer.bos_token_id)
        labels.append(IGNORE_INDEX)
    for text, trained in [(first, is_first_trained), *others]:
        text = spaces + text
        # Tokenizers join a space with the word behind it, so a prompt's last spaces belong to the answer.
        spaces = "" if trained else text[len(text.rstrip(" ")) :]
        text = text.removesuffix(spaces)
        ids = _continuation_ids(before, before_ids, text, tokenizer)
        input_ids += ids
        labels += ids if trained else [IGNORE_INDEX] * len(ids)
        if text:
            before, before_ids = text, None if before else ids
    return input_ids, labels


def starts_with_bos(row_format: str, tokenizer) -> bool:
    """Whether rows get a BOS that their text does not spell out.

    A chat template spells it out or means none; elsewhere it stands where the tokenizer itself puts one
    (Llama's does, Qwen's and GPT-2's do not).
    """
    if row_format == "messages" or tokenizer.bos_token_id is None:
        return False
    return tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def _continuation_ids(before: str, before_ids: list[int] | None, text: str, tokenizer) -> list[int]:
    """Ids of `text` where it follows `before`, whose own ids stay as they are.

    Tokenized alone, text may start differently from text in its place: Llama 2's tokenizer puts a space in
    front. Where text in its place would share a token with what is before, it is tokenized as if on a new
    line.
    """
    for context, context_ids in ((before, before_ids), ("\n", None)) if before else ():
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
    """Split a text column at its format's markers; plain text is one trained segment."""
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
    if row_format == "llama2":  # its <s> and </s> stand for whatever this tokenizer's BOS and EOS are
        bos, eos = tokenizer.bos_token or "", tokenizer.eos_token
        segments = [(text.replace("<s>", bos).replace("</s>", eos), trained) for text, trained in segments]
    return [(text, trained) for text, trained in segments if text]


def _messages(row: dict) -> list[dict]:
    """Turns as {"role", "content"} from a `messages` column or ShareGPT's `conversations` (from, value)."""
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


def _chat_segments(messages: list[dict], tokenizer) -> list[Segment]:
    """Render with the tokenizer's chat template; every assistant turn is trained.

    Where the template writes earlier turns differently once more follow (as those that strip reasoning do),
    only the last assistant turn is trained, in the form generation will see. Messages that end with a user's
    turn close with the template's generation prompt.
    """
    segments, rendered = [], ""
    for position, message in enumerate(messages):
        is_answer, is_last = message["role"] == "assistant", position == len(messages) - 1
        if not is_answer and not is_last:
            continue
        prompt = _render(
            messages[:position] if is_answer else messages, tokenizer, add_generation_prompt=True
        )
        if not prompt.startswith(rendered):
            segments, rendered = [], ""
        segments.append((prompt[len(rendered) :], False))
        if is_answer:
            if not message["content"].strip():
                raise DropRow("empty response")
            rendered = _render(messages[: position + 1], tokenizer, add_generation_prompt=False)
            if not rendered.startswith(prompt):
                raise DropRow("the chat template does not start an answer with its own generation prompt")
            if rendered.rstrip().endswith(
                tokenizer.eos_token
            ):  # what a template puts behind EOS is no answer
                rendered = rendered.rstrip()
            segments.append((rendered[len(prompt) :], True))
    return segments


def _render(messages: list[dict], tokenizer, add_generation_prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # templates raise whatever they like on role orders they refuse
        raise DropRow(f"the chat template refuses it: {error}") from error


def _text(row: dict, column: str) -> str:
    if column not in row:
        raise DropRow(f"'{column}' is missing")
    value = row[column]
    if not isinstance(value, str):
        kind = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", list: "a list"}
        raise DropRow(f"'{column}' is {kind.get(type(value), 'an object')}, not text")
    return value
