"""Model families: the table of the Hugging Face `model_type`s that the decoder implements."""

from safe_rlhf_jax.errors import ModelError
from safe_rlhf_jax.models.families import gemma, gpt, llama
from safe_rlhf_jax.models.families.record import Family

__all__ = ["FAMILIES", "Family", "family"]

FAMILIES: dict[str, Family] = {
    "llama": llama.LLAMA,
    "mistral": llama.MISTRAL,
    "qwen2": llama.QWEN2,
    "qwen3": llama.QWEN3,
    "phi3": llama.PHI3,
    "gemma": gemma.GEMMA,
    "gemma2": gemma.GEMMA2,
    "gemma3_text": gemma.GEMMA3,
    "gpt2": gpt.GPT2,
    "gpt_neo": gpt.GPT_NEO,
    "gptj": gpt.GPTJ,
    "gpt_neox": gpt.GPT_NEOX,
    "opt": gpt.OPT,
    "bloom": gpt.BLOOM,
    "phi": gpt.PHI,
}


def family(model_type: str) -> Family:
    """Returns the family of a `model_type`.

    Raises:
        ModelError: If there is none; lists the known ones.
    """
    if model_type not in FAMILIES:
        raise ModelError(f"config.json: model_type {model_type!r} is not supported; supported: {sorted(FAMILIES)}")
    return FAMILIES[model_type]
