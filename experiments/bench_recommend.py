"""Times warm answers of a run: single requests, with all services asked and with the most probable ones, and lists.

python -m experiments.bench_recommend --workdir=runs/demo [--requests=100] [--users=1024] [--mass=.99] [--json]

Prints medians and 95th percentiles in milliseconds of one user's request, as `experiments.recommend` asks it and by the
library, and users a second of lists for many.
"""

from moerec.config import cli


def main(_, flags):
    """Measures them in turn."""
    from moerec.serve.bench import bench_recommend
    from moerec.train.run_dir import load_run

    found = bench_recommend(load_run(flags.workdir), flags.requests, flags.mass, flags.users)
    for name, label in (("explained", "explained"), ("mass", f"mass {flags.mass:g}"), ("library", "library")):
        if name in found:
            print(f"{label:<12s} p50 {found[name]['p50_ms']:7.2f} ms   p95 {found[name]['p95_ms']:7.2f} ms")
    if "ratio" in found:
        n_asked = f"{found['services_asked']:.1f} of {found['services']} services asked"
        print(f"mass: {n_asked}; ratio of the medians {found['ratio']:.2f}")
    lists = found["lists"]
    print(f"lists: {lists['users_per_s']:,.0f} users/s ({lists['n_users']:,} users, {found['n_items']:,} items)")
    return found


FLAGS = {
    "requests": (100, "requests measured"),
    "users": (1024, "users of the lists"),
    "mass": (0.99, "of the posterior, that the services asked have together"),
}

if __name__ == "__main__":
    cli.run(main, extra_flags=FLAGS, config_type=None)
