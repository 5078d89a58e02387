"""`fusionroute serve`: a bundle behind OpenAI's protocol."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.commands.options import BundleFolder, Debug, Device, ExpertMemory, Trust, VerifyKey, in_bytes, names
from fusionroute.runtime.engine import FusionRuntime
from fusionroute.runtime.errors import UnavailableError
from fusionroute.runtime.serve.server import bound
from fusionroute.runtime.serve.server import serve as listen
from fusionroute.runtime.serve.settings import MOST_SESSIONS, Settings, kv_budget, session_bytes, sessions_within


def serve(
    bundle: BundleFolder,
    host: Annotated[str, typer.Option(help="Address to listen at; one that others reach needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    api_key: Annotated[str | None, typer.Option(envvar="FUSIONROUTE_API_KEY", help="Key that clients must send.", show_envvar=True)] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen without a key where other machines reach it.")] = False,
    cors: Annotated[list[str] | None, typer.Option(metavar="ORIGIN", help="Let pages of this origin call; repeat for several.")] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model; default: the folder's.")] = None,
    precision: Annotated[str | None, typer.Option(help="Comma list: requests may name one of them, else the first answers.")] = None,
    device: Device = "auto",
    speculation: Annotated[Literal["off", "auto"], typer.Option(help="auto: draft tokens ahead where that pays.")] = "off",
    sessions: Annotated[int | None, typer.Option(min=1, help="Texts at once; default: as many as --kv-memory has room for.")] = None,
    kv_memory: Annotated[
        int | None,
        typer.Option(
            "--kv-memory",
            "--memory",
            min=1,
            help="MiB of keys and values that all texts take at most; default: half of what is free, or with --sessions no bound.",
        ),
    ] = None,
    load: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A text that was saved: prompts that begin alike share it; repeat for several."),
    ] = None,
    expert_memory: ExpertMemory = None,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; others get status 429.")] = 64,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that a request may take.")] = 600.0,
    max_body: Annotated[int, typer.Option(min=1, help="KiB of a request at most.")] = 4096,
    drain: Annotated[float, typer.Option(min=0, help="Seconds that requests may go on after SIGTERM.")] = 30.0,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU; default: all cores.")] = None,
    verify_key: VerifyKey = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Serve a bundle to OpenAI's clients: /v1/chat/completions, /v1/completions, /v1/models, /tokenize, /health, /metrics."""
    settings = Settings(
        model or bundle.resolve().name, host, port, api_key or None, insecure, tuple(cors or ()),
        queue=queue, body_bytes=max_body << 10, seconds=timeout, drain_seconds=drain,
    )  # fmt: skip
    manifest = Bundle.open(bundle, verify_key).manifest
    asked = names(precision) if precision else (None,)
    known = dict.fromkeys(variant.precision for variant in manifest.variants)
    if wrong := [name for name in asked if name and name not in known]:
        raise UnavailableError(
            f"The bundle {bundle} has no precision '{wrong[0]}', only {', '.join(known)}: export it with --precision {wrong[0]}."
        )
    each = max(session_bytes(manifest, variant.precision) for variant in manifest.variants)
    budget = kv_budget(in_bytes(kv_memory), sessions)
    share = None if budget is None else max(1, budget // len(asked))  # of each runtime: all texts may be in one precision
    count = sessions or sessions_within(share, each, MOST_SESSIONS if kv_memory is None else None)
    with bound(settings) as listening:  # before the models are loaded
        texts = -(-count // len(asked))  # that each runtime keeps
        runtimes = [
            FusionRuntime.load(
                bundle,
                name,
                device,
                speculation=speculation,
                threads=threads,
                prefix_cache=texts,
                expert_memory=in_bytes(expert_memory),
                kv_memory=share,
                verify_key=verify_key,
                trusted=trust,
            )
            for name in asked
        ]
        loaded = [runtimes[0].session() for _ in load or ()]  # they lend to others for as long as they are here
        for session, file in zip(loaded, load or (), strict=True):
            session.load(file)
        listen(runtimes, replace(settings, sessions=count), listening)
