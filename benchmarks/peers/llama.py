"""llama.cpp through llama-cpp-python's bindings of its C functions, the fastest way to call it from Python."""

import ctypes
import json
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from safetensors import safe_open

from benchmarks.peers.worker import Generation, main, stepwise

BATCH = 512  # tokens per prefill pass, as in the other peers
LAYER = {  # Hugging Face's name of a layer's tensor → GGUF's
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads · size, hidden] of a query or key matrix in GGUF's order, where rotary pairs are adjacent."""
    return np.asarray(weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape))


def write_f32(checkpoint: Path, out: Path) -> None:
    """A Llama checkpoint as GGUF in fp32, without a tokenizer: texts arrive as token ids."""
    config = json.loads((checkpoint / "config.json").read_text())
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("none")
    with safe_open(checkpoint / "model.safetensors", "numpy") as tensors:
        writer.add_tensor("token_embd.weight", tensors.get_tensor("model.embed_tokens.weight"))
        writer.add_tensor("output_norm.weight", tensors.get_tensor("model.norm.weight"))
        for layer in range(config["num_hidden_layers"]):
            for name, short in LAYER.items():
                weight = tensors.get_tensor(f"model.layers.{layer}.{name}.weight")
                if short in ("attn_q", "attn_k"):
                    weight = interleaved(weight, heads if short == "attn_q" else groups)
                writer.add_tensor(f"blk.{layer}.{short}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def build(checkpoint: Path, form: str, out: Path) -> None:
    """Write `model.gguf`, quantised by llama.cpp itself."""
    out.mkdir(parents=True)
    plain = out / ("model.gguf" if form == "F32" else "plain.gguf")
    write_f32(checkpoint, plain)
    if form == "F32":
        return
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{form}")
    if llama_cpp.llama_model_quantize(bytes(plain), bytes(out / "model.gguf"), ctypes.byref(settings)):
        raise RuntimeError(f"llama.cpp could not quantise {plain} to {form}")
    plain.unlink()


class Llama:
    """A GGUF file in a context of its own, with llama.cpp's own settings except threads, context and batch."""

    def __init__(self, folder: str, form: str, context: int, threads: int):
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(bytes(Path(folder) / "model.gguf"), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = context, BATCH, BATCH
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.sampler = llama_cpp.llama_sampler_init_greedy()

    def _decode(self, batch: llama_cpp.llama_batch) -> None:
        if llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")

    def _clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)

    def generate(self, prompt: list[int], count: int) -> Generation:
        """See `worker.Model`."""
        self._clear()

        def step(ids: list[int]) -> int:
            tokens = (llama_cpp.llama_token * len(ids))(*ids)
            self._decode(llama_cpp.llama_batch_get_one(tokens, len(ids)))
            return int(llama_cpp.llama_sampler_sample(self.sampler, self.context, -1))

        return stepwise(prompt, count, step)

    def logits(self, ids: list[int]) -> np.ndarray:
        """See `worker.Model`."""
        self._clear()
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place], batch.logits[place] = token, place, True
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        self._decode(batch)
        logits = np.array(np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.context), (len(ids), self.vocab)))
        llama_cpp.llama_batch_free(batch)
        return logits


if __name__ == "__main__":
    main(Llama, build)
