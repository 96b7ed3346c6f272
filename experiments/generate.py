"""Goes on with prompts by the language model of a run or of a Hugging Face folder.

    python -m experiments.generate --workdir=RUN|--hf_folder=DIR --prompt=TEXT [--prompt=TEXT …] [--prompts=FILE]
        [--chat] [--max_new_tokens=64] [--temperature=0] [--top_k=0] [--top_p=1] [--stop=TOKEN …] [--seed=0] [--stream]
        [--user=NAME …] [--dtype=bfloat16] [--quantize=int8] [--mesh=1,1,1] [--json]

FILE has a prompt a line, or (`.jsonl`) an object a line with `prompt` or `messages`. What is typed is text, even if it
spells a control token; with `--chat` it is a user's message in the folder's template. Answers end at the stop tokens of
the folder and at those of `--stop`. With `--user` prompts stand behind what a user of the run did. With
`--temperature=0` the most probable token is taken. `--json` prints `text`, `tokens`, `finish` and `tokens_per_s`
(without compilation), of several prompts as a list `answers`.
"""

import sys

from moerec.config import cli
from moerec.errors import InputError


def main(_, flags) -> dict:
    """Prints what follows each prompt."""
    from moerec.serve.generate.sampling import Sampling
    from moerec.serve.generate.speaker import load_speaker, read_prompts

    sampling = Sampling(flags.temperature, flags.top_k, flags.top_p, flags.seed)
    prompts = read_prompts(flags.prompt, flags.prompts)
    n = max(len(prompts), len(flags.user))
    if flags.stream and n > 1:
        raise InputError(f"--stream: one prompt is needed, not {n}")
    if len(flags.mesh) != 3 or not all(n.isdecimal() and int(n) for n in flags.mesh):
        raise InputError("--mesh: three numbers of devices are needed, of the axes data, expert and model")
    mesh = int(flags.mesh[0]), int(flags.mesh[1]), int(flags.mesh[2])
    speaker = load_speaker(flags.workdir or "", flags.hf_folder, flags.dtype, flags.quantize, mesh, bool(flags.user))
    write = (lambda text: print(text, end="", flush=True)) if flags.stream else None
    found = speaker.answer(prompts, flags.max_new_tokens, sampling, flags.stop, flags.chat, write, flags.user)
    print("" if flags.stream else "\n\n".join(answer["text"] for answer in found.get("answers", [found])))
    print(f"{found['tokens_per_s']:,.1f} tokens/s", file=sys.stderr)
    return found


FLAGS = {
    "hf_folder": ("", "the folder of a model: config.json, weights (.safetensors), tokenizer"),
    "prompt": ((), "a text to go on with; may be given several times"),
    "prompts": ("", "a file with a prompt a line, or (.jsonl) an object a line with prompt or messages"),
    "user": ((), "behind whose events prompts stand; may be given several times, as often as prompts or to one prompt"),
    "chat": (False, "prompts are a user's messages, in the chat template of the model"),
    "max_new_tokens": (64, "tokens of an answer at most"),
    "temperature": (0.0, "0 takes the most probable token; 1 draws by the model's probabilities"),
    "top_k": (0, "of the most probable tokens so many may be drawn; 0 is all"),
    "top_p": (1.0, "of these the fewest that together have this probability"),
    "stop": ((), "a token at which an answer ends, beside the model's own; may be given several times"),
    "seed": (0, "of the numbers that tokens are drawn by"),
    "stream": (False, "prints the text as it comes"),
    "dtype": ("", "float32 or bfloat16, in which it computes; as the model says by default"),
    "quantize": ("", "int8: weights are whole numbers of a byte"),
    "mesh": (["1", "1", "1"], "devices of the axes data, expert and model that rows and weights are split over"),
}

if __name__ == "__main__":
    cli.run(main, extra_flags=FLAGS, config_type=None, workdir=False)
