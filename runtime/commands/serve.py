"""`fusionroute serve`: a bundle behind OpenAI's protocol."""

from dataclasses import replace
from typing import Annotated, Literal

import typer

from fusionroute.runtime.bundle import Bundle
from fusionroute.runtime.commands.options import BundleFolder, Debug, Device, ExpertMemory, Trust, VerifyKey, in_bytes, names
from fusionroute.runtime.engine import FusionRuntime
from fusionroute.runtime.errors import UnavailableError
from fusionroute.runtime.serve.server import bound
from fusionroute.runtime.serve.server import serve as listen
from fusionroute.runtime.serve.settings import Settings, session_bytes, sessions_within


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
    sessions: Annotated[int | None, typer.Option(min=1, help="Texts at once; default: as many as --memory has room for.")] = None,
    memory: Annotated[
        int | None, typer.Option(min=1, help="MiB for keys and values; default: half of what is free, for 16 texts at most.")
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
    count = sessions or sessions_within(None if memory is None else memory << 20, each)
    with bound(settings) as listening:  # before the models are loaded
        texts = -(-count // len(asked))  # that each runtime keeps
        runtimes = [
            FusionRuntime.load(
                bundle,
                each,
                device,
                speculation=speculation,
                threads=threads,
                prefix_cache=texts,
                expert_memory=in_bytes(expert_memory),
                verify_key=verify_key,
                trusted=trust,
            )
            for each in asked
        ]
        listen(runtimes, replace(settings, sessions=count), listening)
