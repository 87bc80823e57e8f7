"""`python -m fastdllm`: the same command as `fastdllm`."""

import sys

from fastdllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
