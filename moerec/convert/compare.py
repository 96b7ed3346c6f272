"""Our logits beside those of `transformers`, position by position, where that is installed."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from moerec.convert.hf_config import read_shape
from moerec.convert.hf_folder import CONFIG_NAME
from moerec.convert.logits import compute_logits, make_text_batch
from moerec.errors import InputError, WorkError
from moerec.files import naming, read_json, replacing
from moerec.nn.model import SequenceModel

_NPY = b"\x93NUMPY"  # how such a file begins


def read_tokens(path: Path) -> np.ndarray:
    """`[T]` int32 token ids of a .npy file.

    Raises:
      InputError: there is none, or it holds anything else.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(_NPY)) != _NPY:
                raise InputError(f"{path}: is no .npy file")
        ids = np.load(path, mmap_mode="r", allow_pickle=False)  # which holds the header against the file's size
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except InputError:
        raise
    except Exception as error:  # NumPy's readers of damaged headers raise many kinds
        raise InputError(f"{path}: is no .npy file of numbers ({str(error).splitlines()[0][:100]})") from None
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or not len(ids) or not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"{path}: a list of at least one token id, whole numbers, is needed")
    if ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
        raise InputError(f"{path}: token ids are not negative, and below 2^31")
    return ids.astype(np.int32)


def check_logits(model: SequenceModel, folder: Path, token_T: np.ndarray, out: Path) -> dict[str, Any]:
    """Writes the logits `[T, V]` and compares them.

    Returns: `positions`, of each the largest difference in parts of the largest logit of all (`gap`) and whether the
      same token comes first; `gap`, the largest of all. Without `transformers` no positions, and the `reason`.

    Raises:
      InputError: a token is not in the vocabulary. WorkError: logits are not finite.
    """
    n_vocab = model.config.text.vocab_size
    if token_T.max() >= n_vocab:
        raise InputError(f"--tokens: {int(token_T.max())} is no token; the vocabulary has {n_vocab}")
    logits_TV = np.asarray(compute_logits(model, make_text_batch(token_T[None])))[0]
    if not np.isfinite(logits_TV).all():
        raise WorkError(f"{folder}: its logits are not finite")
    with replacing(out) as file, naming(out):
        np.savez(file, logits=logits_TV)
    if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None:
        return {"positions": [], "gap": None, "reason": "transformers is not installed (pip install 'moerec[hf]')"}
    try:
        other_TV = run_transformers(folder, token_T)
    except (OSError, ValueError, RuntimeError) as error:  # it refuses some folders that are read here
        reason = str(error).strip().split("\n")[0][:200]
        told = f"transformers cannot load this folder ({reason})"
        return {"positions": [], "gap": None, "reason": told, "exit_code": 1}
    gap_T = np.max(np.abs(logits_TV - other_TV), axis=1) / np.max(np.abs(other_TV))
    same_T = np.argmax(logits_TV, axis=1) == np.argmax(other_TV, axis=1)
    positions = [
        {"position": t, "gap": float(gap), "same_first": bool(same)}
        for t, (gap, same) in enumerate(zip(gap_T, same_T, strict=True))
    ]
    return {"positions": positions, "gap": float(gap_T.max())}


def run_transformers(folder: Path, token_T: np.ndarray) -> np.ndarray:
    """`[T, V]` float32 logits by `transformers`, in float32 and with its plainest attention and experts."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    plain: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager"}
    shape = read_shape(read_json(folder / CONFIG_NAME), folder / CONFIG_NAME)
    if shape.moe is not None:
        plain["num_experts"] = shape.moe.n_experts  # of this family `num_local_experts` is not read
    other = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, **plain
    )
    with torch.no_grad():
        return other.eval()(torch.from_numpy(token_T[None].astype(np.int64))).logits[0].float().numpy()
