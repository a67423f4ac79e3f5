"""python -m benchmarks: every benchmark, one after the other."""

from benchmarks import data_parallel, fine_tuning

if __name__ == "__main__":
    data_parallel.main()
    fine_tuning.main()
