__version__ = "0.1.0"

# A thread of OpenMP that waits for the next piece of work spins; libgomp's default spins so long that two
# threads of torch crawl beside another program. It reads the setting once, when torch loads: here is before
# that. What the user set stays.
import os as _os

if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & _os.environ.keys():
    _os.environ["GOMP_SPINCOUNT"] = "10000"
