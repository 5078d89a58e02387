"""The options of `FusionRuntime.load`, checked before anything is opened, and the weights of the fusion."""

from dataclasses import dataclass
from numbers import Integral, Real

from fusionroute.runtime.arguments import flag, shown, text
from fusionroute.runtime.errors import InputError

FUSIONS = ("weighted", "additive")
SPECULATION_MODES = ("off", "auto")
CATCH_UP_MODES = ("lazy", "background")
EXPERT_FAILURES = ("raise", "router_only")
MOST_THREADS = 1024  # more than machines have cores; each takes memory
MOST = (1 << 63) - 1


@dataclass(frozen=True)
class RuntimeOptions:
    """The options of `FusionRuntime.load`, where their meaning stands.

    Raises InputError for a value that is out of its range.
    """

    precision: str | None = None
    device: str = "auto"
    fusion: str | None = None  # None: as exported
    lam: float | None = None  # None: as exported
    catch_up: str = "lazy"
    speculation: str = "off"
    exact: bool = False
    threads: int | None = None  # None: all cores; here and below a whole float such as 2.0 is taken as an int
    expert_memory: int | None = None  # bytes; None: no limit
    kv_memory: int | None = None  # bytes; None: no limit
    prefix_cache: int = 1  # texts; True: 1, False: 0
    share_weights: bool = False
    on_expert_failure: str = "raise"

    def __post_init__(self) -> None:
        for name in ("exact", "share_weights"):
            flag(name, getattr(self, name))
        if self.precision is not None:
            text("precision", self.precision)
        if isinstance(self.fusion, str) and not self.fusion:  # "" means None too, as in `generate`
            object.__setattr__(self, "fusion", None)
        check_fusion(self.fusion, self.lam)
        if self.catch_up not in CATCH_UP_MODES:
            raise InputError(f"Unknown catch_up {shown(self.catch_up)}: use 'lazy' or 'background'.")
        if self.catch_up == "background" and self.expert_memory is not None:
            raise InputError("catch_up='background' would move all experts' weights in turn, which expert_memory limits: use 'lazy'.")
        if self.speculation not in SPECULATION_MODES:
            raise InputError(f"Unknown speculation {shown(self.speculation)}: use 'off' or 'auto'.")
        if self.on_expert_failure not in EXPERT_FAILURES:
            raise InputError(f"Unknown on_expert_failure {shown(self.on_expert_failure)}: use 'raise' or 'router_only'.")
        if isinstance(self.prefix_cache, bool):
            object.__setattr__(self, "prefix_cache", int(self.prefix_cache))
        self._make_whole("prefix_cache", 0, MOST, "expected the number of texts to keep, or 0 for none")
        if self.threads is not None:
            self._make_whole("threads", 1, MOST_THREADS, f"expected 1 to {MOST_THREADS}, or None for all cores")
        for name in ("expert_memory", "kv_memory"):
            if getattr(self, name) is not None:
                self._make_whole(name, 1, MOST, "expected a number of bytes, or None for no limit")

    def _make_whole(self, name: str, least: int, most: int, expected: str) -> None:
        """Turn an option into an int. Raises InputError unless it is a whole number from `least` to `most`."""
        value = getattr(self, name)
        whole = isinstance(value, Integral) or (isinstance(value, Real) and value % 1 == 0)
        if isinstance(value, bool) or not whole or not least <= value <= most:
            raise InputError(f"{name}={shown(value)} is out of range: {expected}.")
        object.__setattr__(self, name, int(value))


def fusion_or(fusion: str | None, default: str) -> str:
    """A fusion, or the default for None and "". What is none is left to `check_fusion`: an array has no truth value."""
    return default if fusion is None or (isinstance(fusion, str) and not fusion) else fusion


def check_fusion(fusion: str | None, lam: float | None) -> None:
    """Raise InputError for an unknown fusion, or a λ that is no number from 0 to 1.

    None stands for a value given elsewhere.
    """
    if fusion is not None and (not isinstance(fusion, str) or fusion not in FUSIONS):
        raise InputError(f"Unknown fusion {shown(fusion)}: use 'weighted' or 'additive'.")
    number: object = lam  # callers without a type checker pass anything
    if lam is not None and not (not isinstance(number, bool) and isinstance(number, Real) and 0.0 <= lam <= 1.0):
        raise InputError(f"lam={shown(lam)} is out of range: expected a number from 0 (expert only) to 1 (router only).")


def fusion_coefficients(fusion: str, lam: float) -> tuple[float, float]:
    """Weights of router and expert logits: (λ, 1 − λ) for `weighted`, (1, 1) for `additive`. Raises InputError."""
    check_fusion(fusion, lam)
    return (lam, 1.0 - lam) if fusion == "weighted" else (1.0, 1.0)
