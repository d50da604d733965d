"""Tokenizer files, as other programs load them."""

import json
import shutil
from pathlib import Path

from qlora.data.formats import format_template
from qlora.errors import first_line


def save_tokenizer(folder: Path, tokenizer, row_format: str | None) -> None:
    """Write the tokenizer's files, so that transformers 4 loads them too (tried with 4.57).

    Its chat template asks as rows of `row_format` did in the training, whatever the base's own does: that is
    how servers will ask. Plain text gets none. None for a row format that is not known: the tokenizer's own.
    Raises OSError if the files cannot be written.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is Exception:  # all that the Rust code of `tokenizers` has for a failed write
            raise OSError(first_line(error)) from error
        raise
    _rename_for_transformers_4(folder / "tokenizer_config.json")
    template = format_template(row_format, tokenizer) if row_format else tokenizer.chat_template
    if template != tokenizer.chat_template:  # else it is written, or there is none
        shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        if template is not None:
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _rename_for_transformers_4(path: Path) -> None:
    """Use the names in a tokenizer_config.json that transformers 4 knows; 5 reads both."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):  # in 4 this is an object
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
