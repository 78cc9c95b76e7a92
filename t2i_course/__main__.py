"""`python -m t2i_course` is `t2i`: what torchrun starts."""

import os
import sys

from t2i_course.cli import main

if __name__ == "__main__":
    code = main()
    if "RANK" in os.environ:  # all is written; on the way out, threads of a process group now and then abort
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
