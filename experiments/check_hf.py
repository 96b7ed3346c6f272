"""Writes our logits for token ids by the model of a Hugging Face folder, and compares them with `transformers`.

    python -m experiments.check_hf --hf_folder=DIR --tokens=IDS.npy --logits=OUT.npz [--json]

IDS.npy holds T whole numbers; OUT.npz gets `logits`, float32 `[T, V]`. Where `transformers` is installed (the extra hf)
the difference at every position is printed: of the logits, as a part of the largest one, and of what comes first.
"""

from pathlib import Path

from moerec.config import cli
from moerec.errors import InputError


def main(_, flags) -> dict:
    """Computes, writes and compares."""
    from moerec.convert.compare import check_logits, read_tokens
    from moerec.train.base_model.hf_run import read_hf_model

    for name in ("hf_folder", "tokens", "logits"):
        if not getattr(flags, name):
            raise InputError(f"--{name} is missing")
    token_T, folder = read_tokens(Path(flags.tokens)), Path(flags.hf_folder)
    found = check_logits(read_hf_model(folder)[1], folder, token_T, Path(flags.logits))
    for row in found["positions"]:
        same = "" if row["same_first"] else "   another token comes first"
        print(f"{row['position']:8d} {row['gap']:12.3e}{same}")
    if found["positions"]:
        print(f"largest difference, in parts of the largest logit: {found['gap']:.3e}")
    else:
        print(f"{found['reason']}: not compared")
    return found


FLAGS = {
    "hf_folder": ("", "the folder of the model"),
    "tokens": ("", "a .npy file of T token ids"),
    "logits": ("", "the .npz file to write"),
}

if __name__ == "__main__":
    cli.run(main, extra_flags=FLAGS, config_type=None, workdir=False)
