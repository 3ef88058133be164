"""One rank of a run: `python -m distattn.launch.rank RUN true|false` (the last word: metrics as JSON lines)."""

import json
import signal
import sys

if __name__ == "__main__":
    # before the imports, which take seconds: Ctrl-C ends a rank at once and silently, the launcher says the sentence
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    from distattn.train import main

    sys.exit(main(sys.argv[1], json.loads(sys.argv[2])))
