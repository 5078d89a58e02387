"""What the manifest says of each file of the bundle."""

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from pydantic.dataclasses import dataclass

from fusionroute.runtime.digests import Digest

LARGEST = (1 << 63) - 1
Size = Annotated[int, Field(ge=0, le=LARGEST)]
Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # SHA-256 and BLAKE3 have 256 bits


def inside(path: str) -> str:
    """A relative path that stays in the bundle, in its only spelling, that terminals can show."""
    pure = PurePosixPath(path)
    if not pure.parts or pure.is_absolute() or str(pure) != path or ".." in pure.parts or {*"\\:"} & {*path} or not path.isprintable():
        raise ValueError(f"{path!r} is not a path inside the bundle")
    return path


InsidePath = Annotated[str, AfterValidator(inside)]


def visible(name: str) -> str:
    """A name that a terminal shows as it is."""
    if not name.isprintable():
        raise ValueError(f"{name!r} has characters that move cursors or end lines")
    return name


Name = Annotated[str, AfterValidator(visible)]  # reaches terminals and logs


class Strict(BaseModel):
    """Unknown fields are errors: an old runtime must not misread a newer bundle."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class Tensor:
    """The bytes of one weight in a weight file. There are thousands: one object each, and no more for the collector to visit."""

    sha256: Hash
    offset: Size
    bytes: Size


class File(Strict):
    """Integrity of one file of the bundle. A weight file lists its tensors, in the order of their offsets.

    `blake3`: None in bundles of formats before 5.
    """

    sha256: Hash
    blake3: Hash | None = None
    bytes: Size
    tensors: list[Tensor] = []

    @classmethod
    def of(cls, digest: Digest, tensors: Sequence[Tensor] = ()) -> "File":
        """The entry of a file that a digest of all hashes has read."""
        return cls(**digest.hexdigests, bytes=digest.bytes, tensors=list(tensors))

    @property
    def hashes(self) -> dict[str, str]:
        """Its hashes by name, the one that is checked most quickly last."""
        return {"sha256": self.sha256} | ({} if self.blake3 is None else {"blake3": self.blake3})

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
        """Leave out what a file does not have: versions that read older formats alone do not know it."""
        fields: dict[str, Any] = serialise(self)
        return {name: value for name, value in fields.items() if value or name not in ("blake3", "tensors")}
