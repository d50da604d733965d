"""Answers of the base and the tuned model to the same prompts, side by side."""

from collections.abc import Callable
from dataclasses import dataclass, field

from qlora.data.formatting import Formatting
from qlora.errors import first_line
from qlora.model.generation import PromptWriter, generate, read_prompts, room_for_prompt
from qlora.speed.memory import is_out_of_memory
from qlora.speed.sharding import forget_failed_pass


@dataclass
class Samples:
    """Prompts that are answered repeatedly during a run, one at a time: little memory is left for it."""

    prompts: list[list[int]]
    tokenizer: object
    max_new_tokens: int
    base_answers: list[str] = field(default_factory=list)  # computed once, as they never change

    def ask(
        self, model, autocast, should_stop: Callable[[], bool], say: Callable[[str], None]
    ) -> list[dict] | None:
        """{"prompt", "base", "tuned"} of each prompt; None if stopped, or if memory runs out.

        The latter is printed, and does not end the run, which needs less.
        """
        try:
            return self._ask(model, autocast, should_stop)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            forget_failed_pass(model)
            say(f"no samples at this evaluation: out of memory ({first_line(error)})")
            return None

    def _ask(self, model, autocast, should_stop) -> list[dict] | None:
        tuned_answers = self._answer(model, autocast, should_stop)
        base_answers = self.base_answers
        if not base_answers:
            with model.disable_adapter():
                base_answers = self._answer(model, autocast, should_stop)
        if should_stop():  # the last answers may be truncated
            return None
        self.base_answers = base_answers
        prompts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in self.prompts]
        return [
            {"prompt": prompt, "base": base, "tuned": tuned}
            for prompt, base, tuned in zip(prompts, base_answers, tuned_answers)
        ]

    def _answer(self, model, autocast, should_stop) -> list[str]:
        options = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "should_stop": should_stop}
        return [generate(model, self.tokenizer, [ids], autocast, **options)[0] for ids in self.prompts]


def read_samples(
    path: str | None, tokenizer, formatting: Formatting, model_config, max_new_tokens: int
) -> Samples | None:
    """The prompts in a file, None without one. Raises InputError."""
    if path is None:
        return None
    room = room_for_prompt(model_config, max_new_tokens, "sample_max_new_tokens")
    writer = PromptWriter(tokenizer, formatting, room, model_config.vocab_size)
    return Samples([ids for _, _, ids in read_prompts(path, writer)], tokenizer, max_new_tokens)
