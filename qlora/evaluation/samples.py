"""Answers of the base and of base + adapter to the same prompts, side by side."""

from dataclasses import dataclass, field

from qlora.model.generation import PromptWriter, generate, read_prompts


@dataclass
class Samples:
    """Prompts that are answered again and again in a training, one at a time: little memory is left."""

    prompts: list[list[int]]
    tokenizer: object
    max_new_tokens: int
    texts: list[str] = field(init=False)
    base: list[str] = field(default_factory=list)  # the base's answers, which never change

    def __post_init__(self):
        self.texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in self.prompts]

    def ask(self, model, autocast, stop) -> list[dict] | None:
        """{"prompt", "base", "tuned"} of each prompt; None once `stop` is true."""

        def answers() -> list[str]:
            options = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "stop": stop}
            return [generate(model, self.tokenizer, [ids], autocast, **options)[0] for ids in self.prompts]

        tuned = answers()
        base = self.base
        if not base:
            with model.disable_adapter():
                base = answers()
        if stop:
            return None
        self.base = base
        names = "prompt", "base", "tuned"
        return [dict(zip(names, texts)) for texts in zip(self.texts, self.base, tuned)]


def read_samples(path: str, writer: PromptWriter, max_new_tokens: int) -> Samples:
    """The prompts of a file; raises InputError."""
    prompts = [ids for _, _, ids in read_prompts(path, writer)]
    return Samples(prompts, writer.tokenizer, max_new_tokens)
