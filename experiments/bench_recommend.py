"""Times warm requests to a run in which services are asked: all of them, and the most probable ones.

python -m experiments.bench_recommend --workdir=runs/demo [--requests=100] [--mass=.99] [--json]

Prints medians and 95th percentiles in milliseconds, the mean number of services asked, and the ratio of the medians.
"""

from pathlib import Path

from moerec.config import cli


def main(_, flags):
    """Measures both in turn."""
    from moerec.serve.bench import bench_recommend
    from moerec.train.run_dir import load_run

    found = bench_recommend(load_run(Path(flags.workdir)), flags.requests, flags.mass)
    for name, label in (("all", "all asked"), ("mass", f"mass {flags.mass:g}")):
        print(f"{label:<12s} p50 {found[name]['p50_ms']:7.2f} ms   p95 {found[name]['p95_ms']:7.2f} ms")
    n_asked = f"{found['services_asked']:.1f} of {found['services']} services asked"
    print(f"{n_asked}; ratio of the medians {found['ratio']:.2f}")
    return found


FLAGS = {
    "requests": (100, "requests measured"),
    "mass": (0.99, "of the posterior, that the services asked have together"),
}

if __name__ == "__main__":
    cli.run(main, extra_flags=FLAGS, config_type=None)
