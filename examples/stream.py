"""Use the runtime from a Python program: stream text as it is made, see the expert of each token, stop in time.

python examples/stream.py dist/gemma2 "12+30="
"""

import sys

from fusionroute.runtime import FusionError, FusionRuntime


def main(bundle: str, prompt: str, seconds: float = 10.0) -> None:
    """Stream an answer for at most so many seconds."""
    with FusionRuntime.load(bundle) as rt:
        stream = rt.stream(prompt, max_new_tokens=64, deadline=seconds)
        for token in stream:
            print(f"{token.text!r:>12}  {token.expert:<12} p = {2.718281828**token.logprob:.2f}")
        print(f"ended by {stream.finish_reason}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:3])
    except FusionError as error:
        sys.exit(f"error: {error}")
