"""Every turn of the assistant is found in what a chat template writes. Expected texts are written by hand."""

import datetime
import json

import pytest

from qlora.data.chat import Chat, read_chat
from qlora.data.chat_template import set_chat_template
from qlora.data.formats import chat_segments, prompt_segments, row_segments
from qlora.data.formatting import Formatting
from qlora.data.segments import DropRow, encode
from qlora.data.tokenize import tokenize_rows
from qlora.errors import InputError
from tests.data.chat_templates import CHATML, LLAMA32, TEMPLATES, use_template

MESSAGES = Formatting("messages")
OTHER_PROMPT = "the chat template asks for the last answer with another text than it writes here"
DAY = datetime.date(2026, 11, 25)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
TOOL_JSON = '{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}'


def call(arguments='{"city": "Rome"}'):
    function = {"name": "weather", "arguments": arguments}
    return [{"type": "function", "id": "abc123456", "function": function}]


def turn(role, content, **keys):
    return {"role": role, "content": content, **keys}


TWO_TURNS = [
    turn("user", "What?"),
    turn("assistant", "A leaf."),
    turn("user", "Sure?"),
    turn("assistant", "Yes."),
]
REASONING = [
    turn("user", "What?"), turn("assistant", "<think>\nHm.\n</think>\n\nA leaf."),
    turn("user", "Sure?"), turn("assistant", "<think>\nSo.\n</think>\n\nYes."),
]  # fmt: skip
CALL = [
    turn("user", "Rome?"), turn("assistant", None, tool_calls=call()),
    turn("tool", "Sunny"), turn("assistant", "It is sunny."),
]  # fmt: skip

# (template, messages, tools): the rendered row, with what is trained in brackets.
WRITTEN = {
    ("ChatML", "two turns"):
        "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n⟦A leaf.<|im_end|>⟧\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n⟦Yes.<|im_end|>⟧",
    ("Llama 3.2", "two turns"):
        "<s><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 25 Nov 2026\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦A leaf.<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Yes.<|eot_id|>⟧",
    ("Qwen3", "two turns"):
        "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n⟦A leaf.<|im_end|>⟧\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nYes.<|im_end|>⟧",
    ("Phi-3", "two turns"):
        "<|user|>\nWhat?<|end|>\n<|assistant|>\n⟦A leaf.<|end|>⟧\n"
        "<|user|>\nSure?<|end|>\n<|assistant|>\n⟦Yes.<|end|>\n<|endoftext|>⟧",
    ("Gemma 3", "two turns"):
        "<s><start_of_turn>user\nWhat?<end_of_turn>\n<start_of_turn>model\n⟦A leaf.<end_of_turn>⟧\n"
        "<start_of_turn>user\nSure?<end_of_turn>\n<start_of_turn>model\n⟦Yes.<end_of_turn>\n⟧",
    ("Mistral v0.3", "two turns"): "<s>[INST] What?[/INST]⟦ A leaf.</s>⟧[INST] Sure?[/INST]⟦ Yes.</s>⟧",
    ("DeepSeek", "two turns"):
        "<s><|User|>What?<|Assistant|>⟦A leaf.</s>⟧<|User|>Sure?<|Assistant|>⟦Yes.</s>⟧",
    ("marked", "two turns"):
        "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n⟦A leaf.<|im_end|>⟧\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n⟦Yes.<|im_end|>⟧",
    ("Qwen3", "reasoning"):
        "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n⟦A leaf.<|im_end|>⟧\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n⟦<think>\nSo.\n</think>\n\nYes.<|im_end|>⟧",
    ("DeepSeek", "reasoning"):
        "<s><|User|>What?<|Assistant|>⟦\n\nA leaf.</s>⟧<|User|>Sure?<|Assistant|>⟦\n\nYes.</s>⟧",
    ("Llama 3.2", "call"):
        "<s><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 25 Nov 2026\n\nYou may call these functions:\n\n"
        + json.dumps(TOOL, indent=4) + "\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nRome?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        '⟦{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>⟧'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"Sunny"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦It is sunny.<|eot_id|>⟧",
    ("Qwen3", "call"):
        "<|im_start|>system\n# Tools\n<tools>\n" + TOOL_JSON + "\n</tools><|im_end|>\n"
        "<|im_start|>user\nRome?<|im_end|>\n<|im_start|>assistant\n"
        '⟦<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>user\n<tool_response>\nSunny\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nIt is sunny.<|im_end|>⟧",
    ("Mistral v0.3", "call"):
        "<s>[AVAILABLE_TOOLS] [" + TOOL_JSON + "][/AVAILABLE_TOOLS][INST] Rome?[/INST]"
        '⟦[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}}]</s>⟧'
        '[TOOL_RESULTS] "Sunny"[/TOOL_RESULTS] ⟦It is sunny.</s>⟧',  # encode() adds the space to the answer
    ("DeepSeek", "call"):
        '<s><|User|>Rome?<|Assistant|>⟦<|calls|>weather\n```json\n{"city": "Rome"}\n```<|/calls|></s>⟧'
        "<|output|>Sunny<|/output|>⟦It is sunny.</s>⟧",
}  # fmt: skip
ROWS = {
    "two turns": {"messages": TWO_TURNS},
    "reasoning": {"messages": REASONING},
    "call": {"messages": CALL, "tools": [TOOL]},
}


