"""What this project measures.

Run from the root of a checkout, after `pip install -e '.[cpu,export,train,bench]'`; each takes `--help`.

| `python -m benchmarks.` | measures | result |
|---|---|---|
| `gpu_check` | everything that only a machine with an NVIDIA GPU can tell (`make gpu-check`) | a report |
| `peers` | the same models and prompts in other runtimes | docs/performance.md |
| `paper` | FusionRoute against its alternatives, trained on small systems | docs/results.md |
| `precision` | what each precision loses on real text | docs/precision.md |
| `half` | what half precision loses in all operators, as on a GPU, without a GPU | docs/precision.md |
| `quantiser` | what each step of the quantisers gains, and what bits buy | docs/precision.md |
| `speculation` | speed with drafts and without, over many texts | docs/speculation.md |
| `saved_texts` | a long prompt that is read, and one that is loaded | docs/length.md |
| `length` | what long texts cost: time per token, memory, catching up | docs/length.md |
| `embedding` | what a host process pays: loading, memory, the GIL, cancellation | docs/embedding.md |
| `real_size` | time and memory of exporting and running Gemma-2-2B shapes | docs/real-size.md |

`mixed` writes a copy of a system whose weights lie on no quantisation grid, as input for `precision` and `quantiser`;
`real_text` is the text that several of them read.
"""
