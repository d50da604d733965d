"""Masks, BOS, EOS and prompts of every format. Expected masks are written by hand, character by character."""

import pytest
from tokenizers import processors

from qlora.data.batch import collate
from qlora.data.chat_template import FALLBACK_CHAT_TEMPLATE
from qlora.data.formats import (
    chat_segments,
    detect_format,
    ends_in_answer,
    prompt_segments,
    row_segments,
    starts_with_bos,
)
from qlora.data.formatting import Formatting
from qlora.data.segments import IGNORE_INDEX, PLAIN_END, PLAIN_START, DropRow, encode
from qlora.data.tokenize import tokenize_rows
from qlora.errors import InputError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2_CHAT = (  # BOS and EOS around every turn, and an error for other roles, as in Llama-2-7b-chat-hf
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant!') }}{% endif %}{% endfor %}"
)
FORGETFUL = (  # drops the reasoning of earlier turns, as Qwen3's does
    "{% for m in messages %}{% if m['role'] == 'user' %}Q: {{ m['content'] }}\n"
    "{% else %}A: {{ m['content'] if loop.last else m['content'].split('#')[-1] }}{{ eos_token }}\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nName a tree.\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nName it.\n\n### Input:\nA red leaf.\n\n### Response:\n"
)


def turns(*contents, system=None):
    """A chat of alternating user and assistant turns."""
    chat = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + chat


def use_template(tokenizer, template):
    if template == CHATML:
        tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
        tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    tokenizer.chat_template = template


def without_automatic_bos(tokenizer):
    """As with GPT-2 and Qwen: there is a BOS token, but the tokenizer does not add it."""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])


def masked_by_hand(tokenizer, parts):
    """(ids, labels) of a row tokenized in one go. Parts are (text, trained), with BOS and EOS spelled out."""
    trained = [flag for text, flag in parts for _ in text]
    text = "".join(text for text, _ in parts)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = []
    for token_id, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"]):
        assert len(set(trained[start:end])) <= 1, "a token of this example crosses a boundary of its parts"
        labels.append(token_id if trained[start] else IGNORE_INDEX)
    return encoded["input_ids"], labels


def tokenize(tokenizer, row, row_format="auto", **options):
    max_length = options.pop("max_length", None)
    rows = tokenize_rows([("rows line 1", row)], tokenizer, Formatting(row_format, **options))
    rows = rows.cut(max_length) if max_length else rows
    ids, labels = rows[0]
    return rows.row_format, ids.tolist(), labels.tolist()


def last_answer(labels):
    """Position of the first token of the last answer."""
    return len(labels) - labels[::-1].index(IGNORE_INDEX)


def prompt_ids(tokenizer, segments, row_format):
    return encode(segments, starts_with_bos(row_format, tokenizer), tokenizer)[0]


