"""`fusionroute generate`: stream text from a bundle, and show which expert each token came from."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.text import Text as Styled

from fusionroute.runtime.commands.chat_lists import DocumentsFile, ToolsFile, read_lists
from fusionroute.runtime.commands.grammar import JsonSchema, Lark, Regex, read_grammar
from fusionroute.runtime.commands.options import BundleFolder, Debug, Device, ExpertMemory, Json, PrecisionName, Trust, VerifyKey, in_bytes
from fusionroute.runtime.commands.saved_texts import KvMemory, LoadText, SaveText, check_save, load_text, save_text
from fusionroute.runtime.commands.token_printer import TokenPrinter
from fusionroute.runtime.engine import DEFAULT_NEW_TOKENS, FusionRuntime
from fusionroute.runtime.errors import InputError
from fusionroute.runtime.html_page import check_folder, write_page
from fusionroute.runtime.manifest import Fusion
from fusionroute.runtime.options import check_fusion
from fusionroute.runtime.prompt import Prompt
from fusionroute.runtime.sampling import Sampling
from fusionroute.runtime.stream import Stream
from fusionroute.runtime.terminal import Terminal, print_json
from fusionroute.runtime.text import Token
from fusionroute.runtime.view.page import CANDIDATES, answer_of, answer_page
from fusionroute.runtime.view.recording import Recording


def generate(
    bundle: BundleFolder,
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    prompt_ids: Annotated[str | None, typer.Option(help="The prompt as a comma list of token ids, instead of --prompt.")] = None,
    precision: PrecisionName = None,
    device: Device = "auto",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = DEFAULT_NEW_TOKENS,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the chat template as the user's message.")] = False,
    tools: ToolsFile = None,
    documents: DocumentsFile = None,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0: off.")] = 0,
    top_p: Annotated[float, typer.Option(help="1: off.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="0: off.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1: off.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Subtracted for tokens that the answer holds; 0: off.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same for each time that it holds them; 0: off.")] = 0.0,
    logit_bias: Annotated[
        list[str] | None, typer.Option(metavar="ID=BIAS", help="Added to a token's logit, -inf bars it; repeat for several.")
    ] = None,
    top_logprobs: Annotated[int, typer.Option(help="With --json: this many of the likeliest tokens at each place.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; repeat for several.")] = None,
    stop_id: Annotated[list[int] | None, typer.Option(help="End at this token; repeat for several.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Do not end at end-of-sequence tokens.")] = False,
    min_new_tokens: Annotated[int, typer.Option(help="Tokens before the text may end by itself.")] = 0,
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
    html: Annotated[
        Path | None, typer.Option(help="Also write one self-contained page to this file: who answered, and what each model proposed.")
    ] = None,
    expert_memory: ExpertMemory = None,
    kv_memory: KvMemory = None,
    load: LoadText = None,
    save: SaveText = None,
    json_schema: JsonSchema = None,
    regex: Regex = None,
    lark: Lark = None,
    verify_key: VerifyKey = None,
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
        penalties = {"presence_penalty": presence_penalty, "frequency_penalty": frequency_penalty}
        grammar = read_grammar(json_schema, regex, lark)
        biases = read_biases(logit_bias or ())
        sampling = Sampling(
            temperature, top_k, top_p, min_p, repetition_penalty, seed, logit_bias=biases, top_logprobs=top_logprobs,
            candidates=0 if html is None else CANDIDATES, **penalties,
        )  # fmt: skip
        check_fusion(fusion, lam)
        lists = read_lists(tools, documents)
    except InputError as error:
        raise typer.BadParameter(str(error)) from error
    if html is not None:
        check_folder(html)
    check_save(save)
    options: dict[str, Any] = {
        "speculation": speculation,
        "exact": exact,
        "expert_memory": in_bytes(expert_memory),
        "kv_memory": in_bytes(kv_memory),
        "verify_key": verify_key,
        "trusted": trust,
    }
    with FusionRuntime.load(bundle, precision, device, **options) as runtime:
        load_text(runtime, load)
        if save is not None:
            save_text(runtime, runtime.prompt_ids(given, **lists), expert, save)
        stream = runtime.stream(
            given, max_new_tokens, stop=stop or (), stop_token_ids=stop_id or (), ignore_eos=ignore_eos, min_new_tokens=min_new_tokens,
            grammar=grammar,
            fusion=fusion, lam=lam, expert=expert, **lists, **asdict(sampling),
        )  # fmt: skip
        recording = Recording(stream)
        if as_json:
            print_json(as_object(list(recording), stream, runtime.precision))
        else:
            print_tokens(runtime, recording, show_routing)
        if html is not None:
            write_page(answer_page(answer_of(runtime, prompt or prompt_ids or "", recording, fusion, lam)), html)


def read_prompt(prompt: str | None, prompt_ids: str | None, chat: bool) -> Prompt:
    """The prompt in the form that the runtime takes. Raises InputError for ids that are no numbers."""
    if prompt is not None:
        return [{"role": "user", "content": prompt}] if chat else prompt
    try:
        return [int(part) for part in (prompt_ids or "").split(",")]
    except ValueError as error:
        raise InputError(f"--prompt-ids '{prompt_ids}' is no comma list of whole numbers, such as 2,17,5.") from error


def read_biases(biases: Sequence[str]) -> dict[int, float] | None:
    """What `--logit-bias` gives, None for nothing. Raises InputError for what is no ID=BIAS."""
    try:
        return {int(id): float(bias) for id, bias in (each.split("=", 1) for each in biases)} or None
    except ValueError as error:
        raise InputError("--logit-bias is no ID=BIAS of a token id and a number, such as 17=-4.5.") from error


def as_object(tokens: list[Token], stream: Stream, precision: str) -> dict[str, Any]:
    """What --json prints of a stream that has ended."""
    return {
        "text": "".join(token.text for token in tokens),
        "token_ids": [token.id for token in tokens],
        "experts": [token.expert for token in tokens],
        "logprobs": [token.logprob for token in tokens],
        **({"top_logprobs": [token.top_logprobs for token in tokens]} if any(token.top_logprobs for token in tokens) else {}),
        "finish_reason": stream.finish_reason,
        "precision": precision,
        "drafted": stream.drafted,
        "accepted": stream.accepted,
    }


def print_tokens(runtime: FusionRuntime, stream: Iterable[Token], show_routing: bool) -> None:
    """Print each token as it comes; with `show_routing` in the colour of its expert, and a list of runs below."""
    console = Terminal()
    printer = TokenPrinter(runtime, console, show_routing)
    tokens: list[Token] = []
    for token in stream:
        tokens.append(token)
        printer.show(token)
    print()
    if show_routing:
        print_runs(console, tokens, printer.styles, runtime.tokenizer.special if runtime.tokenizer else {})


def print_runs(console: Console, tokens: list[Token], styles: dict[str, str], special: Mapping[int, str]) -> None:
    """Print one line per run of tokens from the same expert, so that the routing can be read without colours."""
    width = max((len(name) for name in styles), default=0)
    for expert, group in groupby(tokens, key=lambda token: token.expert):
        run = list(group)
        pieces = " ".join(repr(token.text) if token.text else f"{special.get(token.id, 'token')} (id {token.id})" for token in run)
        console.print(
            Styled.assemble((f"{expert:<{width}}", f"bold {styles[expert]}"), f" {len(run):>3} token(s)  {pieces}"), soft_wrap=True
        )
