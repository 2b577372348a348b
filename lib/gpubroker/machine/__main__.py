"""The program of a supervisor: `python -I -S __main__.py FOLDER`. It inherits no environment and needs none."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from gpubroker.machine.supervisor import main

if __name__ == "__main__":
    main(sys.argv[1])
