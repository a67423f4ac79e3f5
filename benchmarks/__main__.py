"""python -m benchmarks: every benchmark, one after the other."""

from benchmarks import fine_tuning

if __name__ == "__main__":
    fine_tuning.main()
