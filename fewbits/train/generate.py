"""Text from a model: sampling token by token, the same on every device for the same logits, never half a character."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fewbits.data.tokenizer import Tokenizer
from fewbits.errors import FewbitsError
from fewbits.nn.linear import linear
from fewbits.nn.prepare import not_finite
from fewbits.nn.transformer import Transformer
from fewbits.precision.switches import torch_switches
from fewbits.train.evaluate import evaluating
from fewbits.train.opened import open_model


def sample(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str = "",
    tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
) -> str:
    """Up to `tokens` tokens that continue `prompt`, as text without the prompt; it ends early at an end-of-text token.

    Args:
        model: any of ours, in any precision; its mode and the global random state stay as they are.
        temperature: divides the logits; 0 takes the most likely token each time.
        top_k: draw among this many most likely tokens; 0 among all.
        seed: of the draws, which are made on the CPU.

    Raises FewbitsError for settings that mean nothing, or a prompt that the tokenizer cannot write.
    """
    if tokens < 0 or not 0 <= temperature <= 100 or top_k < 0 or not 0 <= seed < 2**63:
        raise FewbitsError(
            f"tokens={tokens}, temperature={temperature}, top_k={top_k}, seed={seed}: give tokens and top_k of 0 or "
            "more, a temperature from 0 to 100 and a seed of 0 or more below 2**63."
        )
    device = next(model.parameters()).device
    ids = _start(tokenizer, prompt)
    generator = torch.Generator().manual_seed(seed)
    made: list[int] = []
    with evaluating(model):
        while len(made) < tokens:
            window = torch.tensor([(ids + made)[-model.config.context :]], device=device)
            chosen = _draw(_last_logits(model, window)[: tokenizer.vocab_size], temperature, top_k, generator)
            if chosen == tokenizer.end_of_text:
                break
            made.append(chosen)
    return tokenizer.decode(made)


def _start(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids that the model sees first: end-of-text, which begins every document, and the prompt."""
    begin = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    ids = [*begin, *(int(i) for i in tokenizer.encode(prompt))]
    return ids or [0]


def _last_logits(model: Transformer, ids_1T: Tensor) -> Tensor:
    """Logits [V] of what follows, fp32 on the CPU."""
    hidden = model.hidden(ids_1T)[:, -1]
    return linear(hidden, model.head_weight, None, model.tf32)[0].float().cpu()


def _draw(logits_V: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0 or not bool(torch.isfinite(logits_V).all()):
        return int(torch.nan_to_num(logits_V, nan=-torch.inf).argmax())
    if 0 < top_k < logits_V.numel():
        least = logits_V.topk(top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < least, -torch.inf)
    below_V = (logits_V - logits_V.max()).double() / temperature  # at most 0: no temperature, however small, overflows
    return int(torch.multinomial(torch.softmax(below_V, 0), 1, generator=generator))


def generate(
    run: Path | str,
    prompt: str = "",
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    device: str = "auto",
    precision: str | None = None,
) -> str:
    """`prompt` and what the model in `run` (a run, a checkpoint or a Hugging Face folder) writes after it.

    precision: runs the model in it; None in the format that is stored. The rest as `sample`. Raises FewbitsError.
    """
    model, tokenizer, chosen, place = open_model(run, device, precision)
    if tokenizer is None:
        raise FewbitsError(f"{run} holds no tokenizer.json, so its tokens cannot be written as text.")
    if broken := list(not_finite(model)):
        raise FewbitsError(
            f"{run} cannot continue a text: {broken[0]!r} holds NaN or infinity ({len(broken)} such tensors in all). Name a "
            "sound checkpoint."
        )
    with torch_switches(chosen, place):
        return prompt + sample(model, tokenizer, prompt, tokens, temperature, top_k, seed)
