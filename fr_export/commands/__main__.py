"""`python -m fusionroute` in a wheel, where this file is `fusionroute/__main__.py`; see .ci/wheel_layout.py."""

from fusionroute.fr_export.commands.main import main

if __name__ == "__main__":
    main()