# name: (chat template, row, detected format, parts)
ROWS = {
    "text": (None, {"text": "A red leaf."}, "text", [("<s>", 0), ("A red leaf.</s>", 1)]),
    "text that ends in EOS": (
        None, {"text": "A red leaf.</s>\n"}, "text", [("<s>", 0), ("A red leaf.</s>", 1)]),
    "guanaco": (
        None, {"text": "### Human: What is it?### Assistant: A leaf."}, "guanaco",
        [("<s>### Human: What is it?### Assistant:", 0), (" A leaf.</s>", 1)]),
    "guanaco, two turns": (
        None, {"text": "### Human: What?### Assistant: A leaf.### Human: Sure?### Assistant: Yes."},
        "guanaco",
        [("<s>### Human: What?### Assistant:", 0), (" A leaf.", 1),
         ("### Human: Sure?### Assistant:", 0), (" Yes.</s>", 1)]),
    "guanaco, open question at the end": (
        None, {"text": "### Human: What?### Assistant: A leaf.### Human: Sure?"}, "guanaco",
        [("<s>### Human: What?### Assistant:", 0), (" A leaf.</s>", 1)]),
    "llama2": (
        None, {"text": "<s>[INST] What is it? [/INST] A leaf. </s>"}, "llama2",
        [("<s>[INST] What is it? [/INST]", 0), (" A leaf. </s>", 1)]),
    "llama2, two turns": (
        None, {"text": "<s>[INST] What? [/INST] A leaf. </s><s>[INST] Sure? [/INST] Yes. </s>"}, "llama2",
        [("<s>[INST] What? [/INST]", 0), (" A leaf. </s>", 1),
         ("<s>[INST] Sure? [/INST]", 0), (" Yes. </s>", 1)]),
    "llama2, two turns without markers between": (
        None, {"text": "[INST] What? [/INST] A leaf.[INST] Sure? [/INST] Yes."}, "llama2",
        [("<s>[INST] What? [/INST]", 0), (" A leaf.", 1),
         ("[INST] Sure? [/INST]", 0), (" Yes.</s>", 1)]),
    "llama2, system prompt": (
        None, {"text": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat? [/INST] A leaf."}, "llama2",
        [("<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat? [/INST]", 0), (" A leaf.</s>", 1)]),
    "alpaca": (
        None, {"instruction": "Name a tree.", "output": "Oak"}, "alpaca",
        [("<s>" + ALPACA, 0), ("Oak</s>", 1)]),
    "alpaca, empty input": (
        None, {"instruction": "Name a tree.", "input": "", "output": "Oak"}, "alpaca",
        [("<s>" + ALPACA, 0), ("Oak</s>", 1)]),
    "alpaca, null input": (
        None, {"instruction": "Name a tree.", "input": None, "output": "Oak"}, "alpaca",
        [("<s>" + ALPACA, 0), ("Oak</s>", 1)]),
    "alpaca with input": (
        None, {"instruction": "Name it.", "input": "A red leaf.", "output": "Leaf\n"}, "alpaca",
        [("<s>" + ALPACA_WITH_INPUT, 0), ("Leaf\n</s>", 1)]),
    "prompt_completion": (
        None, {"prompt": "What is it?", "completion": " A leaf."}, "prompt_completion",
        [("<s>What is it?", 0), (" A leaf.</s>", 1)]),
    "prompt_completion with BOS and EOS": (
        None, {"prompt": "<s>What is it?", "completion": " A leaf.</s>"}, "prompt_completion",
        [("<s>What is it?", 0), (" A leaf.</s>", 1)]),
    "messages, ChatML": (
        CHATML, {"messages": turns("What?", "A leaf.", system="Be brief.")}, "messages",
        [("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n"
          "<|im_start|>assistant\n", 0),
         ("A leaf.<|im_end|>", 1)]),
    "messages, ChatML, two turns": (
        CHATML, {"messages": turns("What?", "A leaf.", "Sure?", "Yes.")}, "messages",
        [("<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n", 0), ("A leaf.<|im_end|>", 1),
         ("\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n", 0), ("Yes.<|im_end|>", 1)]),
    "messages, ShareGPT keys": (
        CHATML, {"conversations": [
            {"from": "system", "value": "Be brief."}, {"from": "human", "value": "What?"},
            {"from": "gpt", "value": "A leaf."}]}, "messages",
        [("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n"
          "<|im_start|>assistant\n", 0),
         ("A leaf.<|im_end|>", 1)]),
    "messages, BOS in every turn": (
        LLAMA2_CHAT, {"messages": turns("What?", "A leaf.", "Sure?", "Yes.")}, "messages",
        [("<s>[INST] What? [/INST]", 0), (" A leaf. </s>", 1),
         ("<s>[INST] Sure? [/INST]", 0), (" Yes. </s>", 1)]),
    "messages, no template": (
        None, {"messages": turns("What?", "A leaf.", "Sure?", "Yes.", system="Be brief.")}, "messages",
        [("<s>### System: Be brief.\n### Human: What?\n### Assistant:", 0), (" A leaf.</s>", 1),
         ("\n### Human: Sure?\n### Assistant:", 0), (" Yes.</s>", 1)]),
    "messages, rewritten history": (
        FORGETFUL, {"messages": turns("What?", "think#A leaf.", "Sure?", "think#Yes.")}, "messages",
        [("Q: What?\nA:", 0), (" A leaf.</s>", 1), ("\nQ: Sure?\nA:", 0), (" think#Yes.</s>", 1)]),
}  # fmt: skip
EXAMPLES = pytest.mark.parametrize("template, row, row_format, parts", ROWS.values(), ids=ROWS)


# ---------------------------------------------------------------- masks


@EXAMPLES
def test_only_the_answers_and_their_eos_are_trained(tokenizer, template, row, row_format, parts):
    use_template(tokenizer, template)
    expected = masked_by_hand(tokenizer, parts)
    assert tokenize(tokenizer, row) == (row_format, *expected)


@EXAMPLES
def test_a_format_that_is_given_makes_the_same_row_as_one_that_is_detected(
    tokenizer, template, row, row_format, parts
):
    use_template(tokenizer, template)
    assert tokenize(tokenizer, row, row_format) == tokenize(tokenizer, row)


@EXAMPLES
def test_without_completion_only_loss_all_but_the_first_token_is_trained(
    tokenizer, template, row, row_format, parts
):
    use_template(tokenizer, template)
    _, ids, _ = tokenize(tokenizer, row)
    assert tokenize(tokenizer, row, completion_only_loss=False) == (row_format, ids, [IGNORE_INDEX, *ids[1:]])


def test_the_first_token_is_not_a_target_if_there_is_no_bos(tokenizer):
    without_automatic_bos(tokenizer)
    _, ids, labels = tokenize(tokenizer, {"text": "What is it?"})
    assert ids == [*tokenizer("What is it?", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert labels == [IGNORE_INDEX, *ids[1:]]


def test_text_is_read_from_the_named_column(tokenizer):
    row = {"text": "no", "body": "### Human: What?### Assistant: A leaf."}
    parts = [("<s>### Human: What?### Assistant:", 0), (" A leaf.</s>", 1)]
    assert tokenize(tokenizer, row, text_field="body") == ("guanaco", *masked_by_hand(tokenizer, parts))


def test_llama2_markers_become_the_bos_and_eos_of_the_tokenizer(tokenizer):
    tokenizer.add_special_tokens({"bos_token": "<|begin|>", "eos_token": "<|end|>"})
    without_automatic_bos(tokenizer)
    row = {"text": "<s>[INST] What? [/INST] A leaf. </s><s>[INST] Sure? [/INST] Yes. </s>"}
    parts = [
        ("<|begin|>[INST] What? [/INST]", 0),
        (" A leaf. <|end|>", 1),
        ("<|begin|>[INST] Sure? [/INST]", 0),
        (" Yes. <|end|>", 1),
    ]
    assert tokenize(tokenizer, row) == ("llama2", *masked_by_hand(tokenizer, parts))


def test_a_question_at_the_end_is_left_out_and_the_answer_before_it_trained(tokenizer):
    """Even if the template writes that answer differently once a question follows."""
    use_template(tokenizer, FORGETFUL)
    parts = [("Q: What?\nA:", 0), (" think#A leaf.</s>", 1)]
    row = {"messages": turns("What?", "think#A leaf.", "Sure?")}
    assert tokenize(tokenizer, row) == ("messages", *masked_by_hand(tokenizer, parts))


# ---------------------------------------------------------------- BOS and EOS


@EXAMPLES
def test_one_bos_in_front_and_one_eos_at_the_end(tokenizer, template, row, row_format, parts):
    use_template(tokenizer, template)
    _, ids, labels = tokenize(tokenizer, row)
    has_bos = template not in (CHATML, FORGETFUL)  # these write none
    assert (ids[0] == tokenizer.bos_token_id) is has_bos and ids[1] != tokenizer.bos_token_id
    assert ids[-1] == labels[-1] == tokenizer.eos_token_id and ids[-2] != tokenizer.eos_token_id


@pytest.mark.parametrize(
    "text",
    [
        "What is it?",
        "<s>What is it?",
        "<s><s>What is it?",
        " <s>What is it?",
        "\n<s> <s>What is it?",
        "<s>What is it?</s>",
    ],
)
def test_a_bos_in_the_text_is_not_doubled(tokenizer, text):
    _, ids, _ = tokenize(tokenizer, {"text": text})
    words = tokenizer("What is it?", add_special_tokens=False)["input_ids"]
    assert ids == [tokenizer.bos_token_id, *words, tokenizer.eos_token_id]


def test_a_bos_in_the_text_counts_if_the_tokenizer_adds_none(tokenizer):
    without_automatic_bos(tokenizer)
    _, ids, _ = tokenize(tokenizer, {"text": "<s>What is it?"})
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


def test_eos_is_a_target_of_every_row_even_if_it_is_the_pad_token(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    rows = tokenize_rows([("line", {"text": text}) for text in ("What?", "What is it? A leaf.")], tokenizer)
    batch = collate([[rows[0]], [rows[1]]], tokenizer.pad_token_id)
    assert len(rows[0][0]) < len(rows[1][0]) <= batch["input_ids"].shape[1]
    assert batch["target_ids"].tolist().count(tokenizer.eos_token_id) == 2
    assert len(batch["target_ids"]) == sum(len(ids) - 1 for ids, _ in (rows[0], rows[1]))


@pytest.mark.parametrize("fmt, with_bos", [("text", True), ("alpaca", True), ("messages", False)])
def test_bos_is_added_unless_a_chat_template_decides(tokenizer, fmt, with_bos):
    assert starts_with_bos(fmt, tokenizer) is with_bos
    without_automatic_bos(tokenizer)
    assert starts_with_bos(fmt, tokenizer) is False


# ---------------------------------------------------------------- prompts


WITH_PROMPT = {
    name: example for name, example in ROWS.items() if not name.startswith("text") and "open" not in name
}


@pytest.mark.parametrize("template, row, row_format, parts", WITH_PROMPT.values(), ids=WITH_PROMPT)
def test_a_prompt_is_its_row_up_to_the_last_answer(tokenizer, template, row, row_format, parts):
    use_template(tokenizer, template)
    _, ids, labels = tokenize(tokenizer, row)
    segments = prompt_segments(row, Formatting(row_format), tokenizer)
    assert prompt_ids(tokenizer, segments, row_format) == ids[: last_answer(labels)]


CHATS = pytest.mark.parametrize(
    "template, row_format, row",
    [
        (
            None,
            "guanaco",
            {"text": "### Human: What?### Assistant: A leaf.### Human: Sure?### Assistant: Yes."},
        ),
        (None, "llama2", {"text": "<s>[INST] What? [/INST] A leaf. </s><s>[INST] Sure? [/INST] Yes. </s>"}),
        (CHATML, "messages", {"messages": turns("What?", "A leaf.", "Sure?", "Yes.")}),
        (LLAMA2_CHAT, "messages", {"messages": turns("What?", "A leaf.", "Sure?", "Yes.")}),
        (FALLBACK_CHAT_TEMPLATE, "messages", {"messages": turns("What?", "A leaf.", "Sure?", "Yes.")}),
        (FORGETFUL, "messages", {"messages": turns("What?", "think#A leaf.", "Sure?", "think#Yes.")}),
    ],
    ids=["guanaco", "llama2", "ChatML", "Llama 2 chat", "fallback", "rewritten history"],
)


@CHATS
@pytest.mark.parametrize("automatic_bos", [True, False])
def test_a_chat_is_written_as_it_was_trained(tokenizer, template, row_format, row, automatic_bos):
    use_template(tokenizer, template)
    if not automatic_bos:
        without_automatic_bos(tokenizer)
    _, ids, labels = tokenize(tokenizer, row)
    chat = turns("What?", "think#A leaf." if template == FORGETFUL else "A leaf.", "Sure?")
    asked = prompt_ids(tokenizer, chat_segments(chat, Formatting(row_format), tokenizer), row_format)
    assert asked == ids[: last_answer(labels)]


@pytest.mark.parametrize(
    "row_format, wrapped",
    [
        ("text", "<s>What?"),
        ("prompt_completion", "<s>What?"),
        ("guanaco", "<s>### Human: What?### Assistant:"),
        ("llama2", "<s>[INST] What? [/INST]"),
        ("alpaca", "<s>" + ALPACA.replace("Name a tree.", "What?")),
        ("messages", "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_a_bare_prompt_is_wrapped_in_the_format(tokenizer, row_format, wrapped):
    use_template(tokenizer, CHATML)
    segments = prompt_segments({"prompt": "What?"}, Formatting(row_format), tokenizer)
    expected = tokenizer(wrapped, add_special_tokens=False)["input_ids"]
    assert prompt_ids(tokenizer, segments, row_format) == expected


@pytest.mark.parametrize("answered", [("A leaf.",), ("A leaf.", "A red leaf.")])
def test_only_the_answers_at_the_end_are_left_out_of_a_prompt(tokenizer, answered):
    use_template(tokenizer, CHATML)
    question = turns("What?", "A leaf.", "Sure?")
    row = {"messages": question + [{"role": "assistant", "content": content} for content in answered]}
    expected = chat_segments(question, Formatting("messages"), tokenizer)
    assert prompt_segments(row, Formatting("messages"), tokenizer) == expected
    assert prompt_segments({"messages": question}, Formatting("messages"), tokenizer) == expected
    assert expected[-1][0].endswith("user\nSure?<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("end", ["\n", " \n\n"])
def test_a_prompt_has_no_answer_even_if_whitespace_follows_its_end_token(tokenizer, end):
    row = {"text": f"<s>[INST] What? [/INST] A leaf. </s>{end}"}
    assert prompt_segments(row, Formatting("llama2"), tokenizer) == [("<s>[INST] What? [/INST]", False)]
    assert ends_in_answer(row, Formatting("llama2"), tokenizer)


@pytest.mark.parametrize(
    "row_format, row, is_answered",
    [
        ("messages", {"messages": turns("What?", "A leaf.")}, True),
        ("messages", {"messages": turns("What?", "A leaf.", "Sure?")}, False),
        ("messages", {"messages": [*turns("What?", "A leaf."), turns("", "Yes.")[1]]}, False),
        ("messages", {"messages": turns("What?", "A leaf.")[1:]}, False),
        ("messages", {"messages": []}, False),
        ("messages", {"messages": [*turns("What?"), turns("", "A leaf.")[1] | {"weight": 0}]}, False),
        ("guanaco", {"text": "### Human: What?### Assistant: A leaf."}, True),
        ("guanaco", {"text": "### Human: What?### Assistant: A leaf.### Human: Sure?"}, False),
        ("llama2", {"text": "<s>[INST] What? [/INST] A leaf. </s><s>[INST] Sure? [/INST]"}, False),
        ("alpaca", {"instruction": "What?", "output": "A leaf."}, True),
    ],
)
def test_a_row_ends_in_an_answer_if_exactly_one_follows_its_prompt(tokenizer, row_format, row, is_answered):
    assert ends_in_answer(row, Formatting(row_format), tokenizer) == is_answered


def test_an_alpaca_chat_asks_the_last_question_only(tokenizer):
    chat = chat_segments(turns("What?", "A leaf.", "Name a tree."), Formatting("alpaca"), tokenizer)
    assert chat == [(ALPACA, False)]


@pytest.mark.parametrize("messages", [[], turns("What?", "A leaf.")[1:]])
def test_messages_without_a_question_are_dropped(tokenizer, messages):
    use_template(tokenizer, CHATML)
    with pytest.raises(DropRow):
        encode(prompt_segments({"messages": messages}, Formatting("messages"), tokenizer), False, tokenizer)


PAIRS = pytest.mark.parametrize(
    "prompt, answer",
    [
        ("What is it?", " A leaf."),
        ("What is it?\n", "A leaf."),
        ("What is it?\n", "\nA leaf."),
        ("Name it: ", "a leaf"),
        ("Name it: ", "What"),
        ("is it Wh", "at"),
        ("", "What is it?"),
        ("What is it?", "\u6f22\u00e9 \U0001f600"),
    ],
)


@PAIRS
def test_the_ids_of_a_prompt_do_not_depend_on_the_answer(tokenizer, prompt, answer):
    alone, _ = encode([(prompt, False)], True, tokenizer)
    ids, labels = encode([(prompt, False), (answer, True)], True, tokenizer)
    assert ids[: len(alone)] == alone
    assert labels == [IGNORE_INDEX] * len(alone) + ids[len(alone) :]


@PAIRS
def test_a_row_decodes_to_its_own_text(tokenizer, prompt, answer):
    """There is no extra space between prompt and answer, even if the two could share a token."""
    ids, _ = encode([(prompt, False), (answer, True)], True, tokenizer)
    assert tokenizer.decode(ids[1:]) == prompt + answer


def test_an_empty_segment_changes_nothing(tokenizer):
    segments = [("What is it?", False), (" A leaf.", True), (" Yes.", True)]
    for position in range(4):
        with_empty = [*segments[:position], ("", False), *segments[position:]]
        assert encode(with_empty, True, tokenizer) == encode(segments, True, tokenizer)


# ---------------------------------------------------------------- detection


GUANACO, LLAMA2, PLAIN = "### Human: a### Assistant: b", "<s>[INST] a [/INST] b </s>", "a b"


@pytest.mark.parametrize(
    "rows, row_format",
    [
        ([{"messages": []}], "messages"),
        ([{"conversations": []}], "messages"),
        ([{"instruction": "a", "output": "b"}], "alpaca"),
        ([{"prompt": "a", "completion": "b"}], "prompt_completion"),
        ([{"text": GUANACO}], "guanaco"),
        ([{"text": LLAMA2}], "llama2"),
        ([{"text": PLAIN}], "text"),
        ([{"text": GUANACO}, {"text": PLAIN}], "text"),
        ([{"text": LLAMA2}, {"text": GUANACO}], "text"),
        ([{"text": GUANACO}, {"text": ""}, {"text": None}, {}], "guanaco"),
        ([{"text": None}], "text"),
        ([{"instruction": "a", "output": "b", "text": GUANACO}], "alpaca"),
        ([{"prompt": "a", "completion": "b", "text": PLAIN}], "prompt_completion"),
        ([{"instruction": "a", "output": "b", "prompt": "a", "completion": "b"}], "alpaca"),
        ([{"messages": [], "instruction": "a", "output": "b"}], "messages"),
        ([{"conversations": [], "prompt": "a", "completion": "b", "text": "a"}], "messages"),
        ([{"instruction": "a"}, {"output": "b"}], "alpaca"),
        ([{"prompt": "a", "text": PLAIN}], "text"),
        ([{"question": "a"}], None),
        ([{"instruction": "a"}], None),
        ([{}], None),
    ],
)
def test_the_format_is_recognized_by_the_columns(rows, row_format):
    assert detect_format(rows, "text") == row_format


def test_the_format_of_text_is_detected_in_the_named_column():
    assert detect_format([{"body": GUANACO, "text": PLAIN}], "body") == "guanaco"


def test_a_format_that_is_given_overrides_detection(tokenizer):
    row = {"text": "### Human: What?### Assistant: A leaf.", "prompt": "What?", "completion": " A leaf."}
    parts = [("<s>", 0), (row["text"] + "</s>", 1)]
    assert tokenize(tokenizer, row, "text") == ("text", *masked_by_hand(tokenizer, parts))


@pytest.mark.parametrize(
    "row_format, missing",
    [
        ("alpaca", "instruction"),
        ("prompt_completion", "completion"),
        ("guanaco", "text"),
        ("llama2", "text"),
        ("text", "text"),
        ("messages", "messages"),
    ],
)
def test_a_given_format_without_its_columns_is_an_error_that_lists_them(tokenizer, row_format, missing):
    with pytest.raises(InputError, match=r"\['output', 'prompt'\]") as error:
        tokenize(tokenizer, {"prompt": "a", "output": "b"}, row_format)
    assert repr(missing) in str(error.value) or row_format == "messages"


# ---------------------------------------------------------------- unusable rows


@pytest.mark.parametrize(
    "row, row_format, reason",
    [
        ({"text": ""}, "text", "empty text"),
        ({"text": " \n"}, "guanaco", "empty text"),
        ({"text": "no marker"}, "guanaco", "no response"),
        ({"text": "no marker"}, "llama2", "no response"),
        ({"text": "### Human: a### Assistant:"}, "guanaco", "no response"),
        ({"text": "### Human: a### Assistant: \n"}, "guanaco", "empty response"),
        ({"text": "### Human: a### Assistant: ### Human: b### Assistant: c"}, "guanaco", "empty response"),
        ({"text": "[INST] a [/INST]"}, "llama2", "no response"),
        ({"text": "<s>[INST] a [/INST] </s>"}, "llama2", "empty response"),
        ({"text": "<s>[INST] a [/INST] </s><s>[INST] b [/INST] c </s>"}, "llama2", "empty response"),
        ({"prompt": "a", "completion": " "}, "prompt_completion", "empty response"),
        ({"prompt": "a", "completion": "</s>"}, "prompt_completion", "empty response"),
        ({"instruction": "a", "output": ""}, "alpaca", "empty response"),
        ({"instruction": "a", "input": 3, "output": "b"}, "alpaca", "'input' is a number"),
        ({"messages": turns("a", "")}, "messages", "empty response"),
        ({"messages": turns("a", " ", "b", "c")}, "messages", "empty response"),
        ({"messages": turns("a")}, "messages", "no response"),
        ({"messages": []}, "messages", "no response"),
        ({"messages": None}, "messages", "'messages' is not a list"),
        ({"messages": "a"}, "messages", "'messages' is not a list"),
        ({"messages": ["a"]}, "messages", "'messages' is not a list"),
        ({"conversations": {"from": "human"}}, "messages", "'conversations' is not a list"),
        ({"messages": [{"role": "user", "content": None}]}, "messages", "no text or no role"),
        ({"messages": [{"role": "user", "content": [3]}]}, "messages", "a part that is not text"),
        ({"messages": [{"content": "a"}]}, "messages", "no text or no role"),
        ({"messages": turns("a", "b", system="c")}, "messages", "refuses it: Only user and assistant!"),
    ],
)
def test_an_unusable_row_is_dropped_for_its_reason(tokenizer, row, row_format, reason):
    use_template(tokenizer, LLAMA2_CHAT)
    with pytest.raises(DropRow) as error:
        row_segments(row, Formatting(row_format), tokenizer)
    assert reason in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("role", ["gpt", "chatgpt", "bing", "bard", "model", "assistant"])
def test_answers_are_trained_under_every_name_for_the_assistant(role, tokenizer):
    tokenizer.chat_template = FALLBACK_CHAT_TEMPLATE
    row = {"conversations": [{"from": "human", "value": "Red?"}, {"from": role, "value": "A leaf."}]}
    segments, _ = row_segments(row, Formatting("messages"), tokenizer)
    assert "".join(text for text, trained in segments if trained).strip().startswith("A leaf.")


def test_a_role_unknown_to_the_fallback_template_drops_the_row(tokenizer):
    tokenizer.chat_template = FALLBACK_CHAT_TEMPLATE
    turns = [("user", "Red?"), ("tool", "42"), ("assistant", "A leaf.")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    with pytest.raises(DropRow, match="unknown role tool"):
        row_segments(row, Formatting("messages"), tokenizer)


# ---------------------------------------------------------------- special tokens in the text of rows


@pytest.mark.parametrize(
    "row, row_format",
    [
        ({"instruction": "Say <s>", "input": "</s>", "output": "Here: </s> and on"}, "alpaca"),
        ({"prompt": "Say <s>", "completion": "Here: </s> and on"}, "prompt_completion"),
    ],
)
def test_special_tokens_that_a_row_spells_are_plain_text(tokenizer, row, row_format):
    rows = tokenize_rows([("row", row)], tokenizer, Formatting(row_format))
    (ids, _), (note,) = rows[0], rows.notes
    assert ids.tolist().count(tokenizer.bos_token_id) == ids.tolist().count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids[1:-1]).endswith("Here: </s> and on") and "Say <s>" in tokenizer.decode(ids)
    assert note == "its text spells special tokens, which are taken as plain text"


def test_an_eos_at_the_end_of_an_answer_is_meant(tokenizer):
    with_eos, without = ({"instruction": "Say a", "output": f"a{end}"} for end in ("</s>", ""))
    assert tokenize(tokenizer, with_eos) == tokenize(tokenizer, without)


@pytest.mark.parametrize("split, count", [(None, 2), (False, 2), (True, 1)])
def test_text_columns_bring_their_own_special_tokens_unless_told_otherwise(tokenizer, split, count):
    _, ids, _ = tokenize(tokenizer, {"text": "What?</s> A leaf."}, split_special_tokens=split)
    assert ids.count(tokenizer.eos_token_id) == count


def test_the_markers_of_llama2_rows_are_never_plain_text(tokenizer):
    row = {"text": "<s>[INST] What is it? [/INST] A leaf. </s>"}
    assert tokenize(tokenizer, row, split_special_tokens=True) == tokenize(tokenizer, row)


def test_special_tokens_can_be_taken_as_such_in_every_format(tokenizer):
    row = {"prompt": "What?</s>", "completion": " A leaf."}
    _, ids, _ = tokenize(tokenizer, row, split_special_tokens=False)
    assert ids.count(tokenizer.eos_token_id) == 2


def test_text_around_a_plain_special_token_is_tokenized_as_before(tokenizer):
    """No space is added, and the pieces decode to the text."""
    ids, labels = encode([(f"Say {PLAIN_START}</s>{PLAIN_END}leaf", False), (" yes", True)], False, tokenizer)
    assert tokenizer.decode(ids) == "Say </s>leaf yes" and labels.count(IGNORE_INDEX) < len(ids)


# ---------------------------------------------------------------- asked as trained


SPELLINGS = {
    "guanaco": "### Human: {q}### Assistant: {a}",
    "guanaco, lines": "### Human:\n{q}\n### Assistant:\n{a}\n",
    "guanaco, tight": "### Human:{q} ### Assistant:{a}\n\n",
    "llama2": "<s>[INST] {q} [/INST] {a} </s>",
    "llama2, tight": "<s>[INST]{q}[/INST]{a}</s>",
    "llama2, without markers between": "[INST] {q} [/INST] {a}",
    "llama2, lines": "<s>[INST]\n{q}\n[/INST]\n{a}</s>\n",
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("automatic_bos", [True, False])
def test_text_rows_are_asked_in_the_spelling_that_was_trained(tokenizer, spelling, automatic_bos):
    if not automatic_bos:
        without_automatic_bos(tokenizer)
    chat = [("What?", "A leaf."), ("Sure?", "Yes."), ("And now?", "No.")]
    texts = ["".join(spelling.format(q=q, a=a) for q, a in chat[:n]) for n in (1, 2, 3)]
    rows = tokenize_rows([("row", {"text": text}) for text in texts], tokenizer)
    tokenizer.chat_template = rows.chat_template
    row_format = rows.row_format
    for n in (1, 2, 3):
        ids, labels = rows[n - 1]
        messages = turns(*[text for pair in chat[:n] for text in pair][:-1])
        asked = prompt_ids(tokenizer, chat_segments(messages, Formatting(row_format), tokenizer), row_format)
        assert asked == ids.tolist()[: last_answer(labels.tolist())]


def test_the_usual_spelling_is_what_most_rows_have(tokenizer):
    texts = ["### Human:\nWhat?\n### Assistant:\nA leaf."] * 3 + [
        "### Human: What?### Assistant: A leaf."
    ] * 2
    rows = tokenize_rows([("row", {"text": text}) for text in texts], tokenizer)
    asked = tokenizer.apply_chat_template(turns("Sure?"), chat_template=rows.chat_template, tokenize=False)
    assert asked == "<s>### Human:\nSure?\n### Assistant:"


def test_the_chat_template_of_a_model_does_not_spell_text_rows(tokenizer):
    use_template(tokenizer, CHATML)
    segments = chat_segments(turns("What?"), Formatting("guanaco"), tokenizer)
    assert segments == [("<s>### Human: What?### Assistant:", False)]
