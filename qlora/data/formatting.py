"""The choices of how rows become text; formats.py, which makes it so, takes seconds to import."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Formatting:
    """How rows become text, and what of it is trained: the flags of these names."""

    row_format: str = "auto"  # --dataset_format
    text_field: str = "text"  # --dataset_text_field
    completion_only_loss: bool = True
    train_on: str = "all"  # of the assistant's turns in a row of messages: all, or the last
    split_special_tokens: bool | None = None

    @property
    def takes_special_tokens_as_text(self) -> bool:
        """Whether a special token that a row spells is plain text; a text column brings its own."""
        if self.row_format == "llama2":  # whose markers <s> and </s> are
            return False
        if self.split_special_tokens is not None:
            return self.split_special_tokens
        return self.row_format in ("messages", "alpaca", "prompt_completion")
