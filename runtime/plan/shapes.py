"""The sizes of published models, by family: how many values a checkpoint has, and how many a token passes."""

from __future__ import annotations

from dataclasses import dataclass, fields

from fusionroute.runtime.errors import InputError
from fusionroute.runtime.plan.data_files import read


@dataclass(frozen=True)
class Shape:
    """One published size of a family. `name`: the model that has it; `context`: tokens that it was trained for.

    Counts are of values. `layer_vectors`: of norms and biases in a layer; `tied`: whether the head is the embedding;
    `parameters`: of the whole checkpoint.
    """

    family: str
    size: str
    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocab: int
    tied: bool
    context: int
    layer_vectors: int
    parameters: int
    source: str

    @property
    def body(self) -> int:
        """Values of the layers' matrices."""
        heads = self.heads + 2 * self.kv_heads
        return self.layers * self.hidden * ((heads + self.heads) * self.head_size + 3 * self.intermediate)

    @property
    def head(self) -> int:
        """Values of the head, and of the embedding."""
        return self.vocab * self.hidden

    @property
    def vectors(self) -> int:
        """Values of all norms and biases."""
        return self.layers * self.layer_vectors + self.hidden

    @property
    def sides(self) -> int:
        """Rows and columns of the matrices of all layers together: a rank costs so many values."""
        rows_and_columns = 4 * self.hidden + 2 * (self.heads + self.kv_heads) * self.head_size + 3 * (self.hidden + self.intermediate)
        return self.layers * rows_and_columns

    @property
    def kv_values(self) -> int:
        """Values of keys and values for one token of the text."""
        return 2 * self.layers * self.kv_heads * self.head_size


def shapes() -> tuple[Shape, ...]:
    """All known sizes."""
    names = [field.name for field in fields(Shape)]
    return tuple(Shape(**{name: entry[name] for name in names}) for entry in read("models"))


def shape_of(family: str, size: str) -> Shape:
    """A family's published size, such as 8B. Raises InputError, which lists what is known."""
    of_family = [shape for shape in shapes() if shape.family == family]
    if not of_family:
        families = ", ".join(dict.fromkeys(shape.family for shape in shapes()))
        raise InputError(f"The family '{family}' has no known sizes: use one of {families}, or plan an exported bundle.")
    for shape in of_family:
        if shape.size.lower() == size.lower():
            return shape
    sizes = ", ".join(f"{shape.size} ({shape.name})" for shape in of_family)
    raise InputError(f"The size '{size}' of family {family} is not known: use one of {sizes}, or plan an exported bundle.")
