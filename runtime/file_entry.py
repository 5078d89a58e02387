"""What the manifest says of each file of the bundle."""

from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

LARGEST = (1 << 63) - 1
Size = Annotated[int, Field(ge=0, le=LARGEST)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def inside(path: str) -> str:
    """A relative path that stays in the bundle, in its only spelling, that terminals can show."""
    pure = PurePosixPath(path)
    if not pure.parts or pure.is_absolute() or str(pure) != path or ".." in pure.parts or {*"\\:"} & {*path} or not path.isprintable():
        raise ValueError(f"{path!r} is not a path inside the bundle")
    return path


InsidePath = Annotated[str, AfterValidator(inside)]


class Strict(BaseModel):
    """Unknown fields are errors: an old runtime must not misread a newer bundle."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Tensor(Strict):
    """The bytes of one weight in a weight file."""

    sha256: Sha256
    offset: Size
    bytes: Size


class File(Strict):
    """Integrity of one file of the bundle. A weight file lists its tensors, in the order of their offsets."""

    sha256: Sha256
    bytes: Size
    tensors: list[Tensor] = []

    @model_validator(mode="after")
    def hold_its_tensors(self) -> "File":
        """Check that tensors lie in the file and do not overlap."""
        end = 0
        for tensor in self.tensors:
            if tensor.offset < end:
                raise ValueError(f"the tensor {tensor.sha256} begins at byte {tensor.offset}, inside the one before it")
            end = tensor.offset + tensor.bytes
        if end > self.bytes:
            raise ValueError(f"its tensors end at byte {end}, and it has {self.bytes}")
        return self

    @model_serializer(mode="wrap")
    def without_empty_fields(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave `tensors` out of files that have none: older versions read manifests of format 1."""
        fields: dict[str, Any] = serialise(self)
        return fields if self.tensors else {name: value for name, value in fields.items() if name != "tensors"}
