"""Tiny configurations of the two families' real architectures, and how they write conversations."""

from dataclasses import dataclass
from typing import Any

from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

VOCABULARY = 512
WIDTH = 128  # hidden size of the shipped systems

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.06,
}


@dataclass(frozen=True)
class Architecture:
    """What differs between the families outside of the weights. `name` is the family's."""

    name: str
    config_class: type[Any]
    config: dict[str, Any]
    special_tokens: tuple[str, ...]  # in the order of their ids
    bos: str
    eos: str
    pad: str
    end_of_turn: str
    user_open: str
    between: str  # from the end of a turn to the opening of the next
    model_open: str
    chat_template: str


_GEMMA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
_LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)

ARCHITECTURES = {
    "gemma2": Architecture(
        name="gemma2",
        config_class=Gemma2Config,
        config={
            **_SIZES,
            "query_pre_attn_scalar": None,  # the head size
            "sliding_window": 32,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "hidden_activation": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": 2,
        },
        special_tokens=("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        end_of_turn="<end_of_turn>",
        user_open="<start_of_turn>user\n",
        between="\n",
        model_open="<start_of_turn>model\n",
        chat_template=_GEMMA_TEMPLATE,
    ),
    "llama3": Architecture(
        name="llama3",
        config_class=LlamaConfig,
        config={
            **_SIZES,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            },
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
        special_tokens=(
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ),
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        pad="<|end_of_text|>",
        end_of_turn="<|eot_id|>",
        user_open="<|start_header_id|>user<|end_header_id|>\n\n",
        between="",
        model_open="<|start_header_id|>assistant<|end_header_id|>\n\n",
        chat_template=_LLAMA_TEMPLATE,
    ),
}


def new_model(architecture: Architecture, width: int = WIDTH) -> Any:
    """A freshly initialised causal LM of hidden size `width`.

    Attention is eager: only that knows Gemma-2's soft-capping.
    """
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "head_dim": width // architecture.config["num_attention_heads"]}
    if "query_pre_attn_scalar" in architecture.config:
        sizes["query_pre_attn_scalar"] = sizes["head_dim"]
    config = architecture.config_class(**architecture.config | sizes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")
