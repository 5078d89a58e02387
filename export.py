"""`python export.py --family gemma2` exports a FusionRoute system into a bundle: the same as `fusionroute export`."""

from fusionroute.fr_export.commands.main import run

if __name__ == "__main__":
    run("export")
