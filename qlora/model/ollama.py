"""A Modelfile: how Ollama asks a GGUF file. Its template is written in Go's text/template language."""

import re
from dataclasses import dataclass

from qlora.data.segments import DropRow
from qlora.model.generation import PromptWriter

# What user, assistant and system say in a chat that shows how a template writes it.
SYSTEM, QUESTION, ANSWER, NEXT_QUESTION = "PROBESYSTEM", "PROBEQUESTION", "PROBEANSWER", "PROBENEXT"
# The names in angle brackets are replaced by the texts of a ChatTexts. $i counts the messages from 0.
LAST_MESSAGE = (
    "{{ range $i, $message := .Messages }}{{ if eq (len (slice $.Messages $i)) 1 }}"
    "<START>{{ $message.Content }}<AFTER_QUESTION>{{ end }}{{ end }}"
)
AFTER_SYSTEM = '(and (eq $i 1) (eq (index $.Messages 0).Role "system"))'
TURNS = (
    '{{ if eq $message.Role "user" }}%s{{ $message.Content }}<AFTER_QUESTION>{{ end }}'
    '{{ if eq $message.Role "assistant" }}<BEFORE_ANSWER>{{ $message.Content }}{{ end }}{{ end }}'
)
WITHOUT_SYSTEM = "{{ range $i, $message := .Messages }}" + TURNS % (
    "{{ if or (eq $i 0) " + AFTER_SYSTEM + " }}<START>{{ else }}<BETWEEN>{{ end }}"
)
WITH_SYSTEM = (
    '{{ range $i, $message := .Messages }}{{ if eq $message.Role "system" }}'
    "<BEFORE_SYSTEM>{{ $message.Content }}<AFTER_SYSTEM>{{ end }}"
) + TURNS % ("{{ if eq $i 0 }}<START>{{ else if not " + AFTER_SYSTEM + " }}<BETWEEN>{{ end }}")
MAX_CONTEXT = 4096  # tokens; Ollama reserves memory for all of it


@dataclass(frozen=True)
class ChatTexts:
    """The texts that stand around what user, assistant and system say."""

    start: str  # before the first question
    after_question: str
    before_answer: str | None  # of an earlier answer, after after_question; None if a prompt has no history
    between: str  # an earlier answer and the next question
    # Around the system message; the second then replaces start. None if there can be no system message.
    system: tuple[str, str] | None


def read_chat_texts(writer: PromptWriter) -> ChatTexts | None:
    """How prompts are written, as seen from a few; None if turns are not all written the same way."""
    try:
        first = _written(writer, [("user", QUESTION)])
        later = _written(writer, [("user", QUESTION), ("assistant", ANSWER), ("user", NEXT_QUESTION)])
    except DropRow:
        return None
    start, _, after_question = first.partition(QUESTION)
    system = _system_texts(writer, after_question) if writer.row_format == "messages" else None
    if not writer.has_history:
        texts = ChatTexts(start, after_question, None, "", None)
        return texts if later == start + NEXT_QUESTION + after_question else None
    begins, _, rest = later.partition(QUESTION)
    middle, _, rest = rest.partition(ANSWER)
    between, _, ends = rest.partition(NEXT_QUESTION)
    if begins != start or ends != after_question or not middle.startswith(after_question):
        return None
    return ChatTexts(start, after_question, middle.removeprefix(after_question), between, system)


def _system_texts(writer: PromptWriter, after_question: str) -> tuple[str, str] | None:
    try:
        text = _written(writer, [("system", SYSTEM), ("user", QUESTION)])
    except DropRow:
        return None
    before, is_written, rest = text.partition(SYSTEM)
    after, _, ends = rest.partition(QUESTION)
    return (before, after) if is_written and ends == after_question else None


def _written(writer: PromptWriter, turns: list[tuple[str, str]]) -> str:
    return writer.chat_text([{"role": role, "content": content} for role, content in turns])


def go_template(texts: ChatTexts) -> str | None:
    """The template that writes a chat with these texts; None if they contain what Go or Ollama would read."""
    parts = {
        "START": texts.start, "AFTER_QUESTION": texts.after_question,
        "BEFORE_ANSWER": texts.before_answer or "", "BETWEEN": texts.between,
        "BEFORE_SYSTEM": "", "AFTER_SYSTEM": "",
    }  # fmt: skip
    if texts.system is not None:
        parts["BEFORE_SYSTEM"], parts["AFTER_SYSTEM"] = texts.system
    if any(mark in part for part in parts.values() for mark in ("{{", "}}", '"""')):
        return None
    if texts.before_answer is None:
        template = LAST_MESSAGE
    else:
        template = WITH_SYSTEM if texts.system is not None else WITHOUT_SYSTEM
    return re.sub("<([A-Z_]+)>", lambda match: parts[match[1]], template)


def modelfile(gguf_name: str, writer: PromptWriter, context: int, stops: list[str]) -> str:
    """The Modelfile of a GGUF file in the same folder; it answers as generate.py does by default."""
    texts = read_chat_texts(writer)
    template = texts and go_template(texts)
    lines = [f"FROM ./{gguf_name}"]
    if template:
        lines.append(f'TEMPLATE """{template}"""')
    else:
        reason = "does not wrap every turn in the same text" if texts is None else 'writes {{, }} or """'
        lines.append(f"# No TEMPLATE: this chat template {reason}, so it cannot be written in Go.")
        lines.append("# Ollama reads the one in the GGUF file, if it knows it: compare the answers.")
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if '"' not in stop]
    lines.append(f"PARAMETER num_ctx {min(context, MAX_CONTEXT)}")
    lines += ["# The most likely token each time, as generate.py.", "PARAMETER temperature 0"]
    lines.append("PARAMETER repeat_penalty 1")
    return "\n".join(lines) + "\n"
