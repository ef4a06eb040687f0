"""`python -m tensorwire_server.workers`: one worker process."""

import sys

from tensorwire_server.workers.entry import main

if __name__ == "__main__":
    sys.exit(main())
