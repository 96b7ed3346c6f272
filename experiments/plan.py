"""Compiles the training step for a TPU slice that is not there: whether it fits, and how fast it can be at best.

python -m experiments.plan --config=configs/city_moe.py --topology=v5e:2x2 --config.train.mesh_data=4 [--json]

Exit code 1 where it does not fit. It needs libtpu: pip install 'moerec[plan]'.
"""

import dataclasses
import tempfile
from pathlib import Path

from moerec.config import cli
from moerec.errors import InputError

FLAGS = {"topology": ("", "kind of chip (v4, v5e, v5p, v6e) and sides of the slice, e.g. v5p:4x4x4")}


def main(config, flags):
    """Prints the plan."""
    from moerec.config.stored import read_config
    from moerec.data.load import load_data
    from moerec.nn.model import TEXT_SIZES
    from moerec.train.plan import describe_mesh, format_plan, parse_topology, plan_step
    from moerec.train.run_dir import make_sizes

    if not flags.topology:
        raise InputError("--topology is missing, e.g. --topology=v5e:2x2")
    topology = parse_topology(flags.topology)
    mesh = describe_mesh(topology, config)
    if config.data.source == "text":
        sizes = TEXT_SIZES
    else:
        with tempfile.TemporaryDirectory() as folder:
            sizes = make_sizes(config, load_data(config.data, Path(flags.workdir or folder)))
        if config.data.item_states:  # of the states only the width counts
            width = read_config(Path(config.data.item_states) / "config.json").model.d_model
            sizes = dataclasses.replace(sizes, d_states=width)
    found = plan_step(config, sizes, topology, mesh)
    print(format_plan(found))
    return found


if __name__ == "__main__":
    cli.run(main, "configs/city_moe.py", FLAGS, workdir=False, keep_programs=False)
