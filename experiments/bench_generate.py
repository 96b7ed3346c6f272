"""Measures prefill and decode in tokens a second, on an otherwise idle machine.

    python -m experiments.bench_generate [--hf_folder=DIR] [--batches=1,16] [--prompt_tokens=128] [--new_tokens=128]
        [--weights=float32,bfloat16,int8] [--json]

By default a random Qwen2 of 25 million parameters. Beside it `transformers.generate` (the extra hf): the same weights,
type, threads, prompts and number of tokens, greedily, in turn; the shortest of three times counts. `limit` is what a
step of batch 1 would take if reading the weights at the machine's measured bandwidth were all, over what it takes.
"""

from pathlib import Path

from moerec.config import cli
from moerec.errors import InputError


def main(_, flags):
    """Prints a line for each type of weights and batch."""
    from moerec.serve.generate.bench import OPTIONS, bench_generate

    for name in ("batches", "weights"):
        if not getattr(flags, name):
            raise InputError(f"--{name}: at least one is needed")
    bad = [n for n in flags.batches if not n.isdecimal() or not int(n)]
    if bad:
        raise InputError(f"--batches: {bad[0]!r} is no number of prompts")
    unknown = [name for name in flags.weights if name not in OPTIONS]
    if unknown:
        raise InputError(f"--weights: {unknown[0]!r} is none of {', '.join(OPTIONS)}")
    if flags.prompt_tokens < 1 or flags.new_tokens < 2:
        raise InputError("--new_tokens: at least 2 are needed, and of --prompt_tokens 1")
    folder = Path(flags.hf_folder) if flags.hf_folder else None
    sizes = flags.prompt_tokens, flags.new_tokens
    found = bench_generate(folder, [int(n) for n in flags.batches], *sizes, flags.weights)
    for row in found["rows"]:
        line = f"{row['weights']:9s} batch {row['batch']:3d}  prefill {row['prefill_tokens_per_s']:9,.0f}/s"
        line += f"  decode {row['decode_tokens_per_s']:8,.1f}/s  limit {row['limit_share']:.2f}"
        if "decode_ratio" in row:
            theirs = row["torch_prefill_tokens_per_s"], row["torch_decode_tokens_per_s"]
            line += f"  torch {theirs[0]:9,.0f}/s and {theirs[1]:8,.1f}/s"
            line += f"  ratios {row['prefill_ratio']:.2f} and {row['decode_ratio']:.2f}"
        print(f"{line}  {row['mb']:,.0f} MB, {row['n_compiled']} programs")
    threads = "" if found["threads"] is None else f"; torch has {found['threads']} threads"
    print(f"memory bandwidth {found['bandwidth'] / 1e9:.1f} GB/s{threads}")
    return found


FLAGS = {
    "hf_folder": ("", "the folder of a model; a random one of 25 million parameters by default"),
    "batches": (["1", "16"], "prompts at once"),
    "prompt_tokens": (128, "tokens of a prompt"),
    "new_tokens": (128, "tokens of an answer"),
    "weights": (["float32", "bfloat16", "int8"], "types of the weights"),
}

if __name__ == "__main__":
    cli.run(main, extra_flags=FLAGS, config_type=None, workdir=False)
