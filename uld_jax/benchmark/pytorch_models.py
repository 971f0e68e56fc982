"""The same model in transformers on PyTorch, at its best there: what ours is measured against."""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import transformers

from uld_jax.config import OptimizerConfig
from uld_jax.models import LoadedModel, save_pretrained

__all__ = ["adamw", "generator", "open_model", "train_step"]

# torch has three loops for AdamW; the two that are not the slowest on every machine.
_LOOPS = ("fused", "foreach")


def open_model(torch: ModuleType, device: str, m: LoadedModel) -> Any:
    """A loaded model as transformers builds it, with the same weights in float32.

    Args:
        torch: the module.
        device: torch's name of the device.
        m: the model.

    Returns:
        The torch module.
    """
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        save_pretrained(m, directory)
        transformers.utils.logging.disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation=_attention(m)
        )
    # transformers decorates this method in a way that hides from a type checker what it takes.
    moved: Any = model
    return moved.to(device)


def _attention(m: LoadedModel) -> str:
    """PyTorch's own kernel; it has no soft-cap, and transformers refuses it there."""
    return "eager" if m.config.attention_softcap else "sdpa"


def adamw(torch: ModuleType, model: Any, config: OptimizerConfig) -> tuple[Any, str]:
    """Torch's AdamW with our numbers, in the faster of its loops.

    Args:
        torch: the module.
        model: the torch module.
        config: the numbers; the learning rate stays as it is.

    Returns:
        The optimizer, and the loop's name.
    """
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]

    def seconds(loop: str) -> float:
        # At a rate of 0 a step changes nothing.
        optimizer = torch.optim.AdamW(groups, lr=0.0, **{loop: True})
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        start = time.perf_counter()
        optimizer.step()
        return time.perf_counter() - start

    best = min(_LOOPS, key=seconds)
    model.zero_grad(set_to_none=True)
    numbers = {"lr": config.learning_rate, "betas": (config.b1, config.b2), "eps": config.eps}
    return torch.optim.AdamW(groups, **numbers, **{best: True}), best


def train_step(
    torch: ModuleType, model: Any, optimizer: Any, tokens_BT: np.ndarray, clip_norm: float
) -> Callable[[], float]:
    """A function that takes one step: forward, backward, clipping, AdamW.

    Args:
        torch: the module.
        model: the torch module.
        optimizer: of its parameters.
        tokens_BT: token ids; each but the first is a label.
        clip_norm: largest global norm of the gradient; 0 for no clipping.

    Returns:
        The function; it returns the loss before the step, when the step is done.
    """
    tokens = torch.tensor(tokens_BT, dtype=torch.long, device=model.device)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def run() -> float:
        model.train()
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=inputs, labels=labels, shift_labels=labels, use_cache=False).loss
        loss.backward()
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    return run


def generator(
    torch: ModuleType, model: Any, prompts_BP: np.ndarray, new_tokens: int
) -> Callable[[], np.ndarray]:
    """A function that continues prompts greedily by exactly so many tokens.

    Args:
        torch: the module.
        model: the torch module.
        prompts_BP: token ids.
        new_tokens: tokens to write.

    Returns:
        The function; it returns the new tokens, int[B, new_tokens].
    """
    prompts = torch.tensor(prompts_BP, dtype=torch.long, device=model.device)
    settings = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, eos_token_id=None, pad_token_id=0
    )
    # What the model's own file says would fill the gaps, an end of sequence among them.
    model.generation_config = settings
    generate = partial(model.generate, attention_mask=torch.ones_like(prompts))

    def run() -> np.ndarray:
        model.eval()
        with torch.inference_mode():
            written = generate(prompts, generation_config=settings)
        return written[:, prompts.shape[1] :].cpu().numpy()

    return run
