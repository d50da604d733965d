"""Answers to tokenized prompts, in left-padded batches."""

import torch


@torch.no_grad()
def generate(
    model, tokenizer, prompts: list[list[int]], autocast, seed: int = 0, streamer=None, **options
) -> list[str]:
    """Continue each prompt (token ids) up to EOS; returns the new text of each, special tokens left out.

    Prompts are padded on the left, so that every answer starts right behind its prompt and a batch answers as
    each prompt alone would. `options` go to `GenerationMixin.generate`. Sampling draws from `seed` alone.
    Training is left undisturbed: the model's mode and the random state are as before.
    """
    pad_id = tokenizer.eos_token_id  # masked out, so any id serves
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[pad_id] * (longest - len(ids)) + ids for ids in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    was_training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), autocast():
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            pad_token_id=pad_id,
            eos_token_id=stop_ids(model, tokenizer),
            use_cache=True,
            streamer=streamer,
            **options,
        )
    model.train(was_training)
    return tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)


def stop_ids(model, tokenizer) -> list[int]:
    """The EOS that training supervises, and the end-of-turn ids that the model itself names."""
    named = model.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    return sorted({tokenizer.eos_token_id, *named} - {None})
