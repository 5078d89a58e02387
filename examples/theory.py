"""Why choosing among experts is not enough: a hand-built system in which only fusion writes the right text.

python examples/theory.py [PICTURE]

At two steps both experts are wrong, so no sequence of choices between them writes the text. The router alone is wrong
at three steps. Fused they are right at every step. docs/theory.md explains why. The checkpoints are real ones, exported
and run like any other.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from fusionroute.runtime import FusionError, FusionRuntime
from fusionroute.runtime.errors import one_line

EXPERTS = ("a", "b")
RIVALS = ("apples", "pears")  # expert a prefers the first wrongly, expert b the second
FAR = -6.0  # logit of every word that a model rules out
LAMBDAS = tuple(step / 20 for step in range(21))
Floats = npt.NDArray[np.floating[Any]]


class Step(NamedTuple):
    """One word of the text, the expert chosen for it, and each model's logits of (the word, apples, pears)."""

    word: str
    chosen: str
    router: tuple[float, float, float]
    a: tuple[float, float, float]
    b: tuple[float, float, float]


KNOWS, APPLES, PEARS = (4, FAR, FAR), (3, 4, FAR), (3, FAR, 4)  # a wrong expert's second choice is the right word
STEPS = (
    Step("what", "a", router=(1, 0, 0), a=KNOWS, b=PEARS),
    Step("no", "b", router=(1, 0, 0), a=APPLES, b=KNOWS),
    Step("expert", "a", router=KNOWS, a=APPLES, b=PEARS),  # both experts are wrong, the router is right
    Step("knows", "a", router=(0, 2, 0), a=KNOWS, b=PEARS),  # the router is wrong
    Step("the", "a", router=PEARS, a=APPLES, b=PEARS),  # all three are wrong
    Step("router", "b", router=(1, 0, 0), a=APPLES, b=KNOWS),
    Step("can", "a", router=(1, 0, 0), a=KNOWS, b=KNOWS),
    Step("add", "b", router=(0, 0, 2), a=APPLES, b=KNOWS),  # the router is wrong
)
WORDS = ("<bos>", "<eos>", *(step.word for step in STEPS), *RIVALS)
PROMPT = [WORDS.index("<bos>")]
TARGET = [WORDS.index(step.word) for step in STEPS]


def table(model: str) -> Floats:
    """A model as float64 [V, V]: row i has the logits after word i. After the last word all models end the text."""
    logits = np.full((len(WORDS), len(WORDS)), FAR)
    logits[:, WORDS.index("<eos>")] = 4
    for before, step in zip(PROMPT + TARGET, STEPS, strict=False):
        logits[before] = FAR
        logits[before, [WORDS.index(word) for word in (step.word, *RIVALS)]] = getattr(step, model)
    return logits