def prepare(tokenizer, name):
    use_template(tokenizer, name)
    set_chat_template(tokenizer, None, DAY)


def written(row, tokenizer, formatting=MESSAGES) -> str:
    """What is written of a row, with what is trained in brackets."""
    segments, _ = row_segments(row, formatting, tokenizer)
    return "".join(f"⟦{text}⟧" if is_trained else text for text, is_trained in segments)


def notes(row, tokenizer, formatting=MESSAGES) -> list[str]:
    return row_segments(row, formatting, tokenizer)[1]


# ---------------------------------------------------------------- every turn


@pytest.mark.parametrize("name, kind", WRITTEN)
def test_every_turn_is_trained_wherever_the_template_writes_it(tokenizer, name, kind):
    prepare(tokenizer, name)
    assert written(ROWS[kind], tokenizer) == WRITTEN[name, kind]


@pytest.mark.parametrize("name, kind", WRITTEN)
def test_a_prompt_is_its_row_up_to_the_last_answer(tokenizer, name, kind):
    """In tokens, so that the model is asked as it was trained. DeepSeek's prompt opens the reasoning."""
    prepare(tokenizer, name)
    ((ids, labels),) = tokenize_rows([("row", ROWS[kind])], tokenizer, MESSAGES).fetch([0])
    asked, _ = encode(prompt_segments(ROWS[kind], MESSAGES, tokenizer), False, tokenizer)
    answer_start = len(labels) - labels.tolist()[::-1].index(-100)
    if name == "DeepSeek" and kind != "call":
        opening, _ = encode([("\n", False), ("<think>\n", False)], False, tokenizer)
        asked = asked[: -len(opening) + 1]
    assert asked == ids.tolist()[:answer_start]


@pytest.mark.parametrize("name", TEMPLATES)
def test_only_the_last_turn_is_trained_if_asked_for(tokenizer, name):
    prepare(tokenizer, name)
    every = written(ROWS["two turns"], tokenizer)
    last = written(ROWS["two turns"], tokenizer, Formatting("messages", train_on="last"))
    first = every[every.index("⟦") : every.index("⟧") + 1]
    assert last == every.replace(first, first[1:-1])


@pytest.mark.parametrize("key, value, is_trained", [
    ("weight", 0, False), ("weight", 1, True), ("train", False, False), ("train", True, True),
])  # fmt: skip
def test_a_message_may_say_that_it_is_not_trained(tokenizer, key, value, is_trained):
    prepare(tokenizer, "ChatML")
    row = {"messages": [TWO_TURNS[0], TWO_TURNS[1] | {key: value}, *TWO_TURNS[2:]]}
    expected = WRITTEN["ChatML", "two turns"]
    if not is_trained:
        expected = expected.replace("⟦A leaf.<|im_end|>⟧", "A leaf.<|im_end|>")
    assert written(row, tokenizer) == expected
    assert any("not trained" in note for note in notes(row, tokenizer)) is not is_trained


