"""`python -m calibration`: the same as `fusionroute calibrate`."""

from fusionroute.calibration.commands import VERB
from fusionroute.runtime.commands.verbs import run_verb

if __name__ == "__main__":
    run_verb("calibrate", VERB)
