"""moerec: a multi-expert personalised language model that recommends across services."""

import glob
import os

__version__ = "0.1.0"

# libtpu compiles for TPUs on any machine; where there is none, JAX would ask the network for one and tell at length
# that nobody answered. It does so when it is imported, so this comes first.
if not glob.glob("/dev/accel*") and not glob.glob("/dev/vfio/*"):
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
