"""One rank of a calibration with a small table, for a test: `python -m quick_calibration FILE`."""

import sys

from distattn import calibrate
from distattn.launch.calibrate import rank_main

if __name__ == "__main__":
    calibrate._SIDES = {"cpu": (64, 128)}
    calibrate._HEAD_DIMS = (64,)
    calibrate._STRETCH = 0.005
    rank_main(sys.argv[1], "two")
