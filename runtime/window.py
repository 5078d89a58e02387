"""What a manifest says of layers with a sliding window."""

from typing import Annotated

from pydantic import Field

from fusionroute.runtime.file_entry import Strict

Number = Annotated[int, Field(ge=0, lt=1 << 31)]


class Window(Strict):
    """Layers of a model whose tokens see the newest `tokens` ones at most. Their graph takes how much of the text it is
    given by inputs of their own, see `limits.WINDOW`.
    """

    tokens: Annotated[int, Field(ge=1, lt=1 << 31)]
    layers: Annotated[list[Number], Field(min_length=1)]
