"""Audits a data set under its split: ties, telling ids, leaks from the future, repeats, give-away services, copies.

    python -m experiments.audit --config=configs/amazon3.py --workdir=runs/audit_amazon3 [--json]

Prints a table, one line a check, and writes it to audit.json in the run directory. Exit code 1 where a value exceeds
its limit in `config.audit`.
"""

from pathlib import Path

from moerec.config import cli
from moerec.data.load import load_data
from moerec.data.prepare.tables_to_shards import describe_quarantine
from moerec.eval.audit import run_audit
from moerec.eval.ranking.repeats import suggest_masking
from moerec.files import locked, write_json


def main(config, flags):
    """Loads the data as training would and prints the audit."""
    workdir = Path(flags.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    with locked(workdir):
        data = load_data(config.data, workdir)
        for line in (*data.notes, *describe_quarantine(data.quarantined), *suggest_masking(config, data)):
            print(line)
        report = run_audit(data.dataset, config.data.split, config.audit, config.data.seed)
        print(report.to_text())
        write_json(workdir / "audit.json", report.to_dict())
    return report.to_dict()


if __name__ == "__main__":
    cli.run(main)
