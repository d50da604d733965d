"""Tokenizer files: the names that transformers 4 knows, and a chat template that asks as in the training."""

import json

import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qlora.data.formats import asks_otherwise
from qlora.data.formatting import Formatting
from qlora.data.tokenize import tokenize_rows
from qlora.errors import InputError
from qlora.model.base import load_tokenizer
from qlora.model.generation import PromptWriter
from qlora.model.tokenizer import save_tokenizer
from tests.conftest import ROWS
from tests.data.test_formats import (
    ALPACA,
    CHATML,
    LLAMA2_CHAT,
    last_answer,
    turns,
    use_template,
    without_automatic_bos,
)

ROW_OF = {
    "alpaca": {"instruction": "Name a tree.", "output": "Oak"},
    "prompt_completion": {"prompt": "Name a tree.", "completion": " Oak"},
    "guanaco": {"text": "### Human:\nName a tree.\n### Assistant:\nOak\n"},
    "llama2": {"text": "<s>[INST] Name a tree. [/INST] Oak </s>"},
    "messages": {"messages": turns("Name a tree.", "Oak")},
}


def space_before_first_word_only(tokenizer):
    """As Llama 2's in transformers 5: no space is put in front of a word that follows a special token."""
    backend = tokenizer.backend_tokenizer
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    want = [tokenizer.bos_token_id, *tokenizer("a", add_special_tokens=False)["input_ids"]]
    assert tokenizer("a")["input_ids"] == want != tokenizer("<s>a", add_special_tokens=False)["input_ids"]


def saved(folder, tokenizer, row_format):
    """The tokenizer as other programs load it."""
    folder.mkdir()
    save_tokenizer(folder, tokenizer, row_format)
    return AutoTokenizer.from_pretrained(folder)


def test_the_files_have_names_that_transformers_4_knows_and_nothing_else_changes(tokenizer, tmp_path):
    """Its tokenizers have no class TokenizersBackend, and their extra_special_tokens is an object."""
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|turn|>"]})
    tokenizer.save_pretrained(tmp_path / "theirs")
    loaded = saved(tmp_path / "ours", tokenizer, None)
    theirs, ours = (
        json.loads((tmp_path / name / "tokenizer_config.json").read_text()) for name in ("theirs", "ours")
    )
    assert theirs.pop("tokenizer_class") == "TokenizersBackend"
    assert ours.pop("tokenizer_class") == "PreTrainedTokenizerFast"
    assert ours.pop("additional_special_tokens") == theirs.pop("extra_special_tokens") == ["<|turn|>"]
    assert ours == theirs
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {
        path.name for path in (tmp_path / "theirs").iterdir()
    }
    assert (tmp_path / "ours/tokenizer.json").read_text() == (tmp_path / "theirs/tokenizer.json").read_text()
    assert type(loaded) is type(AutoTokenizer.from_pretrained(tmp_path / "theirs")) is PreTrainedTokenizerFast
    assert loaded.extra_special_tokens == ["<|turn|>"]
    text = f"{ROWS[0]['prompt']}<|turn|></s>"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("row_format", ROW_OF)
@pytest.mark.parametrize("change", [None, without_automatic_bos, space_before_first_word_only])
def test_the_saved_template_asks_with_the_ids_of_the_training(tokenizer, tmp_path, row_format, change):
    if change:
        change(tokenizer)
    use_template(tokenizer, LLAMA2_CHAT if row_format == "messages" else CHATML)  # the base's own
    rows = tokenize_rows([("row", ROW_OF[row_format])], tokenizer, Formatting(row_format))
    tokenizer.chat_template = rows.chat_template or tokenizer.chat_template
    writer = PromptWriter(tokenizer, Formatting(row_format), max_tokens=999)
    loaded = saved(tmp_path / "saved", tokenizer, row_format)
    ids, labels = rows[0]
    question = turns("Name a tree.")
    asked = loaded.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    if row_format != "messages" or change != space_before_first_word_only:  # that template is not ours
        assert asked == ids.tolist()[: last_answer(labels.tolist())]
        assert asked == writer.chat(question)
    text = loaded.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert loaded(text, add_special_tokens=False)["input_ids"] == asked
    longer = turns("What?", "A leaf.", "Sure?")  # with two formats the last question stands alone
    text = loaded.apply_chat_template(longer, tokenize=False, add_generation_prompt=True)
    assert ("What?" in text) == (row_format not in ("alpaca", "prompt_completion"))
    if row_format in ("alpaca", "prompt_completion"):
        asked = loaded.apply_chat_template(longer, add_generation_prompt=True, return_dict=False)
        assert asked == writer.chat(longer)


def test_an_alpaca_question_is_the_instruction_and_a_system_message_is_left_out(tokenizer, tmp_path):
    loaded = saved(tmp_path / "saved", tokenizer, "alpaca")
    chat = turns("Name a tree.", system="Be brief.")
    assert loaded.apply_chat_template(chat, tokenize=False) == "<s>" + ALPACA
    with pytest.raises(Exception, match="the last message must come from the user"):
        loaded.apply_chat_template(turns("Name a tree.", "Oak"), tokenize=False)


def test_a_prompts_last_spaces_are_left_to_its_answer(tokenizer, tmp_path):
    loaded = saved(tmp_path / "saved", tokenizer, "prompt_completion")
    writer = PromptWriter(tokenizer, Formatting("prompt_completion"), max_tokens=999)
    asked = loaded.apply_chat_template(turns("Name a tree:  "), return_dict=False)
    assert asked == writer.chat(turns("Name a tree:  ")) == tokenizer("Name a tree:")["input_ids"]


def test_plain_text_has_no_template(tokenizer, tmp_path):
    tokenizer.chat_template = {"default": CHATML, "tool_use": CHATML}
    loaded = saved(tmp_path / "saved", tokenizer, "text")
    assert loaded.chat_template is None
    assert tokenizer.chat_template == {"default": CHATML, "tool_use": CHATML}
    tokenizer.chat_template = CHATML
    assert saved(tmp_path / "other", tokenizer, "text").chat_template is None
    with pytest.raises(ValueError, match="chat template"):
        loaded.apply_chat_template(turns("What?"))


@pytest.mark.parametrize("row_format", ["alpaca", "text"])
def test_a_template_for_other_programs_does_not_replace_the_models(run, base, tmp_path, row_format):
    """An adapter trained on such rows can be trained further on chats, in the base's own template."""
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = LLAMA2_CHAT
    model = tmp_path / "model"
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"text": "A leaf."} if row_format == "text" else ROW_OF[row_format]) + "\n"
    )
    _, folder = run("--max_steps 1", dataset=str(tmp_path / "rows.jsonl"))
    for place in (folder, folder / "checkpoint-1"):
        assert asks_otherwise(AutoTokenizer.from_pretrained(place)) == (row_format == "alpaca")
    tokenizer.save_pretrained(model)  # all of a model that loading its tokenizer reads
    assert load_tokenizer(str(model), str(folder)).chat_template == LLAMA2_CHAT
    assert load_tokenizer(base, str(folder)).chat_template is None


def test_chats_are_not_asked_through_the_template_of_other_rows(tokenizer, tmp_path):
    loaded = saved(tmp_path / "saved", tokenizer, "alpaca")
    with pytest.raises(InputError, match=r"--dataset_format messages: .* give another with --chat_template"):
        PromptWriter(loaded, Formatting("messages"), max_tokens=999)
    with pytest.raises(InputError, match=r"has chats, but .* give another with --chat_template"):
        tokenize_rows([("row", ROW_OF["messages"])], loaded)