def write_model(folder: Path, logits: Floats) -> str:
    """Write a Llama checkpoint that computes the table: one-hot embeddings, an idle layer, the table as LM head."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    size = len(WORDS)
    config = LlamaConfig(
        vocab_size=size, hidden_size=size, intermediate_size=size, num_hidden_layers=1, num_attention_heads=1, head_dim=8,
        max_position_embeddings=32, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.model.norm.weight.fill_((1 / size + config.rms_norm_eps) ** 0.5)  # undoes the RMSNorm of a one-hot vector
        model.lm_head.weight.copy_(torch.from_numpy(logits).T)
    model.save_pretrained(folder)
    return str(folder)


def make_bundle(folder: Path) -> Path:
    """Write the three checkpoints and the routing head into `folder`, and export them to `folder/bundle`."""
    import torch
    from safetensors.torch import save_file

    from fusionroute.fr_export.console.progress import Stages
    from fusionroute.fr_export.console.quiet import quiet
    from fusionroute.fr_export.export import Request, export
    from fusionroute.fr_export.families import FAMILIES

    with quiet():
        router, *experts = (write_model(folder / name, table(name)) for name in ("router", *EXPERTS))
    head = torch.zeros(len(EXPERTS), len(WORDS))
    for before, step in zip(PROMPT + TARGET, STEPS, strict=False):
        head[EXPERTS.index(step.chosen), before] = 1
    save_file({"routing_head.weight": head}, folder / "router" / "routing_head.safetensors")
    sources = dict(zip(EXPERTS, experts, strict=True))
    export(Request(FAMILIES["llama3"], router, sources, ("fp32",), ("ort:cpu",), folder / "bundle"), Stages(Console(quiet=True)))
    return folder / "bundle"


def selections(rt: FusionRuntime) -> list[list[int]]:
    """The greedy text of every sequence of expert choices: 2^T texts of T tokens."""
    sessions = [rt.session(lam=0.0, expert=name) for name in EXPERTS]
    texts = [PROMPT]
    for _ in STEPS:
        texts = [[*text, next_token(session, text)] for text in texts for session in sessions]
    return [text[len(PROMPT) :] for text in texts]


def next_token(session: Any, text: list[int]) -> int:
    """The greedy continuation of a text."""
    session.rewind(0)
    session.append(text)
    return int(session.step().id)


def fused(rt: FusionRuntime, lam: float) -> Floats:
    """Logits float32 [T, V] along the text, fused with λ (1: the router's own; 0: those of the experts it chooses)."""
    return rt.score(PROMPT + TARGET, positions=range(len(STEPS)), lam=lam).logits


def alone(rt: FusionRuntime, expert: str) -> Floats:
    """One expert's own logits float32 [T, V] along the text."""
    cache = rt.backend.experts[EXPERTS.index(expert)].cache()
    return np.array(cache.forward(PROMPT + TARGET, range(len(STEPS))).logits)


class Policy(NamedTuple):
    """A way to decode. logits [T, V]: row t follows the first t right words."""

    name: str
    logits: Floats

    @property
    def words(self) -> list[str]:
        """Its greedy word at each step."""
        return [WORDS[i] for i in self.logits.argmax(-1)]

    @property
    def right(self) -> Floats:
        """The probability [T] of the right word at each step, in float64."""
        odds = np.exp(self.logits.astype(np.float64) - self.logits.max(-1, keepdims=True))
        return np.asarray(odds[range(len(TARGET)), TARGET] / odds.sum(-1))

    @property
    def value(self) -> float:
        """Probability of the whole text: the expected reward of a sample, if the right text earns 1 and any other 0."""
        return float(self.right.prod())


def policies(rt: FusionRuntime) -> list[Policy]:
    """Each expert, the best choice between them, the router, and the fusion, as the runtime computes them."""
    a, b = (Policy(f"expert {name}", alone(rt, name)) for name in EXPERTS)
    # an oracle picks the better expert at each step; a random pick averages their probabilities, never more
    best = Policy("best choice", np.where((a.right >= b.right)[:, None], a.logits, b.logits))
    return [a, b, best, Policy("router", fused(rt, 1.0)), Policy("fusion", fused(rt, 0.5))]


def draw(compared: list[Policy], curve: list[float], file: Path) -> None:
    """The policies step by step, and the value of the fusion over λ."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.0), layout="constrained")
    FigureCanvasAgg(figure)
    steps, values = figure.subplots(1, 2, width_ratios=(2.6, 1))
    steps.imshow([policy.right for policy in compared], cmap="Blues", vmin=0, vmax=1.6, aspect="auto")
    for row, policy in enumerate(compared):
        for column, (word, step) in enumerate(zip(policy.words, STEPS, strict=True)):
            colour, weight = ("#1f2328", "normal") if word == step.word else ("#cf222e", "bold")
            steps.text(column, row, word, ha="center", va="center", fontsize=9, color=colour, weight=weight)
    steps.set_xticks(range(len(STEPS)), [step.word for step in STEPS], fontsize=9)
    steps.set_yticks(range(len(compared)), [policy.name for policy in compared], fontsize=9)
    steps.set_title("greedy word (red: wrong) over the probability of the right one (blue)", fontsize=9)
    steps.tick_params(length=0)
    steps.spines[:].set_visible(False)
    values.plot(LAMBDAS, curve, label="fusion")
    for policy, style in zip(compared[2:4], ("--", ":"), strict=True):
        values.axhline(policy.value, color="#57606a", linestyle=style, linewidth=1.2, label=policy.name)
    values.set_xlabel("λ (0: expert only, 1: router only)", fontsize=9)
    values.set_title("probability of the whole text", fontsize=9)
    values.set_ylim(-0.02, 1)
    values.tick_params(labelsize=8)
    values.spines[["top", "right"]].set_visible(False)
    values.legend(fontsize=8, frameon=False)
    figure.savefig(file, dpi=110)


def show(compared: list[Policy], console: Console) -> None:
    """Print one row per step: each policy's greedy word (red: wrong) and its probability of the right one."""
    steps = Table("right", *(policy.name for policy in compared), box=SIMPLE)
    for number, step in enumerate(STEPS):
        words = (f"{policy.words[number]} {policy.right[number]:.2f}" for policy in compared)
        steps.add_row(step.word, *(f"[red]{word}[/]" if word.split()[0] != step.word else word for word in words))
    steps.add_section()
    steps.add_row("all", *(f"{policy.value:.4f}" for policy in compared))
    console.print(steps)


def main(picture: str = "theory.png") -> None:
    """Build, export and run the system; print the table and draw the picture."""
    console = Console()
    with tempfile.TemporaryDirectory() as folder, FusionRuntime.load(make_bundle(Path(folder))) as rt:
        texts, compared = selections(rt), policies(rt)
        curve = [Policy("fusion", fused(rt, lam)).value for lam in LAMBDAS]
        written = rt.generate(PROMPT, max_new_tokens=2 * len(STEPS), lam=0.5)
    show(compared, console)
    console.print(f"{len(texts)} sequences of expert choices write {texts.count(TARGET)} times the right text.")
    console.print(f"The fusion writes: {' '.join(WORDS[i] for i in written.token_ids)}")
    console.print(f"with the experts   {' '.join(written.experts)}")
    draw(compared, curve, Path(picture))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:2])
    except (FusionError, OSError, ValueError) as error:  # the last two: the picture cannot be written
        sys.exit(f"error: {one_line(error)}")
    except ModuleNotFoundError as error:
        sys.exit(f"error: This example needs the package '{error.name}': install the extras (pip install 'fusionroute[cpu,export,train]').")
