"""Makes a run of a Hugging Face folder: Qwen2, Qwen2.5, a Llama without biases, or Qwen2-MoE.

    python -m experiments.import_hf --hf_folder=DIR --workdir=RUN [--mesh=1,1,1] [--json]

Training begins with it by `--config.train.init_from=RUN`. Exit code 2 names the file, tensor or field that is wrong
with the folder; nothing is written then.
"""

from pathlib import Path

from moerec.config import cli
from moerec.errors import InputError


def main(_, flags) -> dict:
    """Imports the folder and says what is there."""
    from moerec.train.base_model.hf_run import import_run

    if not flags.hf_folder:
        raise InputError("--hf_folder is missing: the folder of the model")
    if len(flags.mesh) != 3 or not all(n.isdecimal() and int(n) for n in flags.mesh):
        raise InputError("--mesh: three numbers of devices are needed, of the axes data, expert and model")
    data, expert, model = map(int, flags.mesh)
    metrics = import_run(Path(flags.hf_folder), Path(flags.workdir), (data, expert, model))
    imported = metrics["imported"]
    size = f"{metrics['n_params']:,} parameters, {metrics['n_active_params']:,} of them active"
    print(f"{flags.workdir}: {size}; {imported['n_tensors']} tensors, {', '.join(imported['dtypes'])}")
    print(f"in a config of another shape: {imported['shape_flags']}")
    return {name: metrics[name] for name in ("n_params", "n_active_params", "imported")}


FLAGS = {
    "hf_folder": ("", "the folder of the model: config.json, weights (.safetensors), tokenizer"),
    "mesh": (["1", "1", "1"], "devices of the axes data, expert and model that the parameters are split over"),
}

if __name__ == "__main__":
    cli.run(main, extra_flags=FLAGS, config_type=None)
