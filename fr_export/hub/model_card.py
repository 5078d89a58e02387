"""The model card of a bundle on the hub, README.md: made from its manifest and report."""

from collections.abc import Mapping, Sequence
from typing import Any

from fusionroute.runtime.manifest import Manifest

CARD = "README.md"
MARK = "<!-- Written by fusionroute push, which writes it anew unless you remove this line. -->"
PROJECT = "[FusionRoute](https://arxiv.org/abs/2601.05106)"


def model_card(
    manifest: Manifest, report: Mapping[str, Any], repository: str, licence: str | None = None, base_models: Sequence[str] = ()
) -> str:
    """The text of README.md for the repository `owner/name`. `licence` and `base_models` (hub ids) are the owner's to say."""
    parts = [
        front_matter(licence, base_models),
        MARK,
        f"# {repository.rpartition('/')[2]}",
        introduction(manifest),
        "## How to use it",
        usage(manifest, repository),
        "## Precisions",
        precisions(report),
        "## Limits",
        limits(report, licence),
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(licence: str | None, base_models: Sequence[str]) -> str:
    """The card's metadata, YAML."""
    lines = ["---", "library_name: fusionroute", "pipeline_tag: text-generation"]
    if licence is not None:
        lines.append(f"license: {licence}")
    if base_models:
        lines += ["base_model:", *(f"- {each}" for each in base_models)]
    return "\n".join([*lines, "tags:", "- fusionroute", "- onnx", "---"])


def introduction(manifest: Manifest) -> str:
    """What the bundle is."""
    experts = ", ".join(f"`{name}`" for name in manifest.experts)
    parameters = ", ".join(f"{model.name} {model.parameters / 1e6:,.1f} M" for model in manifest.models)
    return (
        f"A {PROJECT} system as a bundle of ONNX graphs. For every token its router chooses one of the experts {experts}, and the\n"
        f"logits of both are fused ({manifest.fusion}, λ = {manifest.lam}).\n\n"
        f"- family: {manifest.family}\n"
        f"- parameters: {parameters}\n"
        f"- context: {manifest.max_seq_len} tokens; vocabulary: {manifest.vocab_size}"
    )


def usage(manifest: Manifest, repository: str) -> str:
    """Commands that pull and run it."""
    folder = repository.rpartition("/")[2]
    prompt = '--prompt "Hello"' if "tokenizer.json" in manifest.files else ""
    return f"""With FusionRoute's runtime and its extras `cpu` and `hub` installed (no torch):

```sh
fusionroute pull {repository} {folder}
fusionroute inspect {folder} --verify
fusionroute generate {folder} {prompt}
```

```python
from fusionroute import FusionRuntime

with FusionRuntime.load("{folder}") as runtime:
    print(runtime.generate("Hello", max_new_tokens=64).text)
```""".replace(f"generate {folder} \n", f"generate {folder}\n")


def precisions(report: Mapping[str, Any]) -> str:
    """A row per variant: its size, and what it loses against torch in fp32."""
    rows = [
        "| target | precision | size | bits/weight | perplexity | mean KL, nats | top-1 | routing |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in report.get("variants", ()):
        size = f"{entry['bytes'] / 1e6:,.1f} MB"
        figures = ["–"] * 4
        if entry["compared"]:
            decode = entry["compared"]["decode"]
            ratio = decode["perplexity_ratio"]
            figures = [
                "–" if ratio is None else f"{ratio - 1:+.2%}",
                f"{decode['kl_mean']:.1e}",
                f"{decode['greedy_agreement']:.1%}",
                f"{decode['routing_agreement']:.1%}",
            ]
        rows.append("| " + " | ".join([entry["target"], entry["precision"], size, f"{entry['bits_per_weight']:.2f}", *figures]) + " |")
    return "\n".join(
        [*rows, "", "The last four columns compare the fused distribution with plain torch in fp32, token by token, on held-out texts."]
    )


def limits(report: Mapping[str, Any], licence: str | None) -> str:
    """What was missed, not compared, or is not said."""
    lines = [f"- {note}" for note in report.get("notes", ())]
    lines += [f"- {source['model']}: {note}" for source in report.get("sources", ()) for note in source["notes"]]
    for entry in report.get("variants", ()):
        name = f"{entry['precision']} for {entry['target']}"
        if entry["missed"]:
            lines.append(f"- {name} misses its bound: {'; '.join(entry['missed'])}.")
        if entry["not_compared"]:
            lines.append(f"- {name} was not compared with torch: {entry['not_compared']}.")
    if licence is None:
        lines.append("- This page names no licence. The licences of the models that the bundle was made from apply.")
    lines.append("- Shares of few tokens are coarse. Measure on texts of your own before you rely on a precision.")
    return "\n".join(lines)
