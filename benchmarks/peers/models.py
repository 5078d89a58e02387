"""The models of the peers, built once in a work folder."""

import shutil
import subprocess
from pathlib import Path

from benchmarks.peers.environments import ENVIRONMENTS, Peer, python
from benchmarks.peers.process import PeerError, environment

MARKER = "made.txt"  # in a folder whose model is complete: the checkpoint and the packages that it was built from


def model_folder(work: Path, peer: Peer, form: str, checkpoint: Path, bundle: Path) -> Path:
    """What a peer loads: the bundle, the checkpoint (torch), or a folder that the peer builds at first use.

    Raises PeerError.
    """
    if peer.environment is None:
        return bundle
    if peer.environment == "torch":
        return checkpoint
    name = f"{peer.module}-{form.replace(' ', '-')}-{checkpoint.name}"
    folder, partial, log = work / "models" / name, work / "models" / f"{name}.partial", work / "log" / f"build-{name}.txt"
    marker, state = folder / MARKER, "\n".join((str(checkpoint.resolve()), *ENVIRONMENTS[peer.environment]))
    if marker.is_file() and marker.read_text() == state:
        return folder
    for old in (folder, partial):
        shutil.rmtree(old, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        command: list[str | Path] = [
            python(work, peer.environment),
            "-m",
            f"benchmarks.peers.{peer.module}",
            "build",
            checkpoint,
            form,
            partial,
        ]
        if subprocess.run(command, env=environment(), stdout=out, stderr=out).returncode:
            raise PeerError(f"{peer.name} could not make its model {form} of {checkpoint}: see {log}")
    (partial / MARKER).write_text(state)
    return partial.rename(folder)
