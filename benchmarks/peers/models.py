"""The models of the peers, made once in a work folder."""

import shutil
import subprocess
from pathlib import Path

from peers.environments import ENVIRONMENTS, Peer, python
from peers.process import PeerError, environment


def model(work: Path, peer: Peer, form: str, checkpoint: Path, bundle: Path) -> Path:
    """The folder that a peer loads: the bundle, the checkpoint (torch), or one that the peer makes at first use. Raises PeerError."""
    if peer.environment is None:
        return bundle
    if peer.environment == "torch":
        return checkpoint
    name = f"{peer.module}-{form.replace(' ', '-')}-{checkpoint.name}"
    folder, partial, log = work / "models" / name, work / "models" / f"{name}.partial", work / "log" / f"build-{name}.txt"
    made, state = folder / "made.txt", "\n".join((str(checkpoint.resolve()), *ENVIRONMENTS[peer.environment]))
    if made.is_file() and made.read_text() == state:
        return folder
    for old in (folder, partial):
        shutil.rmtree(old, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        command = [python(work, peer.environment), "-m", f"peers.{peer.module}", "build", checkpoint, form, partial]
        if subprocess.run(command, env=environment(), stdout=out, stderr=out).returncode:
            raise PeerError(f"{peer.name} could not make its model {form} of {checkpoint}: see {log}")
    (partial / "made.txt").write_text(state)
    return partial.rename(folder)
