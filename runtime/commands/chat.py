"""`fusionroute chat`: a conversation in the terminal, each token in the colour of its expert."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.text import Text as Styled

from fusionroute.runtime.commands.chat_lists import DocumentsFile, ToolsFile, read_lists
from fusionroute.runtime.commands.options import BundleFolder, Debug, Device, ExpertMemory, PrecisionName, Trust, VerifyKey, in_bytes
from fusionroute.runtime.commands.saved_texts import KvMemory, LoadText, check_save, load_text, save_text
from fusionroute.runtime.commands.token_printer import TokenPrinter
from fusionroute.runtime.conversation import Conversation
from fusionroute.runtime.engine import FusionRuntime
from fusionroute.runtime.errors import FusionError, InputError
from fusionroute.runtime.options import check_fusion
from fusionroute.runtime.sampling import Sampling
from fusionroute.runtime.terminal import Terminal

HELP = """/reset              forget the conversation
/save FILE          write it; /load FILE goes on with it
/expert NAME        let one expert answer; /expert auto: the routed one
/lambda X           λ of the fusion; /lambda auto: as exported
/temperature X      0: greedy
/stats              what the last answer took
/quit, or Ctrl-D    leave; Ctrl-C stops an answer"""


def chat(
    bundle: BundleFolder,
    precision: PrecisionName = None,
    device: Device = "auto",
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    tools: ToolsFile = None,
    documents: DocumentsFile = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 512,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="1: off.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Equal seeds give equal answers.")] = None,
    lam: Annotated[float | None, typer.Option("--lambda", help="λ of the weighted fusion; default as exported.")] = None,
    speculation: Annotated[Literal["off", "auto"], typer.Option(help="auto: draft tokens ahead where that pays.")] = "off",
    kv_memory: KvMemory = None,
    load: LoadText = None,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="At the end let all experts read the conversation, and write what they keep of it.")
    ] = None,
    expert_memory: ExpertMemory = None,
    verify_key: VerifyKey = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Talk with a bundle. Lines that begin with / are commands: /help lists them."""
    try:  # wrong values end here, before anything is loaded
        Sampling(temperature=temperature, top_p=top_p, seed=seed)
        check_fusion(None, lam)
        lists = read_lists(tools, documents)
    except InputError as error:
        raise typer.BadParameter(str(error)) from error
    check_save(save)
    given: dict[str, Any] = {
        "speculation": speculation,
        "expert_memory": in_bytes(expert_memory),
        "kv_memory": in_bytes(kv_memory),
        "verify_key": verify_key,
        "trusted": trust,
    }
    with FusionRuntime.load(bundle, precision, device, **given) as runtime:
        runtime.prompt_ids([{"role": "user", "content": "?"}], **lists)  # a bundle without a chat template says so now
        options = {"temperature": temperature, "top_p": top_p, "seed": seed, "lam": lam}
        load_text(runtime, load)
        conversation = Conversation(runtime, max_new_tokens, system, lists, **options)
        talk(conversation)
        if save is not None and conversation.messages:
            lists["add_generation_prompt"] = False
            save_text(runtime, runtime.prompt_ids(conversation.messages, **lists), None, save)


def talk(conversation: Conversation) -> None:
    """Read lines and answer them until the end of the input."""
    console = Terminal()
    printer = TokenPrinter(conversation.runtime, console, coloured=True)
    interactive = sys.stdin.isatty()
    if interactive:
        with suppress(ImportError):  # gives `input` editing and a history
            import readline  # noqa: F401
        console.print(Styled.assemble("Experts: ", *legend(printer), "  /help lists commands."))
    with Interrupts() as interrupts:
        while True:
            try:
                line = input("> " if interactive else "").strip()
            except EOFError:
                break
            except KeyboardInterrupt:
                print("\n/quit or Ctrl-D leaves.")
                continue
            if line in ("/quit", "/exit"):
                break
            try:
                if line.startswith("/"):
                    obey(conversation, console, line)
                elif line:
                    answer(conversation, printer, line, interrupts)
            except FusionError as error:
                console.print(str(error), soft_wrap=True)


class Interrupts:
    """Ctrl-C as a KeyboardInterrupt, but while an answer comes as its `cancel`."""

    def __init__(self) -> None:
        self.cancel, self._answering = threading.Event(), False

    def __enter__(self) -> "Interrupts":
        self._previous = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    @contextmanager
    def answering(self) -> Iterator[threading.Event]:
        """An answer comes."""
        self.cancel.clear()
        self._answering = True
        try:
            yield self.cancel
        finally:
            self._answering = False

    def _interrupt(self, *_: object) -> None:
        if not self._answering:
            raise KeyboardInterrupt
        self.cancel.set()


def answer(conversation: Conversation, printer: TokenPrinter, line: str, interrupts: Interrupts) -> None:
    """Print the answer to a line as it comes."""
    with interrupts.answering() as cancel:
        for token in conversation.ask(line, cancel):
            printer.show(token)
    print(" …" if conversation.figures.finish == "length" else "")


def legend(printer: TokenPrinter) -> list[tuple[str, str]]:
    """The names of the experts in their colours."""
    return [(f"{name} ", style) for name, style in list(printer.styles.items())[:-1]]


def obey(conversation: Conversation, console: Terminal, line: str) -> None:
    """Carry out a line that begins with /. Raises InputError for one that is no command."""
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    takes: dict[str, Callable[[str], None]] = {
        "/save": lambda given: conversation.save(Path(given).expanduser()),
        "/load": lambda given: conversation.load(Path(given).expanduser()),
        "/expert": lambda given: conversation.choose_expert(None if given == "auto" else given),
        "/lambda": lambda given: conversation.choose_lambda(None if given == "auto" else number(given)),
        "/temperature": lambda given: conversation.choose_temperature(number(given)),
    }
    if name in takes:
        if not argument:
            raise InputError(f"{name} needs a value: /help shows which.")
        takes[name](argument)
    elif argument:
        raise InputError(
            f"{name} takes no value." if name in ("/reset", "/stats", "/help") else f"There is no {name}: /help lists commands."
        )
    elif name == "/reset":
        conversation.reset()
    elif name == "/stats":
        show_stats(conversation, console)
    elif name == "/help":
        console.print(HELP)
    else:
        raise InputError(f"There is no {name}: /help lists commands.")


def number(text: str) -> float:
    """Raises InputError for a text that is none."""
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f"'{text}' is no number.") from error


def show_stats(conversation: Conversation, console: Terminal) -> None:
    """What the last answer took."""
    figures = conversation.figures
    if not figures.tokens:
        console.print("There was no answer yet.")
        return
    shares = ", ".join(f"{name} {count / figures.tokens:.0%}" for name, count in figures.experts.most_common())
    drafts = f", {figures.accepted} of {figures.drafted} drafts held" if figures.drafted else ""
    console.print(
        f"{figures.prompt_tokens} tokens of conversation, first token after {figures.first:.2f} s, "
        f"{figures.tokens} tokens at {figures.speed:.1f}/s ({shares}){drafts}.",
        soft_wrap=True,
    )
