"""The directory of a run: what may stand in it, and a finished run opened again."""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from moerec.config import Config
from moerec.config.stored import list_differences, read_config, read_stored
from moerec.data.load import DIGEST, RunData, reload_data
from moerec.errors import InputError
from moerec.files import read_json
from moerec.nn.model import TEXT_SIZES, ModelSizes, Predictor, read_calibration
from moerec.nn.sharding import make_mesh, param_shardings, replicated
from moerec.tasks import make_tasks
from moerec.train.checkpoint import Checkpoints
from moerec.train.state import init_state, make_predictor
from moerec.types import Catalog

CONFIG, METRICS, REPORT = "config.json", "metrics.json", "report.html"


def make_sizes(config: Config, data: RunData) -> ModelSizes:
    """What the data fixes about the model."""
    dataset = data.dataset
    return ModelSizes(
        n_items=dataset.catalogue.n_items,
        n_tokens=data.tokens.n_tokens,
        n_services=dataset.catalogue.n_services,
        n_actions=len(dataset.actions),
        context_sizes=tuple(len(values) + 1 for values in dataset.context.values()),
        field_sizes=dataset.profile_codes[1],
        has_control=config.data.first_event,
        service_offsets=tuple(dataset.catalogue.offsets.tolist()),
        d_states=0 if data.item_states is None else data.item_states.shape[1],
    )


def refuse_strange_folder(workdir: Path) -> None:
    """A run is not written among other things; tables that were prepared, or audited, there before are its own.

    Raises:
      InputError: there is something else.
    """
    if not (workdir / CONFIG).exists():
        tables = r"(neighbors|transitions|crossings)\.npz|item_states|(item_tokens|tokenizer)\.json"
        # `data.partial-…`: an interruption left it
        own = re.compile(rf"data(\..*)?|{tables}|audit\.json|\..*|.*\.log|lost\+found")
        strange = sorted(path.name for path in workdir.iterdir() if not own.fullmatch(path.name))
        if strange:
            raise InputError(f"{workdir}: is not empty and no directory of a run (there is {strange[0]})")


def refuse_other_config(resolved: Any, path: Path) -> None:
    """A directory is never reused for another config, whose numbers would be mixed in.

    Raises:
      InputError: the stored config differs.
    """
    if path.exists():
        differences = list(list_differences(read_stored(path), resolved, "config"))
        if differences:
            more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
            told = "; ".join(differences[:3]) + more
            raise InputError(f"{path}: this directory holds another run: {told}. Another --workdir is needed")


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: configuration, data and best parameters, each read when first asked for; nothing is written.

    Attributes:
      folder: the directory of the run.
    """

    folder: Path

    @functools.cached_property
    def config(self) -> Config:
        """Raises: InputError, where it is not of this version, or names a part that is not registered."""
        config = read_config(self.folder / CONFIG)
        make_tasks(config)
        return config

    @functools.cached_property
    def metrics(self) -> dict[str, Any]:
        """Raises: InputError, where the run is not finished, or the file is damaged."""
        path = self.folder / METRICS
        if not path.exists():
            raise InputError(f"{self.folder}: this run is not finished; the command that began it goes on with it")
        return read_json(path)

    @functools.cached_property
    def data(self) -> RunData:
        """Raises: InputError, where it is no longer there, or other data."""
        return reload_data(self.config.data, self.folder)

    @functools.cached_property
    def predictor(self) -> Predictor:
        """The best parameters, on one device. Raises: InputError, where there is no checkpoint."""
        return self.restore(make_mesh(1, 1, 1))

    def restore(self, mesh: Mesh) -> Predictor:
        """The best parameters, placed on a mesh. Raises: InputError, where there is no checkpoint."""
        is_text = self.config.data.source == "text"
        sizes = TEXT_SIZES if is_text else make_sizes(self.config, self.data)
        shapes = jax.eval_shape(lambda: init_state(self.config, sizes))
        like = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, param_shardings(shapes, mesh)
        )
        if not (self.folder / "checkpoints" / "best").is_dir():
            raise InputError(f"{self.folder}: holds no checkpoint")
        checkpoints = Checkpoints(self.folder / "checkpoints", read_only=True)
        try:
            state, progress = checkpoints.restore_best(like)
            return read_calibration(progress.calibration).apply(make_predictor(state))
        finally:
            checkpoints.close()

    @functools.cached_property
    def catalog(self) -> Catalog:
        """The catalogue, bound to the parameters: every request is scored against its vectors."""
        catalog = jax.device_put(self.data.catalog, replicated(make_mesh(1, 1, 1)))
        return bind_catalog(self.predictor, catalog)


@jax.jit
def bind_catalog(predictor: Predictor, catalog: Catalog) -> Catalog:
    """`SequenceModel.bind`, compiled."""
    return predictor.params.bind(catalog)


def load_run(folder: str | Path) -> Run:
    """A finished run.

    Raises:
      InputError: it is no directory of one.
    """
    run = Run(Path(folder))
    _ = run.config, run.metrics
    return run


__all__ = ["CONFIG", "DIGEST", "METRICS", "REPORT", "Run", "bind_catalog", "load_run", "make_sizes"]