def test_a_weight_between_0_and_1_drops_the_row(tokenizer):
    prepare(tokenizer, "ChatML")
    with pytest.raises(DropRow, match="'weight' of a message is neither 0 nor 1"):
        notes({"messages": [TWO_TURNS[0], TWO_TURNS[1] | {"weight": 0.5}]}, tokenizer)


def test_messages_after_the_last_answer_are_noted(tokenizer):
    prepare(tokenizer, "ChatML")
    assert notes({"messages": TWO_TURNS[:3]}, tokenizer) == [
        "the messages after the last answer are left out"
    ]


@pytest.mark.parametrize("question", ["What?", "think", "n", "<think>"])
def test_what_a_user_writes_does_not_move_the_start_of_the_answer(tokenizer, question):
    """Even if it also stands in what the template writes in front of the answer."""
    prepare(tokenizer, "Qwen3")
    row = {"messages": [turn("user", question), turn("assistant", "A leaf.")]}
    assert written(row, tokenizer).endswith("assistant\n⟦<think>\n\n</think>\n\nA leaf.<|im_end|>⟧")


def test_a_mark_around_the_whole_turn_is_cut_to_what_the_model_writes(tokenizer):
    """As in SmolLM3's template, which marks the header and the newline too."""
    prepare(tokenizer, "marked")
    header, content = "<|im_start|>assistant\n", "{{ m['content'] }}{% endgeneration %}<|im_end|>\n"
    tokenizer.chat_template = tokenizer.chat_template.replace(
        f"{header}{{% generation %}}{content}",
        "{% generation %}" + header + "{{ m['content'] }}<|im_end|>{{ '\n' }}{% endgeneration %}",
    )
    assert written(ROWS["two turns"], tokenizer) == WRITTEN["marked", "two turns"]


def test_a_generation_prompt_that_a_template_always_appends_is_not_trained(tokenizer):
    prepare(tokenizer, "ChatML")
    tokenizer.chat_template = CHATML.replace("{% if add_generation_prompt %}", "{% if true %}")
    assert written(ROWS["two turns"], tokenizer) == WRITTEN["ChatML", "two turns"]


@pytest.mark.parametrize("key, value", [("weight", 0), ("train", 0), ("train", False)])
def test_what_must_not_be_trained_is_not_trained_with_the_prompts_either(tokenizer, key, value):
    prepare(tokenizer, "ChatML")
    row = {"messages": [TWO_TURNS[0], TWO_TURNS[1] | {key: value}, *TWO_TURNS[2:]]}
    everything = Formatting("messages", completion_only_loss=False)
    assert written(row, tokenizer, everything) == (
        "⟦<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n⟧A leaf.<|im_end|>"
        "⟦\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n⟧⟦Yes.<|im_end|>⟧"
    )


def test_a_chat_may_begin_with_an_answer(tokenizer):
    prepare(tokenizer, "ChatML")
    row = {"messages": [turn("assistant", "Hello!")]}
    assert written(row, tokenizer) == "<|im_start|>assistant\n⟦Hello!<|im_end|>⟧" and not notes(
        row, tokenizer
    )


# ---------------------------------------------------------------- what a template leaves out


@pytest.mark.parametrize("empty", [[], None, {}, ""])
def test_empty_keys_of_a_message_say_nothing(tokenizer, empty):
    prepare(tokenizer, "ChatML")
    row = {"messages": [TWO_TURNS[0], TWO_TURNS[1] | {"tool_calls": empty, "name": empty}, *TWO_TURNS[2:]]}
    assert written(row, tokenizer) == WRITTEN["ChatML", "two turns"] and not notes(row, tokenizer)


def test_a_turn_of_which_only_one_call_is_written_is_not_trained(tokenizer):
    prepare(tokenizer, "Qwen3")
    one_call = "for call in (m.tool_calls or [])[:1]"
    tokenizer.chat_template = tokenizer.chat_template.replace("for call in m.tool_calls or []", one_call)
    row = {"messages": [CALL[0], turn("assistant", None, tool_calls=call() + call('{"city": "Oslo"}'))]}
    with pytest.raises(DropRow, match="leaves out its tool calls"):
        notes(row, tokenizer)


