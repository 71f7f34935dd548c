"""Without a GPU the tests of this folder run kernels in Numba's simulator, which has to be asked for before Numba is
imported. PTX is compiled by processes of their own, in which the simulator is off (`ptx.py`)."""

import os
import sys

os.environ["NUMBA_ENABLE_CUDASIM"] = "1"
if "numba" in sys.modules:
    sys.modules["numba"].core.config.reload_config()
