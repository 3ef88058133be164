"""Runs one rank of a calibration with a small table for a test: `python -m quick_calibration FILE`."""

import sys

from distattn.launch.calibrate_command import rank_main
from distattn.planning import measure_machine as calibrate

if __name__ == "__main__":
    calibrate._SIDES = {"cpu": (64, 128)}
    calibrate._HEAD_DIMS = (64,)
    calibrate._BATCH_SECONDS = 0.005
    rank_main(sys.argv[1], "two")