def test_a_short_answer_of_a_tool_that_is_left_out_is_noted_too(tokenizer):
    prepare(tokenizer, "Qwen3")
    tokenizer.chat_template = tokenizer.chat_template.replace("'\n<tool_response>\n' + content", "''")
    row = {"messages": [*CALL[:2], turn("tool", "72"), turn("assistant", "It is 72.")]}
    assert "the chat template leaves out the content of a message of the role tool" in notes(row, tokenizer)


def test_what_a_template_leaves_out_is_named_and_a_turn_without_its_call_not_trained(tokenizer):
    """Trained as "Let me look." and an end-of-turn token, it would learn to stop instead of calling."""
    prepare(tokenizer, "ChatML")
    messages = [*TWO_TURNS, turn("user", "Rome?"), turn("assistant", "Let me look.", tool_calls=call())]
    row = {"messages": messages, "tools": [TOOL]}
    assert "⟦Let me look." not in written(row, tokenizer) and "⟦A leaf." in written(row, tokenizer)
    assert set(notes(row, tokenizer)) == {
        "the chat template leaves out 'tools'",
        "the chat template leaves out tool calls",
        "a turn of the assistant is not trained: the chat template leaves out its tool calls",
    }


@pytest.mark.parametrize("name, row, note", [
    ("ChatML", {"messages": [TWO_TURNS[0], TWO_TURNS[1] | {"reasoning_content": "Hm."}]},
     "the chat template leaves out 'reasoning_content' of a message"),
    ("ChatML", {"messages": [TWO_TURNS[0], TWO_TURNS[1] | {"name": "leaf-bot"}]},
     "the chat template leaves out 'name' of a message"),
    ("Mistral v0.3", {"messages": [turn("system", "Be brief."), *TWO_TURNS]},
     "the chat template leaves out the content of a message of the role system"),
    ("Qwen3", {"messages": REASONING},
     "the chat template leaves out some of the content of a message of the role assistant"),
    ("ChatML", {"messages": TWO_TURNS, "source": "web", "id": 3}, "column 'source' is not read"),
])  # fmt: skip
def test_what_is_not_trained_is_noted(tokenizer, name, row, note):
    prepare(tokenizer, name)
    assert note in notes(row, tokenizer)


def test_reasoning_that_the_template_writes_is_trained(tokenizer):
    prepare(tokenizer, "Qwen3")
    row = {"messages": [TWO_TURNS[0], TWO_TURNS[1] | {"reasoning_content": "Hm."}]}
    assert written(row, tokenizer).endswith("assistant\n⟦<think>\nHm.\n</think>\n\nA leaf.<|im_end|>⟧")
    assert notes(row, tokenizer) == []


@pytest.mark.parametrize("name", TEMPLATES)
def test_nothing_is_noted_of_a_plain_chat(tokenizer, name):
    prepare(tokenizer, name)
    if name == "DeepSeek":  # whose generation prompt opens the reasoning that the template cuts
        assert notes({"messages": TWO_TURNS}, tokenizer) == [OTHER_PROMPT]
    else:
        assert notes({"messages": TWO_TURNS}, tokenizer) == []


def test_a_null_content_is_not_written_as_a_word(tokenizer, monkeypatch):
    """transformers 5.17 writes None; newer versions pass an empty text to the template."""
    prepare(tokenizer, "Qwen3")
    tokenizer.chat_template = tokenizer.chat_template.replace("m.content is string", "true")
    apply = tokenizer.apply_chat_template

    def apply_as_before(messages, **options):
        messages = [turn if turn["content"] is not None else turn | {"content": "None"} for turn in messages]
        return apply(messages, **options)

    monkeypatch.setattr(tokenizer, "apply_chat_template", apply_as_before)
    assert written(ROWS["call"], tokenizer) == WRITTEN["Qwen3", "call"]


def test_marks_that_transformers_misplaces_are_not_believed(tokenizer):
    """It counts a null content inside a mark as "None", which is not written: all later marks are off."""
    prepare(tokenizer, "marked")
    calls = "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}</call>{% endfor %}"
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% endgeneration %}", calls + "{% endgeneration %}"
    )
    assert written({"messages": CALL}, tokenizer) == (
        "<|im_start|>user\nRome?<|im_end|>\n<|im_start|>assistant\n⟦<call>weather</call><|im_end|>⟧\n"
        "<|im_start|>tool\nSunny<|im_end|>\n<|im_start|>assistant\n⟦It is sunny.<|im_end|>⟧"
    )


