"""One rank of a run: `python -m distattn.launch.rank RUN true|false` (the last word: metrics as JSON lines)."""

import json
import signal
import sys

if __name__ == "__main__":
    # before the imports, which take seconds: Ctrl-C reaches every process of a terminal, and the launcher ends its ranks
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    from distattn.train import main

    sys.exit(main(sys.argv[1], json.loads(sys.argv[2])))
