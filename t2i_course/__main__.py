"""`python -m t2i_course` is `t2i`: what torchrun starts."""

import sys

from t2i_course.cli import main

if __name__ == "__main__":
    sys.exit(main())
