"""Without a GPU the tests of this folder run kernels in Numba's simulator, which has to be asked for before Numba is
imported. PTX is compiled by processes of their own, in which the simulator is off (`ptx.py`).

`KGRAPH_TEST_DEVICE=cuda` runs what is derived from records and models on a GPU instead (`benchmarks.gpu` does so),
`KGRAPH_TEST_DEVICE=cuda-emulator` on one that is emulated down to the instructions of PTX (`emulator`).
"""

import os
import sys

if os.environ.get("KGRAPH_TEST_DEVICE", "cuda-simulator") == "cuda-simulator":
    os.environ["NUMBA_ENABLE_CUDASIM"] = "1"
    if "numba" in sys.modules:
        sys.modules["numba"].core.config.reload_config()
