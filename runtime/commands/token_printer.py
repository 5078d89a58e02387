"""Generated tokens on a terminal, in the colours of their experts."""

import sys

from rich.console import COLOR_SYSTEMS
from rich.style import Style

from fusionroute.runtime.engine import FusionRuntime
from fusionroute.runtime.terminal import Terminal, streamed
from fusionroute.runtime.text import Token

COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red", "bright_cyan", "bright_magenta")


class TokenPrinter:
    """Prints each token as it comes. `styles`: the colour of each expert, and of the router."""

    def __init__(self, runtime: FusionRuntime, console: Terminal, coloured: bool):
        names = (*runtime.expert_names, runtime.bundle.manifest.models[0].name)  # the router may answer for an expert that fails
        self.styles = dict(zip(names, COLOURS * len(names), strict=False))
        self._colours = COLOR_SYSTEMS[console.color_system] if console.color_system else None
        self._coloured, self._has_text = coloured, runtime.tokenizer is not None
        self._for_terminal = sys.stdout.isatty()  # else a program reads the text, as it is

    def show(self, token: Token) -> None:
        """Print one; not by the console, which would expand tabs and drop carriage returns."""
        text = token.text if self._has_text else f"{token.id} "
        if self._for_terminal:
            text = streamed(text)
        if self._coloured:
            text = Style.parse(self.styles[token.expert]).render(text, color_system=self._colours)
        print(text, end="", flush=True)
