"""Writes the language model of a run as a Hugging Face folder, which `transformers` loads.

    python -m experiments.export_hf --workdir=RUN --hf_folder=DIR [--dtype=bfloat16] [--json]

Of a model that was imported, the tensors have the names, types and files that they came in, and tokenizer, chat
template and generation config are kept. Exit code 2 says why a model cannot be written in this layout.
"""

from pathlib import Path

from moerec.config import cli
from moerec.errors import InputError


def main(_, flags) -> dict:
    """Exports the run and says what was written, and what was left out."""
    from moerec.train.base_model.hf_export import export_run

    if not flags.hf_folder:
        raise InputError("--hf_folder is missing: the folder to write")
    found = export_run(Path(flags.workdir), Path(flags.hf_folder), flags.dtype)
    print(f"{flags.hf_folder}: {found['n_tensors']} tensors, {found['n_bytes']:,} bytes, {', '.join(found['dtypes'])}")
    if found["left_out"]:
        print(f"left out, having no place there: {', '.join(found['left_out'])}")
    return found


FLAGS = {
    "hf_folder": ("", "the folder to write, new or empty"),
    "dtype": ("", "float32, bfloat16 or float16; by default as the model came, else float32"),
}

if __name__ == "__main__":
    cli.run(main, extra_flags=FLAGS, config_type=None)
