"""`python -m runtime generate`: stream text from a bundle, and show which expert each token came from."""

import json
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import COLOR_SYSTEMS, Console
from rich.style import Style
from rich.text import Text as Styled

from fusionroute.runtime.backends import KNOWN
from fusionroute.runtime.engine import DEFAULT_NEW_TOKENS, FusionRuntime
from fusionroute.runtime.errors import InputError
from fusionroute.runtime.options import FUSIONS, SPECULATION_MODES, fusion_coefficients
from fusionroute.runtime.prompt import Prompt
from fusionroute.runtime.sampling import Sampling
from fusionroute.runtime.text import Token

COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red", "bright_cyan", "bright_magenta")


def generate(
    bundle: Annotated[Path, typer.Argument(help="Folder that export.py wrote.")],
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    prompt_ids: Annotated[str | None, typer.Option(help="The prompt as token ids with commas between, instead of --prompt.")] = None,
    precision: Annotated[str | None, typer.Option(help="Default: the fastest in the bundle.")] = None,
    device: Annotated[str, typer.Option(help=f"{', '.join(KNOWN)}.")] = "auto",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = DEFAULT_NEW_TOKENS,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the chat template as the user's message.")] = False,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0: off.")] = 0,
    top_p: Annotated[float, typer.Option(help="1: off.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="0: off.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1: off.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; repeat for several.")] = None,
    seed: Annotated[int | None, typer.Option(help="Equal seeds give equal text.")] = None,
    fusion: Annotated[str | None, typer.Option(help="weighted or additive; default as exported.")] = None,
    lam: Annotated[float | None, typer.Option("--lambda", help="λ of the weighted fusion; default as exported.")] = None,
    expert: Annotated[str | None, typer.Option(help="Let this expert answer every token; default: the routed one.")] = None,
    speculation: Annotated[str, typer.Option(help="auto: draft tokens ahead where that pays on this machine; or off.")] = "off",
    exact: Annotated[
        bool, typer.Option("--exact", help="Read tokens by twos: quantised greedy output is then the same with drafts and without.")
    ] = False,
    show_routing: Annotated[bool, typer.Option("--show-routing", help="Colour each token by its expert, and list them.")] = False,
    expert_memory: Annotated[
        int | None, typer.Option(min=1, help="MiB of GPU memory for the experts' weights; those beyond it wait in host memory.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with text, token ids and experts.")] = False,
) -> None:
    """Generate from a bundle."""
    if (prompt is None) == (prompt_ids is None):
        raise typer.BadParameter("give the prompt as --prompt TEXT or as --prompt-ids IDS", param_hint="--prompt")
    if chat and prompt is None:
        raise typer.BadParameter("the chat template takes text: give the prompt as --prompt TEXT", param_hint="--chat")
    if device not in KNOWN:
        raise typer.BadParameter(f"unknown device '{device}'; expected {', '.join(KNOWN)}", param_hint="--device")
    if speculation not in SPECULATION_MODES:
        raise typer.BadParameter(
            f"unknown speculation '{speculation}'; expected {', '.join(SPECULATION_MODES)}", param_hint="--speculation"
        )
    if max_new_tokens < 1:
        raise typer.BadParameter(f"{max_new_tokens} is out of range; expected at least 1", param_hint="--max-new-tokens")
    try:
        asked = request(prompt, prompt_ids, chat)
        sampling: dict[str, Any] = {
            "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty,
            "seed": seed,
        }  # fmt: skip
        Sampling(**sampling)  # wrong values end here, before anything is loaded
        fusion_coefficients(fusion or FUSIONS[0], 0.5 if lam is None else lam)
    except InputError as error:
        raise typer.BadParameter(str(error)) from error
    budget = None if expert_memory is None else expert_memory << 20
    with FusionRuntime.load(bundle, precision, device, speculation=speculation, exact=exact, expert_memory=budget) as runtime:
        stream = runtime.stream(
            asked,
            max_new_tokens,
            stop=stop or (),
            fusion=fusion,
            lam=lam,
            expert=expert,
            **sampling,
        )
        console = Console(highlight=False)
        colours = COLOR_SYSTEMS[console.color_system] if console.color_system else None
        styles = dict(zip(runtime.expert_names, COLOURS * len(runtime.expert_names), strict=False))
        tokens: list[Token] = []
        for token in stream:
            tokens.append(token)
            if not as_json:
                shown = token.text if runtime.tokenizer else f"{token.id} "
                # written as it is: the console would expand tabs and drop returns
                print(Style.parse(styles[token.expert]).render(shown, color_system=colours) if show_routing else shown, end="", flush=True)
        if not as_json:
            print(flush=True)
        if show_routing and not as_json:
            show_runs(console, tokens, styles)
        if as_json:
            result = {
                "text": "".join(token.text for token in tokens),
                "token_ids": [token.id for token in tokens],
                "experts": [token.expert for token in tokens],
                "logprobs": [token.logprob for token in tokens],
                "finish_reason": stream.finish_reason,
                "precision": runtime.precision,
                "drafted": stream.drafted,
                "accepted": stream.accepted,
            }
            print(json.dumps(result, ensure_ascii=False), flush=True)


def request(prompt: str | None, prompt_ids: str | None, chat: bool) -> Prompt:
    """The prompt in the form that the runtime takes."""
    if prompt is not None:
        return [{"role": "user", "content": prompt}] if chat else prompt
    try:
        return [int(part) for part in (prompt_ids or "").split(",")]
    except ValueError as error:
        raise InputError(f"--prompt-ids '{prompt_ids}' is no comma list of whole numbers, such as 2,17,5.") from error


def show_runs(console: Console, tokens: list[Token], styles: dict[str, str]) -> None:
    """One line per run of tokens from the same expert, so that the routing can be read without colours."""
    width = max((len(name) for name in styles), default=0)
    for expert, group in groupby(tokens, key=lambda token: token.expert):
        run = list(group)
        pieces = " ".join(repr(token.text) if token.text else str(token.id) for token in run)
        console.print(
            Styled.assemble((f"{expert:<{width}}", f"bold {styles[expert]}"), f" {len(run):>3} token(s)  {pieces}"), soft_wrap=True
        )
