"""Why choosing among experts is not enough: a system built by hand in which only the fusion with the router's logits finds the text.

python examples/theory.py [PICTURE]

Two experts are both wrong at two steps, so no sequence of choices between them writes the text; the router alone is wrong at three. Together
they are right everywhere. docs/theory.md explains it. The checkpoints are real ones, exported and run like any other.
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
RIVALS = ("apples", "pears")  # expert a falls for the one, expert b for the other
FAR = -6.0  # the logit of every word that a model does not consider
LAMBDAS = tuple(step / 20 for step in range(21))
Floats = npt.NDArray[np.floating[Any]]


class Step(NamedTuple):
    """One word of the text: the expert that the router chooses for it, and each model's logits of (the word, apples, pears)."""

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
    """A model as float64 [V, V]: row i holds the logits after word i. Beyond the text all models end it."""
    logits = np.full((len(WORDS), len(WORDS)), FAR)
    logits[:, WORDS.index("<eos>")] = 4
    for before, step in zip(PROMPT + TARGET, STEPS, strict=False):
        logits[before] = FAR
        logits[before, [WORDS.index(word) for word in (step.word, *RIVALS)]] = getattr(step, model)
    return logits


def write_model(folder: Path, logits: Floats) -> str:
    """A Llama checkpoint that computes the table: one-hot embeddings, a layer that adds nothing, the table as the LM head."""
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
        model.model.norm.weight.fill_((1 / size + config.rms_norm_eps) ** 0.5)  # what the norm divides a one-hot vector by
        model.lm_head.weight.copy_(torch.from_numpy(logits).T)
    model.save_pretrained(folder)
    return str(folder)


def make_bundle(folder: Path) -> Path:
    """Write the three checkpoints and the routing head into `folder`, and export them."""
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
    """A way to decode: its logits [T, V] along the text, each row after the right words before."""

    name: str
    logits: Floats

    @property
    def words(self) -> list[str]:
        """What it writes greedily at each step."""
        return [WORDS[i] for i in self.logits.argmax(-1)]

    @property
    def right(self) -> Floats:
        """The probability [T] of the right word at each step, in float64."""
        odds = np.exp(self.logits.astype(np.float64) - self.logits.max(-1, keepdims=True))
        return np.asarray(odds[range(len(TARGET)), TARGET] / odds.sum(-1))

    @property
    def value(self) -> float:
        """The probability of the whole text: the expected reward of sampling where nothing else is rewarded, with 1."""
        return float(self.right.prod())


def policies(rt: FusionRuntime) -> list[Policy]:
    """Each expert, the best choice between them, the router and the fusion of router and routed expert, all as the runtime computes them."""
    a, b = (Policy(f"expert {name}", alone(rt, name)) for name in EXPERTS)
    # an oracle names the better expert at each step; to draw one by chance averages their probabilities, which is no better
    best = Policy("best choice", np.where((a.right >= b.right)[:, None], a.logits, b.logits))
    return [a, b, best, Policy("router", fused(rt, 1.0)), Policy("fusion", fused(rt, 0.5))]


def draw(found: list[Policy], curve: list[float], file: Path) -> None:
    """The policies step by step, and the value of the fusion over λ."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.0), layout="constrained")
    FigureCanvasAgg(figure)
    steps, values = figure.subplots(1, 2, width_ratios=(2.6, 1))
    steps.imshow([policy.right for policy in found], cmap="Blues", vmin=0, vmax=1.6, aspect="auto")
    for row, policy in enumerate(found):
        for column, (word, step) in enumerate(zip(policy.words, STEPS, strict=True)):
            colour, weight = ("#1f2328", "normal") if word == step.word else ("#cf222e", "bold")
            steps.text(column, row, word, ha="center", va="center", fontsize=9, color=colour, weight=weight)
    steps.set_xticks(range(len(STEPS)), [step.word for step in STEPS], fontsize=9)
    steps.set_yticks(range(len(found)), [policy.name for policy in found], fontsize=9)
    steps.set_title("greedy word (red: wrong) over the probability of the right one (blue)", fontsize=9)
    steps.tick_params(length=0)
    steps.spines[:].set_visible(False)
    values.plot(LAMBDAS, curve, label="fusion")
    for policy, style in zip(found[2:4], ("--", ":"), strict=True):
        values.axhline(policy.value, color="#57606a", linestyle=style, linewidth=1.2, label=policy.name)
    values.set_xlabel("λ (0: expert only, 1: router only)", fontsize=9)
    values.set_title("probability of the whole text", fontsize=9)
    values.set_ylim(-0.02, 1)
    values.tick_params(labelsize=8)
    values.spines[["top", "right"]].set_visible(False)
    values.legend(fontsize=8, frameon=False)
    figure.savefig(file, dpi=110)


def show(found: list[Policy], console: Console) -> None:
    """One row per step: the greedy words of all policies (red: wrong) and the probabilities that they give to the right one."""
    shown = Table("right", *(policy.name for policy in found), box=SIMPLE)
    for number, step in enumerate(STEPS):
        words = (f"{own.words[number]} {own.right[number]:.2f}" for own in found)
        shown.add_row(step.word, *(f"[red]{word}[/]" if word.split()[0] != step.word else word for word in words))
    shown.add_section()
    shown.add_row("all", *(f"{policy.value:.4f}" for policy in found))
    console.print(shown)


def main(picture: str = "theory.png") -> None:
    """Build, export, run; print the table and draw the picture."""
    console = Console()
    with tempfile.TemporaryDirectory() as folder, FusionRuntime.load(make_bundle(Path(folder))) as rt:
        texts, found = selections(rt), policies(rt)
        curve = [Policy("fusion", fused(rt, lam)).value for lam in LAMBDAS]
        written = rt.generate(PROMPT, max_new_tokens=2 * len(STEPS), lam=0.5)
    show(found, console)
    console.print(f"{len(texts)} sequences of expert choices write {texts.count(TARGET)} times the right text.")
    console.print(f"The fusion writes: {' '.join(WORDS[i] for i in written.token_ids)}")
    console.print(f"with the experts   {' '.join(written.experts)}")
    draw(found, curve, Path(picture))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:2])
    except (FusionError, OSError, ValueError) as error:  # the last two: a picture that cannot be written, or of an unknown kind
        sys.exit(f"error: {one_line(error)}")
    except ModuleNotFoundError as error:
        sys.exit(f"error: This example needs the package '{error.name}': install the extras (pip install 'fusionroute[cpu,export,train]').")
