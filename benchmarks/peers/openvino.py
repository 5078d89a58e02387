"""OpenVINO GenAI: models exported by Optimum Intel, weights compressed by NNCF."""

from pathlib import Path

import numpy as np
import openvino
import openvino_genai

from benchmarks.peers.worker import Generation, main

FORMS = {"fp32": None, "int8": {"bits": 8}, "int4": {"bits": 4, "group_size": 64, "sym": False}}


def build(checkpoint: Path, form: str, out: Path) -> None:
    """Export a checkpoint. Weights are rounded to nearest, the usual choice without calibration data."""
    from openvino_tokenizers import convert_tokenizer
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
    from transformers import AutoTokenizer

    settings = FORMS[form]
    quantised = {"load_in_8bit": False} if settings is None else {"quantization_config": OVWeightQuantizationConfig(**settings)}
    OVModelForCausalLM.from_pretrained(checkpoint, export=True, compile=False, **quantised).save_pretrained(out)
    tokenizers = convert_tokenizer(AutoTokenizer.from_pretrained(checkpoint), with_detokenizer=True)
    for model, name in zip(tokenizers, ("tokenizer", "detokenizer"), strict=True):
        openvino.save_model(model, out / f"openvino_{name}.xml")  # the pipeline needs them


class OpenVino:
    """A pipeline with the library's settings, except threads and the prefix cache, which would skip known prompts."""

    def __init__(self, folder: str, form: str, context: int, threads: int):
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        self.folder, self.options = Path(folder), {"INFERENCE_NUM_THREADS": threads}
        self.pipeline = openvino_genai.LLMPipeline(folder, "CPU", scheduler_config=scheduler, **self.options)

    def generate(self, prompt: list[int], count: int) -> Generation:
        """See `worker.Model`; the pipeline itself measures the seconds."""
        settings = openvino_genai.GenerationConfig(max_new_tokens=count, ignore_eos=True, do_sample=False)
        result = self.pipeline.generate(openvino.Tensor(np.array([prompt], np.int64)), settings)
        metrics = result.perf_metrics
        first = metrics.get_ttft().mean / 1e3
        return Generation(first, metrics.get_generate_duration().mean / 1e3 - first, list(result.tokens[0]))

    def logits(self, ids: list[int]) -> np.ndarray:
        """See `worker.Model`. Computed from the same file, since pipelines do not return logits."""
        compiled = openvino.Core().compile_model(self.folder / "openvino_model.xml", "CPU", self.options)
        feeds = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "position_ids": np.arange(len(ids), dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        names = {name for port in compiled.inputs for name in port.names}
        return np.asarray(compiled.create_infer_request().infer({name: feed for name, feed in feeds.items() if name in names})["logits"][0])


if __name__ == "__main__":
    main(OpenVino, build)