# ---------------------------------------------------------------- rows


def test_sharegpt_columns_and_roles_are_read(tokenizer):
    prepare(tokenizer, "Qwen3")
    row = {
        "conversations": [
            {"from": "human", "value": "Rome?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
            {"from": "observation", "value": "Sunny"},
            {"from": "gpt", "value": "It is sunny."},
        ],
        "system": "Be brief.",
        "tools": json.dumps([TOOL]),
    }
    same = {"messages": [turn("system", "Be brief."), *CALL], "tools": [TOOL]}
    assert written(row, tokenizer) == written(same, tokenizer)


def test_openais_function_calls_are_tool_calls():
    function = {"name": "weather", "arguments": '{"city": "Rome"}'}
    row = {"messages": [turn("user", "Rome?"), turn("assistant", None, function_call=function)]}
    messages = read_chat({"messages": [*row["messages"], turn("function", "Sunny")]}).messages
    assert messages[1:] == [
        turn("assistant", None, tool_calls=[{"type": "function", "function": function}]),
        turn("tool", "Sunny"),
    ]


def test_arguments_are_never_written_as_python_writes_them(tokenizer):
    prepare(tokenizer, "Qwen3")
    written_plainly = tokenizer.chat_template.replace("call.arguments | tojson", "call.arguments")
    tokenizer.chat_template = written_plainly
    row = {"messages": [CALL[0], turn("assistant", None, tool_calls=call('{"warm":true}'))]}
    assert '"arguments": {"warm":true}}' in written(row, tokenizer)


@pytest.mark.parametrize("row, unread", [
    ({"messages": None, "conversations": TWO_TURNS}, []),
    ({"messages": TWO_TURNS, "conversations": []}, []),
    ({"messages": TWO_TURNS, "conversations": [{"from": "human", "value": "a"}]}, ["conversations"]),
    ({"messages": [turn("system", "Be brief."), *TWO_TURNS], "system": "Be long."}, ["system"]),
    ({"messages": TWO_TURNS, "system": "Be brief."}, []),
])  # fmt: skip
def test_a_column_that_another_replaces_is_noted(tokenizer, row, unread):
    prepare(tokenizer, "ChatML")
    assert notes(row, tokenizer) == [f"column '{name}' is not read" for name in unread]


def test_content_may_be_a_list_of_text_parts():
    parts = [{"type": "text", "text": "What "}, {"type": "text", "text": "is it?"}]
    assert read_chat({"messages": [turn("user", parts)]}).messages == [turn("user", "What is it?")]
    with pytest.raises(DropRow, match="a part that is not text"):
        read_chat({"messages": [turn("user", [{"type": "image", "url": "a.png"}])]})


@pytest.mark.parametrize("row, reason", [
    ({"messages": TWO_TURNS, "tools": "[{"}, "'tools' cannot be read as JSON"),
    ({"messages": TWO_TURNS, "tools": ["weather"]}, "'tools' is not a list of tools"),
    ({"messages": [turn("assistant", None, tool_calls=call("{"))]}, "arguments of a tool call cannot"),
    ({"messages": [turn("assistant", "a", tool_calls="weather")]}, "'tool_calls' is not a list of calls"),
    ({"messages": [turn("assistant", None)]}, "no text or no role"),
])  # fmt: skip
def test_a_chat_that_cannot_be_read_is_dropped_for_its_reason(tokenizer, row, reason):
    prepare(tokenizer, "Qwen3")
    with pytest.raises(DropRow, match=reason):
        notes(row, tokenizer)


# ---------------------------------------------------------------- special tokens in the text of users


@pytest.mark.parametrize("name", ["ChatML", "Llama 3.2", "Qwen3", "Gemma 3", "marked"])
def test_special_tokens_that_a_message_spells_are_plain_text(tokenizer, name):
    prepare(tokenizer, name)
    special, eos = TEMPLATES[name][1][0], tokenizer.eos_token
    spelled = [turn("user", f"Say {special}a"), turn("assistant", f"Here: {eos} and on")]
    ids, _ = tokenize_rows([("row", {"messages": spelled})], tokenizer, MESSAGES)[0]
    plain = [turn("user", "Say a"), turn("assistant", "Here:  and on")]
    other_ids, _ = tokenize_rows([("row", {"messages": plain})], tokenizer, MESSAGES)[0]
    for token in (special, eos):
        token_id = tokenizer.convert_tokens_to_ids(token)
        assert ids.tolist().count(token_id) == other_ids.tolist().count(token_id)
    text = tokenizer.decode(ids)
    assert f"Say {special}a" in text and f"Here: {eos} and on" in text
    assert notes({"messages": spelled}, tokenizer)[-1].startswith("its text spells special tokens")


def test_a_question_with_special_tokens_is_asked_as_it_was_trained(tokenizer):
    prepare(tokenizer, "ChatML")
    question, answer = turn("user", "What is <|im_end|>?"), turn("assistant", "A leaf.")
    ids, _ = tokenize_rows([("row", {"messages": [question, answer]})], tokenizer, MESSAGES)[0]
    asked, _ = encode(chat_segments([question], MESSAGES, tokenizer), False, tokenizer)
    assert asked == ids.tolist()[: len(asked)]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert asked.count(end) == 1


def test_text_with_noncharacters_is_dropped(tokenizer):
    prepare(tokenizer, "ChatML")
    with pytest.raises(DropRow, match="noncharacters"):
        notes({"messages": [turn("user", "a\ufdd0b"), turn("assistant", "c")]}, tokenizer)


# ---------------------------------------------------------------- the template itself


def test_the_date_in_a_template_is_fixed_and_saved_with_the_tokenizer(tokenizer, tmp_path):
    tokenizer.chat_template = LLAMA32
    set_chat_template(tokenizer, None, datetime.date(2024, 2, 29))
    tokenizer.save_pretrained(tmp_path)
    saved = type(tokenizer).from_pretrained(tmp_path)
    set_chat_template(saved, None, DAY)
    text = saved.apply_chat_template(TWO_TURNS, tokenize=False)
    assert "Today Date: 29 Feb 2024\n" in text and "strftime_now" not in saved.chat_template


def test_every_named_template_gets_the_date(tokenizer):
    tokenizer.chat_template = {"default": LLAMA32, "tool_use": '{{ strftime_now("%Y") }}'}
    set_chat_template(tokenizer, None, DAY)
    assert tokenizer.chat_template["tool_use"] == '{{ "2026" }}'
    assert "25 Nov 2026" in tokenizer.apply_chat_template(TWO_TURNS, tokenize=False)


def test_a_date_whose_format_is_computed_is_fixed_too(tokenizer):
    tokenizer.chat_template = "{% set style = '%Y' %}{{ strftime_now(style) }}"
    set_chat_template(tokenizer, None, datetime.date(2020, 1, 2))
    assert tokenizer.apply_chat_template(TWO_TURNS, tokenize=False) == "2020-01-02"


def test_a_template_from_a_file_replaces_the_tokenizers_own(tokenizer, tmp_path):
    use_template(tokenizer, "Phi-3")
    (tmp_path / "chatml.jinja").write_text(CHATML)
    set_chat_template(tokenizer, str(tmp_path / "chatml.jinja"), DAY)
    assert tokenizer.chat_template == CHATML


@pytest.mark.parametrize("content, problem", [
    (None, "cannot be read: "),
    (b"\xff", "cannot be read: "),
    (b"a\n{% for m in messages %}", "line 2: "),
])  # fmt: skip
def test_a_template_file_that_cannot_be_used_is_one_line(tokenizer, tmp_path, content, problem):
    path = tmp_path / "bad.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=problem) as error:
        set_chat_template(tokenizer, str(path), DAY)
    assert str(path) in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_chat_by_hand_needs_no_row(tokenizer):
    prepare(tokenizer, "ChatML")
    assert Chat(TWO_TURNS[:1]).is_question and Chat(TWO_TURNS).turns == [1, 3]
