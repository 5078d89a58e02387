"""Use the runtime from a Python program: stream tokens with their experts, and stop in time.

python examples/stream.py dist/gemma2 "12+30="
"""

import math
import sys

from fusionroute.runtime import FusionError, FusionRuntime


def main(bundle: str, prompt: str, seconds: float = 10.0) -> None:
    """Print the tokens of an answer as they come, for at most `seconds`."""
    with FusionRuntime.load(bundle) as rt:
        stream = rt.stream(prompt, max_new_tokens=64, deadline=seconds)
        for token in stream:
            print(f"{token.text!r:>12}  {token.expert:<12} p = {math.exp(token.logprob):.2f}")
        print(f"ended by {stream.finish_reason}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/stream.py BUNDLE PROMPT")
    try:
        main(sys.argv[1], sys.argv[2])
    except FusionError as error:
        sys.exit(f"error: {error}")
