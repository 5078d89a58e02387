"""For pytest: `-p tests.support.host_cuda.plugin` puts CUDA on the host in place before torch imports the binding.

`FUSIONROUTE_HOST_CUDA` names the library that `install.compile_library` has written.
"""

import os
from pathlib import Path

from tests.support.host_cuda.install import install

LIBRARY = install(Path(os.environ["FUSIONROUTE_HOST_CUDA"]))
