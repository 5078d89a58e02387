"""A forecast on a terminal."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from fusionroute.runtime.tables import size, tables


def show_forecast(console: Console, forecast: dict[str, Any], out: Path) -> None:
    """Print what an export would read, write and take."""
    names = [source["model"] for source in forecast["sources"]]
    console.print(Text(f"{forecast['family']}: {' + '.join(names)} → {out}, context {forecast['max_seq_len']:,} tokens"))
    sources = [
        (source["model"], source["kind"], f"{source['parameters']:,}", " ".join(source["dtypes"]), size(source["bytes"]))
        for source in forecast["sources"]
    ]
    console.print(*tables(console, "Sources", ("model", "kind"), ("values", "types", "size"), sources))
    for note in dict.fromkeys(note for source in forecast["sources"] for note in source["notes"]):
        console.print(Text(note))
    variants = [
        (variant["target"], variant["precision"], f"{variant['bits_per_weight']:.2f}", size(variant["bytes"]))
        for variant in forecast["variants"]
    ]
    console.print(*tables(console, "To be written", ("target", "precision"), ("bits", "size"), variants))
    stages = [(stage["name"], span(*stage["seconds"]), size(stage["peak_memory"])) for stage in forecast["stages"]]
    console.print(*tables(console, "Stages", ("stage",), ("time", "memory"), stages))
    least, most = forecast["peak_memory"]
    console.print(
        f"Disk: {size(forecast['disk_needed'])} needed, {size(forecast['disk_free'])} free. "
        f"Memory: {size(least)} to {size(most)} at the peak ({forecast['peak_stage']}), {size(forecast['memory_available'])} available. "
        f"Time: {span(*forecast['seconds'])}. {comparison(forecast['compared_tokens'])} Nothing was written."
    )
    if most > forecast["memory_available"]:
        console.print("[yellow]Memory may not suffice: end other programs, add swap, or export on a larger machine.")


def span(least: float, most: float) -> str:
    """A range of seconds for people: 2 to 8 min."""
    unit, name = next((each for each in ((3600.0, "h"), (60.0, "min")) if most >= 2 * each[0]), (1.0, "s"))
    return f"{least / unit:.2g} to {most / unit:.2g} {name}"


def comparison(tokens: int) -> str:
    """What is compared with torch."""
    return f"Each precision is compared with torch on {tokens} tokens." if tokens else "Nothing is compared with torch."
