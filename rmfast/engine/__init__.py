"""Running texts: the planner, packed and padded runs, and the `Scorer` that workloads stand on."""
