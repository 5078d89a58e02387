"""`fusionroute generate`: stream text from a bundle, and show which expert each token came from."""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import COLOR_SYSTEMS, Console
from rich.style import Style
from rich.text import Text as Styled

from fusionroute.runtime.chat_messages import plain_dicts
from fusionroute.runtime.commands.options import BundleFolder, Debug, Device, Json, PrecisionName, Trust
from fusionroute.runtime.engine import DEFAULT_NEW_TOKENS, FusionRuntime
from fusionroute.runtime.errors import InputError, reason
from fusionroute.runtime.manifest import Fusion
from fusionroute.runtime.options import check_fusion
from fusionroute.runtime.prompt import Prompt
from fusionroute.runtime.sampling import Sampling
from fusionroute.runtime.stream import Stream
from fusionroute.runtime.strict_json import check_json
from fusionroute.runtime.terminal import Terminal, print_json, streamed
from fusionroute.runtime.text import Token

COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red", "bright_cyan", "bright_magenta")


def generate(
    bundle: BundleFolder,
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    prompt_ids: Annotated[str | None, typer.Option(help="The prompt as a comma list of token ids, instead of --prompt.")] = None,
    precision: PrecisionName = None,
    device: Device = "auto",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = DEFAULT_NEW_TOKENS,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the chat template as the user's message.")] = False,
    tools: Annotated[Path | None, typer.Option(help="With --chat: a JSON file with a list of tools, each with its JSON schema.")] = None,
    documents: Annotated[Path | None, typer.Option(help='With --chat: a JSON file with a list of {"title", "text"}.')] = None,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0: off.")] = 0,
    top_p: Annotated[float, typer.Option(help="1: off.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="0: off.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1: off.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; repeat for several.")] = None,
    seed: Annotated[int | None, typer.Option(help="Equal seeds give equal text.")] = None,
    fusion: Annotated[Fusion | None, typer.Option(help="Default: as exported.")] = None,
    lam: Annotated[float | None, typer.Option("--lambda", help="λ of the weighted fusion; default as exported.")] = None,
    expert: Annotated[str | None, typer.Option(help="Let this expert answer every token; default: the routed one.")] = None,
    speculation: Annotated[
        Literal["off", "auto"], typer.Option(help="auto: draft tokens ahead where that pays on this machine; or off.")
    ] = "off",
    exact: Annotated[
        bool, typer.Option("--exact", help="Read tokens in pairs: quantised greedy output is then the same with drafts and without.")
    ] = False,
    show_routing: Annotated[bool, typer.Option("--show-routing", help="Colour each token by its expert, and list them.")] = False,
    expert_memory: Annotated[
        int | None, typer.Option(min=1, help="MiB of GPU memory for the experts' weights; the others wait in host memory.")
    ] = None,
    trust: Trust = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Generate text from a bundle."""
    if (prompt is None) == (prompt_ids is None):
        raise typer.BadParameter("give the prompt as --prompt TEXT or as --prompt-ids IDS", param_hint="--prompt")
    if chat and prompt is None:
        raise typer.BadParameter("the chat template takes text: give the prompt as --prompt TEXT", param_hint="--chat")
    if not chat and (tools or documents):
        raise typer.BadParameter("the chat template takes them: add --chat", param_hint="--tools / --documents")
    if max_new_tokens < 1:
        raise typer.BadParameter(f"{max_new_tokens} is out of range; expected at least 1", param_hint="--max-new-tokens")
    try:  # wrong values end here, before anything is loaded
        given = read_prompt(prompt, prompt_ids, chat)
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        check_fusion(fusion, lam)
        lists: dict[str, Any] = {
            name: read_list(name, file) for name, file in (("tools", tools), ("documents", documents)) if file is not None
        }
    except InputError as error:
        raise typer.BadParameter(str(error)) from error
    budget = None if expert_memory is None else expert_memory << 20
    options: dict[str, Any] = {"speculation": speculation, "exact": exact, "expert_memory": budget, "trusted": trust}
    with FusionRuntime.load(bundle, precision, device, **options) as runtime:
        stream = runtime.stream(given, max_new_tokens, stop=stop or (), fusion=fusion, lam=lam, expert=expert, **lists, **asdict(sampling))
        if as_json:
            print_json(as_object(list(stream), stream, runtime.precision))
        else:
            print_tokens(runtime, stream, show_routing)


def read_prompt(prompt: str | None, prompt_ids: str | None, chat: bool) -> Prompt:
    """The prompt in the form that the runtime takes. Raises InputError for ids that are no numbers."""
    if prompt is not None:
        return [{"role": "user", "content": prompt}] if chat else prompt
    try:
        return [int(part) for part in (prompt_ids or "").split(",")]
    except ValueError as error:
        raise InputError(f"--prompt-ids '{prompt_ids}' is no comma list of whole numbers, such as 2,17,5.") from error


def read_list(name: str, file: Path) -> list[dict[str, Any]]:
    """The list of dicts in a JSON file. Raises InputError."""
    try:
        text = file.read_text(encoding="utf-8")
        check_json(text)
        values = plain_dicts(name, json.loads(text))
    except (OSError, ValueError) as error:
        raise InputError(f"--{name} {file} holds no JSON list of dicts ({reason(error)}).") from error
    return values or []


def as_object(tokens: list[Token], stream: Stream, precision: str) -> dict[str, Any]:
    """What --json prints of a stream that has ended."""
    return {
        "text": "".join(token.text for token in tokens),
        "token_ids": [token.id for token in tokens],
        "experts": [token.expert for token in tokens],
        "logprobs": [token.logprob for token in tokens],
        "finish_reason": stream.finish_reason,
        "precision": precision,
        "drafted": stream.drafted,
        "accepted": stream.accepted,
    }


def print_tokens(runtime: FusionRuntime, stream: Stream, show_routing: bool) -> None:
    """Print each token as it comes; with `show_routing` in the colour of its expert, and a list of runs below."""
    console = Terminal()
    colours = COLOR_SYSTEMS[console.color_system] if console.color_system else None
    names = (*runtime.expert_names, runtime.bundle.manifest.models[0].name)  # the router may answer for an expert that fails
    styles = dict(zip(names, COLOURS * len(names), strict=False))
    for_terminal = sys.stdout.isatty()  # else a program reads the text, as it is
    tokens: list[Token] = []
    for token in stream:
        tokens.append(token)
        text = token.text if runtime.tokenizer else f"{token.id} "
        if for_terminal:
            text = streamed(text)
        if show_routing:
            text = Style.parse(styles[token.expert]).render(text, color_system=colours)
        print(text, end="", flush=True)  # not by the console, which would expand tabs and drop carriage returns
    print()
    if show_routing:
        print_runs(console, tokens, styles, runtime.tokenizer.special if runtime.tokenizer else {})


def print_runs(console: Console, tokens: list[Token], styles: dict[str, str], special: Mapping[int, str]) -> None:
    """Print one line per run of tokens from the same expert, so that the routing can be read without colours."""
    width = max((len(name) for name in styles), default=0)
    for expert, group in groupby(tokens, key=lambda token: token.expert):
        run = list(group)
        pieces = " ".join(repr(token.text) if token.text else f"{special.get(token.id, 'token')} (id {token.id})" for token in run)
        console.print(
            Styled.assemble((f"{expert:<{width}}", f"bold {styles[expert]}"), f" {len(run):>3} token(s)  {pieces}"), soft_wrap=True
        )
