"""A folder or a run that goes on with texts: its model, tokenizer, chat template, stop tokens and context together."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moerec.convert.hf_config import read_shape
from moerec.convert.hf_folder import CONFIG_NAME
from moerec.data.text.chat_template import encode_chat, read_chat_template, read_template_tokens
from moerec.data.text.tokenizer import DecodeStream, TextTokenizer, read_stop_ids
from moerec.errors import InputError
from moerec.files import parse_json, read_json
from moerec.nn.sharding import make_mesh
from moerec.serve.generate.sampling import Sampling
from moerec.serve.generate.session import Generator
from moerec.serve.recommender.prompts import lay_prompts
from moerec.train.base_model.hf_run import TOKENIZER, find_origin, find_tokenizer, read_hf_model
from moerec.train.run_dir import Run, load_run
from moerec.types import Batch

ENDS = ("<|endoftext|>", "<|im_end|>")  # at which texts end by a tokenizer that was trained here
Prompt = str | list[dict[str, str]]  # a text, or the messages of a conversation


@dataclasses.dataclass(frozen=True)
class Speaker:
    """Attributes:
    place: for messages. generator: of the model. stop_ids: at which the model's texts end.
    template: for conversations, and what it knows; None where there is none. adds_special: whether the tokenizer's
      own beginning of texts (BOS) is put before prompts. run: whose users' events may stand before prompts, if any's.
    """

    place: Path
    generator: Generator
    tokenizer: TextTokenizer
    stop_ids: tuple[int, ...]
    template: str | None
    known: dict[str, Any]
    adds_special: bool
    run: Run | None = None

    def encode(self, prompt: Prompt, chat: bool, name: str) -> np.ndarray:
        """`[n]` int32 ids of a prompt, in which what is typed stands for no control token.

        Raises:
          InputError: it is empty; there is no chat template; it is a conversation, and `chat` is not asked for.
        """
        if not chat:
            if not isinstance(prompt, str):
                raise InputError(f"{name}: is a conversation, which needs --chat")
            ids = self.tokenizer.encode(prompt, add_special=self.adds_special)
            if not prompt or not len(ids):
                raise InputError(f"{name}: is empty")
            return ids
        if self.template is None:
            raise InputError(f"{self.place}: has no chat template")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not any(message.get("content") for message in messages):
            raise InputError(f"{name}: is empty")
        return encode_chat(self.tokenizer, self.template, messages, **self.known)

    def decode(self, tokens: np.ndarray) -> str:
        """The text of tokens, without special ones and those of rows that stand for none."""
        return self.tokenizer.decode(tokens[tokens < self.tokenizer.n_vocab], skip_special=True)

    def answer(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        sampling: Sampling,
        stop: Sequence[str] = (),
        chat: bool = False,
        write: Callable[[str], Any] | None = None,
        users: Sequence[str] = (),
    ) -> dict[str, Any]:
        """What follows each prompt, as `experiments.generate` prints it.

        Args:
          users: behind whose events the prompts stand: as many as prompts, or one where there are several of the other.
          stop: tokens beside the model's own at which an answer ends.
          write: is given the text of one prompt bit by bit, in whole characters.

        Raises:
          InputError: as `encode`; a token of `stop` is not in the vocabulary; prompts are none, or too long; there is
            no such user, or the model is not a run's with events.
        """
        if not prompts:
            raise InputError("there is no prompt")
        prompts, users = _pair(prompts, users)
        names = ["the prompt"] if len(prompts) == 1 else [f"prompt {i + 1}" for i in range(len(prompts))]
        ids = [self.encode(prompt, chat, name) for prompt, name in zip(prompts, names, strict=True)]
        stop_ids = {*self.stop_ids, *(self.tokenizer.id_of(token) for token in stop)}
        stream = DecodeStream(self.tokenizer, skip_special=True)

        def tell(_: int, new: list[int]) -> None:
            assert write is not None
            write("".join(stream.push(id) for id in new if id < self.tokenizer.n_vocab))

        started = time.monotonic() - self.generator.programs.compile_s
        callback = None if write is None else tell
        options: tuple[Any, ...] = (max_new_tokens, sampling, sorted(stop_ids), callback)
        if users:
            found = self.generator.generate_behind(self._lay(users, ids, max_new_tokens), *options)
        else:
            found = self.generator.generate(ids, *options)
        seconds = time.monotonic() - self.generator.programs.compile_s - started
        if write is not None:
            write(stream.finish())
        named: list[dict[str, str]] = [{"user": name} for name in users] or [{} for _ in ids]
        answers = [
            {
                "text": self.decode(answer.tokens),
                "tokens": answer.tokens.tolist(),
                "finish": answer.finish,
                "n_prompt": len(own),
                **user,
            }
            for own, answer, user in zip(ids, found, named, strict=True)
        ]
        speed = {
            "tokens_per_s": sum(len(answer.tokens) for answer in found) / seconds,
            "compile_s": self.generator.programs.compile_s,
        }
        return {**answers[0], **speed} if len(answers) == 1 else {"answers": answers, **speed}

    def _lay(self, users: Sequence[str], ids: list[np.ndarray], n_new: int) -> Batch:
        if self.run is None:
            raise InputError(f"{self.place}: has no events (--user needs a run that was trained on events and words)")
        return lay_prompts(self.run, users, ids, n_new)


def _pair(prompts: Sequence[Prompt], users: Sequence[str]) -> tuple[Sequence[Prompt], Sequence[str]]:
    """As many prompts as users; without users as they are."""
    if not users or len(prompts) == len(users):
        return prompts, users
    if 1 not in (len(prompts), len(users)):
        raise InputError(f"--user: {len(users)} users and {len(prompts)} prompts; as many are needed, or one of either")
    n = max(len(prompts), len(users))
    return list(prompts) * (n // len(prompts)), list(users) * (n // len(users))


def load_speaker(
    workdir: str,
    hf_folder: str,
    dtype: str = "",
    quantize: str = "",
    mesh: tuple[int, int, int] = (1, 1, 1),
    behind_events: bool = False,
) -> Speaker:
    """A run or a Hugging Face folder that can go on with texts.

    Args: behind_events: whether prompts are to stand behind events of the run's users, which keeps the whole model.

    Raises:
      InputError: both are given, or none; whatever is wrong with it; it has no text head or no tokenizer.
    """
    if bool(workdir) == bool(hf_folder):
        raise InputError("one of --workdir (a run) and --hf_folder (a folder of weights) is needed")
    if dtype not in ("", "float32", "bfloat16"):
        raise InputError(f"--dtype: {dtype!r} is neither float32 nor bfloat16")
    if quantize not in ("", "int8"):
        raise InputError(f"--quantize: {quantize!r} is not int8")
    options: dict[str, Any] = {"is_quantized": quantize == "int8", "dtype": dtype or None}
    where = make_mesh(*mesh) if mesh != (1, 1, 1) else None
    if hf_folder:
        folder = Path(hf_folder)
        tokenizer = TextTokenizer.load(folder / TOKENIZER)
        opened, model = read_hf_model(folder)
        n_context = read_shape(opened.config, folder / CONFIG_NAME).max_positions
        generator = Generator(model, mesh=where, n_context=n_context, **options)
        return _make(folder, folder, generator, tokenizer, True)
    run = load_run(workdir)
    if not run.config.model.text.vocab_size:
        raise InputError(f"{run.folder}: has no text head (model.text.vocab_size)")
    origin = find_origin(run.folder)
    # Trained on rows of so many slots, whatever the model that it began with was trained on.
    n_context = run.config.data.seq_len
    if origin is not None:
        there = read_json(origin / CONFIG_NAME)
        n_context = max(read_shape(there, origin / CONFIG_NAME).max_positions, n_context)
    tokenizer = TextTokenizer.load(find_tokenizer(run.folder))
    whole = run if behind_events and run.config.data.source != "text" else None
    if whole is not None:
        if where is not None:
            raise InputError("--user: text behind events needs one device (--mesh)")
        options["catalog"] = whole.catalog
    generator = Generator(*run.predictor[:2], mesh=where, n_context=n_context, **options)
    made = _make(run.folder, origin, generator, tokenizer, not (run.folder / TOKENIZER).is_file())
    return dataclasses.replace(made, run=whole)


def _make(
    place: Path, side_files: Path | None, generator: Generator, tokenizer: TextTokenizer, adds_special: bool
) -> Speaker:
    """Args: the folder with template and stop tokens, if there is one; whether texts begin as the tokenizer says."""
    n_rows = generator.config.text.vocab_size
    stop_ids = () if side_files is None else tuple(id for id in read_stop_ids(side_files) if id < n_rows)
    stop_ids = stop_ids or tuple(tokenizer.id_of(token) for token in ENDS if token in tokenizer.control_tokens)
    template = None if side_files is None else read_chat_template(side_files)
    known: dict[str, Any] = {} if side_files is None else read_template_tokens(side_files)
    return Speaker(place, generator, tokenizer, stop_ids, template, known, adds_special)


def read_prompts(prompts: Sequence[str], path: str) -> list[Prompt]:
    """The prompts of flags, and those of a file: a text a line, or (`.jsonl`) a text or an object a line.

    An object holds `prompt`, a text, or `messages`, a list of objects with `role` and `content`. Empty lines are left
    out.

    Raises:
      InputError: there is none; the file is missing, is no UTF-8, or a line of it is none of these.
    """
    found: list[Prompt] = list(prompts)
    if path:
        file = Path(path)
        if not file.is_file():
            raise InputError(f"{path}: {'is no file' if file.exists() else 'no such file'}")
        try:
            lines = file.read_bytes().decode().splitlines()
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: is no UTF-8 text (byte {error.start})") from None
        is_json = file.suffix == ".jsonl"
        found += [
            _read_line(line, f"{path}:{n}") if is_json else line for n, line in enumerate(lines, 1) if line.strip()
        ]
    if not found:
        raise InputError("there is no prompt: --prompt, or --prompts with a file of at least one, is needed")
    return found


def _read_line(line: str, name: str) -> Prompt:
    try:
        value = parse_json(line)
    except ValueError as error:
        raise InputError(f"{name}: is no JSON ({error})") from None
    found: Any = value.get("prompt", value.get("messages")) if isinstance(value, dict) else value
    is_chat = isinstance(found, list) and found and all(isinstance(message, dict) for message in found)
    if not isinstance(found, str) and not is_chat:
        raise InputError(f"{name}: a text, or an object with prompt or messages, is needed")
    return found
