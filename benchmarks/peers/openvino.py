"""OpenVINO GenAI: models exported by Optimum Intel, weights compressed by NNCF."""

from pathlib import Path

import numpy as np
import openvino
import openvino_genai

from peers.worker import Text, main

FORMS = {"fp32": None, "int8": {"bits": 8}, "int4": {"bits": 4, "group_size": 64, "sym": False}}


def build(checkpoint: Path, form: str, out: Path) -> None:
    """Export a checkpoint; weights are rounded to nearest, as is usual without data."""
    from openvino_tokenizers import convert_tokenizer
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
    from transformers import AutoTokenizer

    settings = FORMS[form]
    quantised = {"load_in_8bit": False} if settings is None else {"quantization_config": OVWeightQuantizationConfig(**settings)}
    OVModelForCausalLM.from_pretrained(checkpoint, export=True, compile=False, **quantised).save_pretrained(out)
    tokenizers = convert_tokenizer(AutoTokenizer.from_pretrained(checkpoint), with_detokenizer=True)
    for model, name in zip(tokenizers, ("tokenizer", "detokenizer"), strict=True):
        openvino.save_model(model, out / f"openvino_{name}.xml")  # the pipeline does not open without them


class OpenVino:
    """A pipeline, with its own settings but for threads and the cache of prompts, which would answer a prompt that it has seen from memory."""

    def __init__(self, folder: str, form: str, context: int, threads: int):
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        self.folder, self.options = Path(folder), {"INFERENCE_NUM_THREADS": threads}
        self.pipeline = openvino_genai.LLMPipeline(folder, "CPU", scheduler_config=scheduler, **self.options)

    def generate(self, prompt: list[int], count: int) -> Text:
        """See `worker.Model`; seconds are the pipeline's own count."""
        settings = openvino_genai.GenerationConfig(max_new_tokens=count, ignore_eos=True, do_sample=False)
        result = self.pipeline.generate(openvino.Tensor(np.array([prompt], np.int64)), settings)
        metrics = result.perf_metrics
        first = metrics.get_ttft().mean / 1e3
        return Text(first, metrics.get_generate_duration().mean / 1e3 - first, list(result.tokens[0]))

    def logits(self, ids: list[int]) -> np.ndarray:
        """See `worker.Model`: of the same file, since pipelines hand out no logits."""
        compiled = openvino.Core().compile_model(self.folder / "openvino_model.xml", "CPU", self.options)
        given = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "position_ids": np.arange(len(ids), dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        names = {name for port in compiled.inputs for name in port.names}
        return compiled.create_infer_request().infer({k: v for k, v in given.items() if k in names})["logits"][0]


if __name__ == "__main__":
    main(OpenVino, build)
