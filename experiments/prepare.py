"""Turns the tables of a configuration into a prepared folder: ArrayRecord shards of per-user sequences, or of tokens.

    python -m experiments.prepare --config=configs/amazon3.py --out=prepared/amazon3 [--config.FIELD=value] [--json]
    python -m experiments.prepare --config=configs/language.py --out=prepared/language

Exit code 2 names the file, row and column of the first bad row; `--config.data.tables.on_bad_rows=quarantine` puts bad
rows into quarantine.jsonl in the folder instead, and the counts by reason are printed.
"""

import dataclasses
from pathlib import Path

from moerec.config import cli
from moerec.data.prepare.shards import load_dataset
from moerec.data.prepare.tables_to_shards import describe_report, prepare
from moerec.data.text.prepare import describe_text_report, prepare_text
from moerec.data.timezones import settle_zones
from moerec.errors import InputError


def main(config, flags) -> dict:
    """Prepares the folder and prints the counts."""
    out = flags.out or flags.workdir
    if not out:
        raise InputError("--out is missing: the folder to write")
    if config.data.source == "text":
        texts = prepare_text(config.data, Path(out), n_rows=config.model.text.vocab_size)
        print(describe_text_report(texts))
        return dataclasses.asdict(texts)
    report = prepare(config.data, Path(out))
    print(describe_report(report))
    if config.data.schema.zone_column or config.data.schema.zone != "UTC":
        _, unzoned = settle_zones(load_dataset(Path(out)), config.data.schema)
        if unzoned:
            print(unzoned)
            report = dataclasses.replace(report, notes=(*report.notes, unzoned))
    return dataclasses.asdict(report)


if __name__ == "__main__":
    cli.run(main, extra_flags={"out": ("", "the prepared folder to write")}, workdir=False)
